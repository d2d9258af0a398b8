"""The product in a simulated world: its clock, its threads and its adapters are the world's. Its code is as it is."""

from __future__ import annotations

import marshal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, tzinfo
from functools import cache, lru_cache, partial
from typing import TYPE_CHECKING, Any, Self

from airflow.sdk import get_current_context

from include.juicefs_storage.volume.setting import Setting

if TYPE_CHECKING:
    from tests.simulation.scheduler import Process
    from tests.simulation.world import World


@dataclass
class Here:
    """Which world is simulated.

    Attributes:
        world: The world.
        contexts: Process -> what Airflow calls its context.
    """

    world: World = field(init=False)
    contexts: dict[Process, Any] = field(default_factory=dict)

    def begin(self, world: World) -> None:
        """Simulate this world from now on."""
        self.world = world
        self.contexts.clear()


HERE = Here()
#: How many values of one kind are remembered.
_REMEMBERED = 300


class _Time:
    """Module `time`, by the world's clock."""

    @staticmethod
    def monotonic() -> float:
        return HERE.world.scheduler.now

    time = perf_counter = monotonic

    @staticmethod
    def sleep(seconds: float) -> None:
        HERE.world.scheduler.sleep(seconds)


class _Datetime(datetime):
    """`datetime`, by the world's clock."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.fromtimestamp(HERE.world.scheduler.now + _context()["skew_s"], tz)


class _Pool:
    """A pool of threads, one thread at a time."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    @staticmethod
    def map(function: Callable[..., Any], *rows: Iterable[Any]) -> Iterator[Any]:
        return iter([function(*row) for row in zip(*rows, strict=False)])

    def shutdown(self, **_: object) -> None: ...


class _Event:
    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, timeout: float) -> bool:
        scheduler = HERE.world.scheduler
        until = scheduler.now + timeout
        while not self._set and scheduler.now < until:
            scheduler.sleep(min(1.0, until - scheduler.now))
        return self._set


class _Thread:
    def __init__(self, target: Callable[[], object], **_: object) -> None:
        self._target = target

    def start(self) -> None:
        scheduler = HERE.world.scheduler
        self._process = scheduler.spawn("thread", self._target, scheduler.current)
        HERE.contexts[self._process] = HERE.contexts[scheduler.current]

    def join(self, timeout: float | None = None) -> None:
        HERE.world.scheduler.wait_for(lambda: self._process.ended)


class _Threading:
    # All of it is one thread: what a lock guards is not left in the middle of a turn.
    Event, Thread, Lock = _Event, _Thread, threading.RLock


def _context() -> Any:
    return HERE.contexts[HERE.world.scheduler.current]


def _nothing(*_: object) -> None:
    """Keep nothing out of the logs: a simulated world has no secrets, and the masker's list would grow for ever."""


def _replacements() -> dict[int, Any]:
    from include.juicefs_storage.tasks.context import mask, mask_keys
    from include.juicefs_storage.tasks.registry import read_registry

    pairs: list[tuple[object, object]] = [
        (time, _Time), (time.monotonic, _Time.monotonic), (time.sleep, _Time.sleep), (datetime, _Datetime),
        (ThreadPoolExecutor, _Pool), (threading, _Threading), (get_current_context, _context),
        (mask, _nothing), (mask_keys, _nothing), (read_registry, cache(read_registry)),
    ]  # fmt: skip
    return {id(real): simulated for real, simulated in pairs}


def _remembered() -> list[tuple[Any, str, Any]]:
    """What makes immutable values of text: most of a history's time goes there, and the texts are few."""
    from include.juicefs_storage.switch.backup import Backup
    from include.juicefs_storage.switch.params import RevertParams, SwitchParams
    from include.juicefs_storage.switch.plan import Plan

    def by_fields(model: Any) -> Callable[[Any], Any]:
        validate, made = model.model_validate, dict[bytes, Any]()

        def validated(fields: Any) -> Any:
            key = marshal.dumps(fields)
            if key not in made:
                if len(made) > _REMEMBERED:
                    made.clear()
                made[key] = validate(fields)
            return made[key]

        return validated

    read_setting = lru_cache(_REMEMBERED)(lambda text: Setting(bytes.fromhex(text)))
    return [
        *((model, "model_validate", by_fields(model)) for model in (SwitchParams, RevertParams, Plan)),
        (Backup, "from_bytes", lru_cache(_REMEMBERED)(Backup.from_bytes)),
        (Backup, "setting", property(lambda backup: read_setting(backup.setting_hex))),
    ]


@contextmanager
def simulated() -> Iterator[None]:
    """Let every run of the product in this process happen in the world of `HERE`."""
    from include.juicefs_storage.switch.lease import VolumeLease
    from include.juicefs_storage.switch.write_setting import WriteSetting
    from tests.simulation.runtime import SimulatedRuntime, open_vault, simulated_engine
    from tests.support.graph import find_dag

    for dag_id in ("juicefs_storage_switch", "juicefs_storage_revert"):
        find_dag(dag_id)
    from include.juicefs_storage.tasks import runtime
    from include.juicefs_storage.tasks.switch.run import SwitchRun

    replacements = _replacements() | {id(runtime.Runtime): SimulatedRuntime, id(runtime.open_vault): open_vault}
    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        # What a class inherits is bound to it once it is set there: its own subclasses would get the wrong class.
        inherited = isinstance(owner, type) and name not in vars(owner)
        before = None if inherited else vars(owner).get(name, getattr(owner, name))
        undo.append(partial(delattr, owner, name) if inherited else partial(setattr, owner, name, before))
        setattr(owner, name, value)

    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("include.juicefs_storage") and ".adapters" not in module_name:
            for name, value in list(vars(module).items()):
                if id(value) in replacements:
                    put(module, name, replacements[id(value)])
    put(SwitchRun, "engine", simulated_engine)
    for owner, name, value in _remembered():
        put(owner, name, value)
    for owner in (VolumeLease, WriteSetting):
        defaults = tuple(_Time.sleep if value is time.sleep else value for value in owner.__init__.__defaults__ or ())
        put(owner.__init__, "__defaults__", defaults)
    try:
        yield
    finally:
        for back in reversed(undo):
            back()

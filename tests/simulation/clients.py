"""The clients of a simulated volume: they follow the setting with their heartbeat, write, commit and acknowledge."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from random import Random
from typing import TYPE_CHECKING

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.setting import Setting, StorageConfig

if TYPE_CHECKING:
    from tests.simulation.world import World

#: How long a client tries to upload a block before the application gets an error.
_UPLOAD_S = 60.0
#: How long a machine takes to go on after it was suspended, in seconds: at most.
_WAKES_S = 5.0


@dataclass(eq=False)
class Client:
    """A client of the volume.

    Attributes:
        world: Where it lives.
        name: Of its pod, or of its host where it is none.
        uid: Of its pod.
        heartbeat_s: How often it reads the setting, in seconds.
        used: The storage that it reads and writes.
        shown: The setting that it has read last: what its `.config` shows.
        format_values: What its command writes into the setting when its container starts; None: nothing.
        breaks: The next reloads fail, as long as this is so.
        asleep: It does nothing at all, as a suspended machine.
        restarts: Of its container.
        started_at: When its container started.
        log: What it has printed: time and line.
        request_errors: Object requests that failed.
    """

    world: World
    name: str
    uid: str
    heartbeat_s: float
    used: StorageConfig
    shown: Setting
    format_values: StorageConfig | None = None
    breaks: bool = False
    asleep: bool = False
    restarts: int = 0
    started_at: float = 0.0
    log: list[tuple[float, str]] = field(default_factory=list)
    request_errors: int = 0

    @property
    def mount_path(self) -> str:
        """Where the pod has the volume mounted."""
        return f"/jfs/pvc-1-{self.uid}"

    def beat(self) -> None:
        """Read the setting, and use what it says where it has changed; then again after a heartbeat."""
        if not self.asleep and self.world.metadata_up:
            self._reload(self.world.row)
        self.world.scheduler.after(self.heartbeat_s, self.beat)

    def _reload(self, row: Setting) -> None:
        if _storage_fields(row.raw) == _storage_fields(self.shown.raw):
            return
        self.shown = row
        config = row.config
        key = config.access_key.get_secret_value()
        self._print(f'found new configuration: storage="{config.storage}" bucket="{config.bucket}" ak="{key}"')
        if self.breaks:
            self._print("<WARNING>: object storage: invalid configuration")
            return
        self.used = config

    def _print(self, text: str) -> None:
        at = datetime.fromtimestamp(self.world.scheduler.now, UTC)
        self.log.append((self.world.scheduler.now, f"{at:%Y/%m/%d %H:%M:%S}.000000 juicefs[1] {text}"))

    def write(self, path: str, blocks: int, *, gap_s: float = 0.3) -> None:
        """Write a file, block by block, commit its slice with the last one, and acknowledge it.

        Args:
            path: Of the file.
            blocks: How many.
            gap_s: Between two blocks, in seconds.
        """
        world = self.world
        slice_id = world.new_slice()
        size = blocks * 4096 * 1024
        keys = [key for key, _ in block_objects(world.row, slice_id, size)]
        self._upload(
            keys,
            0,
            world.scheduler.now + _UPLOAD_S,
            lambda error: self._commit(error, path, slice_id, size),
            gap_s,
        )

    def _upload(self, keys: list[str], index: int, until: float, then: Callable[[str], None], gap_s: float) -> None:
        scheduler, tries = self.world.scheduler, itertools.count(1)

        def attempt() -> None:
            if self.asleep:
                scheduler.after(_WAKES_S, attempt)
                return
            try:
                store = self.world.store_of(self.used)
                store.admit(self.used, write=True)
            except StorageSwitchError as error:
                self.request_errors += 1
                if scheduler.now > until:
                    then(error.problem)
                else:
                    scheduler.after(next(tries) ** 2, attempt)  # as JuiceFS does
                return
            store.put(keys[index], 4096 * 1024, keys[index], self.name)
            if index + 1 < len(keys):
                self._upload(keys, index + 1, until + gap_s, then, gap_s)
            else:
                then("")

        wait_s = gap_s if index else scheduler.random.uniform(0.01, 0.3)
        scheduler.after(wait_s + self.world.store_of(self.used).slow_s, attempt)

    def _commit(self, error: str, path: str, slice_id: int, size: int) -> None:
        if not error and not self.world.metadata_up:
            self.world.scheduler.after(1.0, lambda: self._commit("", path, slice_id, size))
            return
        if not error:
            self.world.slices[slice_id] = (size, path)
            self.world.acknowledge(path, slice_id, size)

    def restart(self, delay_s: float, writes: Callable[[], bool]) -> None:
        """Have the container restarted: its command writes the values that it was made with into the setting first.

        Args:
            delay_s: Until it starts, in seconds.
            writes: Whether it does so, asked when it starts.
        """
        self.restarts += 1
        self.asleep = True

        def start() -> None:
            if self.format_values and writes():
                self.world.format(self.format_values)
            self.asleep, self.started_at = False, self.world.scheduler.now
            self.shown = self.world.row
            self.used = self.shown.config

        self.world.scheduler.after(delay_s, start)


@lru_cache(maxsize=100)
def _storage_fields(raw: bytes) -> tuple[object, ...]:
    """What a client compares: the fields as they stand in the row, the encrypted ones too."""
    fields = json.loads(raw)
    return tuple(fields.get(name) for name in ("Storage", "Bucket", "AccessKey", "SecretKey", "SessionToken"))


def write_on(world: World, client: Client, random: Random, *, until: float, every_s: float) -> None:
    """Have a client write files until a time."""

    def one() -> None:
        if world.scheduler.now > until:
            return
        gap_s = random.choice((0.05, 0.3, 2.0))
        client.write(f"/file-{len(world.attempted)}", random.choice((1, 1, 2, 3)), gap_s=gap_s)
        world.scheduler.after(random.uniform(0.2, 2.0) * every_s, one)

    world.scheduler.after(random.uniform(0.0, every_s), one)

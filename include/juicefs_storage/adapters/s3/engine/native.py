"""The engine: objects through this process on plain sockets, as few CPU cycles each as Python allows.

Small objects: many exchanges at once on one thread (`loop`). Large ones: a thread each (`threads`). How many there are
of each at once finds itself (`concurrency`).
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeVar

from include.juicefs_storage.adapters.s3.client import PUT_LIMIT_BYTES, ObjectError
from include.juicefs_storage.adapters.s3.engine.answers import EndedError
from include.juicefs_storage.adapters.s3.engine.concurrency import Concurrency
from include.juicefs_storage.adapters.s3.engine.large import send_large
from include.juicefs_storage.adapters.s3.engine.loop import Loop
from include.juicefs_storage.adapters.s3.engine.multipart import PART_BYTES, send_parts
from include.juicefs_storage.adapters.s3.engine.proof import compare
from include.juicefs_storage.adapters.s3.engine.server_copy import SERVER_COPY_BYTES, copy_on_server
from include.juicefs_storage.adapters.s3.engine.small import send_small
from include.juicefs_storage.adapters.s3.engine.threads import Threads
from include.juicefs_storage.adapters.s3.engine.worker import Shared, Worker
from include.juicefs_storage.adapters.s3.wire.limits import held_back
from include.juicefs_storage.objects.flow import LOOK_S, Flow
from include.juicefs_storage.objects.model import Compared, Copied, Engine, Listed, ObjectOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from include.juicefs_storage.adapters.s3.store import S3Store
    from include.juicefs_storage.adapters.s3.wire.limits import Limits, Steps

SMALL_BYTES = 2**20
#: What small objects may hold in memory, all together.
IN_MEMORY_BYTES = 32 * 2**20
_SMALL_START, SMALL_BOUND = 32, 512
#: Of these each has a thread.
_LARGE_START, LARGE_BOUND = 8, 64
_TELL_S = 10.0

log = logging.getLogger(__name__)

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class _Treat(Protocol[R_co]):
    def __call__(self, worker: Worker, item: Listed, *, in_memory: bool) -> Steps[R_co]: ...


class NativeEngine(Engine):
    """`model.Engine` on plain sockets. Not for several threads at once.

    Args:
        source: Read only.
        target: Written.
        concurrency: The most objects in flight at once; None: as many as the stores take well.
        flow: Counts what moves, limits and pauses it; None: nobody does.
        limits: Of each request; None: the target's.
        put_limit_bytes: Larger objects go in parts.
        part_bytes: Of such a part.
        copy_damaged: Copy an object all the same, and say so in `detail`, where its content does not match the checksum
            that JuiceFS left with it; else it is DAMAGED and not copied.
    """

    def __init__(
        self,
        source: S3Store,
        target: S3Store,
        concurrency: int | None = None,
        *,
        flow: Flow | None = None,
        limits: Limits | None = None,
        put_limit_bytes: int = PUT_LIMIT_BYTES,
        part_bytes: int = PART_BYTES,
        copy_damaged: bool = False,
    ) -> None:
        self._stores, self._put_limit_bytes = (source, target), put_limit_bytes
        #: How many small and how many large objects are in flight at once. Their bounds may be set while it runs.
        self.small = Concurrency(concurrency or _SMALL_START, concurrency or SMALL_BOUND)
        self.large = Concurrency(_LARGE_START, min(concurrency or LARGE_BOUND, LARGE_BOUND))
        self._shared = Shared(
            limits or target.limits,
            flow or Flow(),
            threading.Event(),
            part_bytes,
            server_copy=source.endpoint == target.endpoint,
            copy_damaged=copy_damaged,
        )
        self._loop = Loop(self._shared.limits)
        self._workers = [Worker(self._shared, source, target, self.small)]
        self._idle: list[Worker] = []
        self._told, self._told_at = "", 0.0

    def close(self) -> None:
        """Close all connections. Idempotent; the engine may be used again."""
        for worker in self._workers:
            worker.close()

    def set_bound(self, concurrency: int | None) -> None:
        """Set the most objects in flight at once, also while it copies; None: as many as the stores take well."""
        self.small.bound = concurrency or SMALL_BOUND
        self.large.bound = min(concurrency or LARGE_BOUND, LARGE_BOUND)

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        """Copy the source's objects with their metadata, each proven at once.

        An object that appeared on the target meanwhile is compared instead: SAME, or DIFFERENT and left alone.
        """

        def treat(worker: Worker, item: Listed, *, in_memory: bool) -> Steps[Copied]:
            return self._copy(worker, item, overwrite=overwrite, in_memory=in_memory)

        results, problems = self._run(objects, treat)
        return [
            result or Copied(ObjectOutcome.FAILED, detail=problems.get(index, ""))
            for index, result in enumerate(results)
        ]

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        """Read both sides in full and compare."""
        results, problems = self._run(objects, lambda worker, item, **_: compare(worker, item))
        return [
            result or Compared(ObjectOutcome.FAILED, detail=problems.get(index, ""))
            for index, result in enumerate(results)
        ]

    def _run(self, objects: Sequence[Listed], treat: _Treat[R]) -> tuple[list[R | None], dict[int, str]]:
        """Treat all objects, as many at once as the stores take well.

        Returns:
            What became of each, None where it could not be treated; and by index why not.
        """
        results: list[R | None] = [None] * len(objects)
        problems: dict[int, str] = {}
        jobs: dict[bool, deque[int]] = {True: deque(), False: deque()}
        for index, item in enumerate(objects):
            jobs[item[1] <= SMALL_BYTES].append(index)
        self._shared.stop.clear()
        flow = self._shared.flow

        waiting, held_bytes = jobs[True], 0

        def one(worker: Worker, index: int, in_flight: Callable[[], int], *, small: bool) -> Steps[None]:
            nonlocal held_bytes
            size, concurrency = objects[index][1], self.small if small else self.large
            if small:
                held_bytes += size
            while wait_s := LOOK_S if flow.paused else concurrency.wait_s(monotonic()):
                yield wait_s
            began = monotonic()
            try:
                results[index] = yield from treat(worker, objects[index], in_memory=small)
            except ObjectError as problem:
                problems[index] = str(problem)
            else:
                concurrency.done(began, monotonic(), in_flight())
            if small:
                held_bytes -= size
            worker.moving.bytes = 0
            flow.done(size)

        def begin(in_flight: int) -> Steps[None] | None:
            if not waiting or in_flight >= self.small.limit:
                return None
            if in_flight and held_bytes + objects[waiting[0]][1] > IN_MEMORY_BYTES:
                return None
            return one(self._workers[0], waiting.popleft(), lambda: in_flight + 1, small=True)

        def stopped() -> bool:
            threads.top_up()
            self._tell()
            return self._shared.stop.is_set()

        threads = Threads(
            jobs[False], self.large, self._shared, self._idle, self._large_worker, partial(one, small=False)
        )
        with threads:
            self._loop.run(begin, self._workers[0], stopped, lambda: bool(waiting))
            threads.join()
        self._tell()
        self._explain_denials()
        return results, problems

    def _tell(self) -> None:
        """Log how many objects are in flight at once, where that changed since it was last logged."""
        state, now = f"Small objects: {self.small}. Large ones: {self.large}.", monotonic()
        if state != self._told and now >= self._told_at + _TELL_S:
            self._told, self._told_at = state, now
            log.info("%s", state)

    def _large_worker(self) -> Worker:
        self._workers.append(Worker(self._shared, *self._stores, self.large).may_block())
        return self._workers[-1]

    def _explain_denials(self) -> None:
        """Raise the store's refusal where a side refused everything: single objects are not at fault then."""
        for client in (client for worker in self._workers for client in (worker.source, worker.target)):
            if client.denied is not None and not client.granted:
                raise client.denied

    def _copy(self, worker: Worker, item: Listed, *, overwrite: bool, in_memory: bool) -> Steps[Copied]:
        shared = self._shared
        try:
            if shared.server_copy and item[1] <= SERVER_COPY_BYTES:
                yield from held_back(shared.flow, item[1])
                copied = yield from copy_on_server(worker, item, overwrite=overwrite)
                if copied is not None:
                    return copied
            elif in_memory and shared.flow.bandwidth.bytes_s:
                yield from held_back(shared.flow, item[1])
            send = send_small if in_memory else send_large
            if item[1] > self._put_limit_bytes:
                send = send_parts
            create_only = shared.create_only and not overwrite
            copied = yield from send(worker, item, create_only=create_only)
            if copied.outcome is ObjectOutcome.FAILED:  # it was not stored as it was sent: once more, over our own
                copied = yield from send(worker, item, create_only=False)
        except EndedError as ended:
            return Copied(ended.outcome, detail=ended.detail)
        return (
            copied._replace(outcome=ObjectOutcome.OVERWRITTEN)
            if overwrite and copied.outcome is ObjectOutcome.COPIED
            else copied
        )

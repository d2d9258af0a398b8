"""The engine: objects through this process on plain sockets, as few CPU cycles each as Python allows.

Small objects: many exchanges at once on one thread (`loop`). Large ones: a thread each (`large`).
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Protocol, TypeVar

from include.juicefs_storage.adapters.s3.client import PUT_LIMIT_BYTES, ObjectError
from include.juicefs_storage.adapters.s3.engine.answers import EndedError
from include.juicefs_storage.adapters.s3.engine.large import send_large
from include.juicefs_storage.adapters.s3.engine.loop import Loop
from include.juicefs_storage.adapters.s3.engine.multipart import PART_BYTES, send_parts
from include.juicefs_storage.adapters.s3.engine.proof import compare
from include.juicefs_storage.adapters.s3.engine.server_copy import SERVER_COPY_BYTES, copy_on_server
from include.juicefs_storage.adapters.s3.engine.small import send_small
from include.juicefs_storage.adapters.s3.engine.worker import Bandwidth, Shared, Worker
from include.juicefs_storage.adapters.s3.wire.drive import StoppedError, drive
from include.juicefs_storage.objects.model import Compared, Copied, Engine, Listed, ObjectOutcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from include.juicefs_storage.adapters.s3.store import S3Store
    from include.juicefs_storage.adapters.s3.wire.limits import Limits, Steps

SMALL_BYTES = 2**20
_LARGE_LANES = 8
_JOIN_S = 5.0

R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class _Treat(Protocol[R_co]):
    def __call__(self, worker: Worker, item: Listed, *, in_memory: bool) -> Steps[R_co]: ...


class NativeEngine(Engine):
    """`model.Engine` on plain sockets. Not for several threads at once.

    Args:
        source: Read only.
        target: Written.
        concurrency: How many objects are in flight at once.
        bandwidth_bytes_s: Upper limit for what is read from the source; None: none.
        limits: Of each request; None: the target's.
        put_limit_bytes: Larger objects go in parts.
        part_bytes: Of such a part.
    """

    def __init__(
        self,
        source: S3Store,
        target: S3Store,
        concurrency: int = 32,
        bandwidth_bytes_s: float | None = None,
        *,
        limits: Limits | None = None,
        put_limit_bytes: int = PUT_LIMIT_BYTES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._stores, self._concurrency, self._put_limit_bytes = (source, target), concurrency, put_limit_bytes
        self._shared = Shared(
            limits or target.limits,
            Bandwidth(bandwidth_bytes_s),
            threading.Event(),
            part_bytes,
            server_copy=source.endpoint == target.endpoint,
        )
        self._loop = Loop(self._shared.limits)
        self._workers = [Worker(self._shared, source, target)]

    def close(self) -> None:
        """Close all connections. Idempotent; the engine may be used again."""
        for worker in self._workers:
            worker.close()

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
        results, problems = self._run(objects, compare)
        return [
            result or Compared(ObjectOutcome.FAILED, detail=problems.get(index, ""))
            for index, result in enumerate(results)
        ]

    def _run(self, objects: Sequence[Listed], treat: _Treat[R]) -> tuple[list[R | None], dict[int, str]]:
        """Treat all objects, on as many threads as they need.

        Returns:
            What became of each, None where it could not be treated; and by index why not.
        """
        results: list[R | None] = [None] * len(objects)
        problems: dict[int, str] = {}
        small_bytes = SMALL_BYTES
        small = deque(index for index, item in enumerate(objects) if item[1] <= small_bytes)
        large = deque(index for index, item in enumerate(objects) if item[1] > small_bytes)
        self._shared.stop.clear()

        def lane(worker: Worker, jobs: deque[int], *, in_memory: bool) -> Steps[None]:
            while jobs:
                try:
                    index = jobs.popleft()
                except IndexError:  # another thread took it
                    return
                try:
                    results[index] = yield from treat(worker, objects[index], in_memory=in_memory)
                except ObjectError as problem:
                    problems[index] = str(problem)

        self._drive(
            [lane(worker, large, in_memory=False) for worker in self._large_workers(len(large))],
            [lane(self._workers[0], small, in_memory=True) for _ in range(min(len(small), self._concurrency))],
            large,
        )
        self._explain_denials()
        return results, problems

    def _large_workers(self, objects: int) -> list[Worker]:
        """Return a worker for each thread that so many large objects get."""
        lanes = min(objects, self._concurrency, _LARGE_LANES)
        while len(self._workers) <= lanes:
            self._workers.append(Worker(self._shared, *self._stores))
        return self._workers[1 : lanes + 1]

    def _drive(self, large: list[Steps[None]], small: list[Steps[None]], waiting: deque[int]) -> None:
        """Run each of the first lanes on a thread of its own, and all others on this one.

        Args:
            large: Lanes that each may block a thread.
            small: Lanes that never block.
            waiting: What the large lanes have before them; emptied where they must end.
        """
        shared, errors = self._shared, []

        def thread(steps: Steps[None]) -> None:
            try:
                drive(steps, shared.limits, shared.stop.is_set)
            except BaseException as error:  # noqa: BLE001 - raised again by the calling thread
                errors.append(error)
                shared.stop.set()

        threads = [
            threading.Thread(target=thread, args=(steps,), name="copy large objects", daemon=True) for steps in large
        ]
        try:
            for item in threads:
                item.start()
            self._loop.run(small, self._workers[0], shared.stop.is_set)
            for item in threads:
                item.join()
        finally:
            shared.stop.set()
            waiting.clear()
            for item in threads:
                item.join(_JOIN_S)
        if errors:
            raise next((error for error in errors if not isinstance(error, StoppedError)), errors[0])

    def _explain_denials(self) -> None:
        """Raise the store's refusal where a side refused everything: single objects are not at fault then."""
        for client in (client for worker in self._workers for client in (worker.source, worker.target)):
            if client.denied is not None and not client.granted:
                raise client.denied

    def _copy(self, worker: Worker, item: Listed, *, overwrite: bool, in_memory: bool) -> Steps[Copied]:
        shared = self._shared
        try:
            if shared.server_copy and item[1] <= SERVER_COPY_BYTES:
                copied = yield from copy_on_server(worker, item, overwrite=overwrite)
                if copied is not None:
                    return copied
            if delay_s := shared.bandwidth.delay(item[1]) if in_memory else 0:
                yield delay_s
            send = send_small if in_memory else send_large
            if item[1] > self._put_limit_bytes:
                send = send_parts
            create_only = shared.create_only and not overwrite
            copied = yield from send(worker, item, create_only=create_only)
            if copied.outcome is ObjectOutcome.FAILED:  # it was not stored as it was sent: once more, over our own
                copied = yield from send(worker, item, create_only=False)
        except EndedError as ended:
            return Copied(ended.outcome)
        return (
            copied._replace(outcome=ObjectOutcome.OVERWRITTEN)
            if overwrite and copied.outcome is ObjectOutcome.COPIED
            else copied
        )

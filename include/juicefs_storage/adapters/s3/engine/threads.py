"""Objects that are moved on a thread each."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol, Self

from include.juicefs_storage.adapters.s3.wire.drive import StoppedError, drive

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable
    from types import TracebackType

    from include.juicefs_storage.adapters.s3.engine.concurrency import Concurrency
    from include.juicefs_storage.adapters.s3.engine.worker import Shared, Worker
    from include.juicefs_storage.adapters.s3.wire.limits import Steps

_JOIN_S = 5.0
#: So often it is looked at whether the limit was raised from outside.
_LOOK_S = 0.5


class _Treat(Protocol):
    def __call__(self, worker: Worker, index: int, in_flight: Callable[[], int]) -> Steps[None]: ...


class Threads:
    """As many threads as the limit says, each of which treats one object after the other.

    As a context manager it ends all threads, whatever happens in between.

    Args:
        jobs: What is to be treated.
        concurrency: How many at once.
        shared: Its `stop` ends all threads.
        workers: Idle ones; those that end are put back.
        make: Makes another worker.
        treat: The exchange for one job.
    """

    def __init__(
        self,
        jobs: deque[int],
        concurrency: Concurrency,
        shared: Shared,
        workers: list[Worker],
        make: Callable[[], Worker],
        treat: _Treat,
    ) -> None:
        self._jobs, self._concurrency, self._shared = jobs, concurrency, shared
        self._workers, self._make, self._treat = workers, make, treat
        self._changed = threading.Condition()
        self._running = 0
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def top_up(self) -> None:
        """Start threads for as much as may run and waits."""
        with self._changed:
            missing = min(self._concurrency.limit - self._running, len(self._jobs))
            for _ in range(0 if self._shared.stop.is_set() else missing):
                worker = self._workers.pop() if self._workers else self._make()
                thread = threading.Thread(target=self._run, args=(worker,), name="copy large objects", daemon=True)
                self._running += 1
                self._threads.append(thread)
                thread.start()

    def join(self) -> None:
        """Wait until nothing is left.

        Raises:
            BaseException: What a thread failed with.
        """
        with self._changed:
            while not self._errors and (self._running or self._jobs):
                self._changed.wait(_LOOK_S)
                self.top_up()
        self._raise()

    def _raise(self) -> None:
        if self._errors:
            raise next((error for error in self._errors if not isinstance(error, StoppedError)), self._errors[0])

    def _run(self, worker: Worker) -> None:
        shared = self._shared
        try:
            while (index := self._next()) is not None:
                drive(self._treat(worker, index, lambda: self._running), shared.limits, shared.stop.is_set)
                self.top_up()
        except BaseException as error:  # noqa: BLE001 - raised again by the calling thread
            self._errors.append(error)
            shared.stop.set()
        finally:
            with self._changed:
                self._running -= 1
                self._workers.append(worker)
                self._changed.notify_all()

    def _next(self) -> int | None:
        with self._changed:
            too_many = self._running > self._concurrency.limit or self._shared.stop.is_set()
            return None if too_many or not self._jobs else self._jobs.popleft()

    def __enter__(self) -> Self:
        self.top_up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._shared.stop.set()
        self._jobs.clear()
        for thread in self._threads:
            thread.join(_JOIN_S)
        if kind is StoppedError:  # that is what a thread's failure looks like from the others
            self._raise()

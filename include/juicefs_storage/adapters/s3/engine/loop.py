"""Many exchanges on one thread."""

from __future__ import annotations

import heapq
import select
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.wire.connection import Connection
from include.juicefs_storage.adapters.s3.wire.drive import StoppedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from include.juicefs_storage.adapters.s3.engine.worker import Worker
    from include.juicefs_storage.adapters.s3.wire.limits import Limits, Steps


class Loop:
    """Drives many exchanges from one thread (epoll, level-triggered)."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._epoll = select.epoll()
        self._known: dict[int, Connection] = {}

    def run(self, lanes: list[Steps[None]], worker: Worker, stopped: Callable[[], bool]) -> None:
        """Run lanes until each has ended. An exception in one ends all.

        Args:
            lanes: What to run side by side in this thread.
            worker: The worker of this thread.
            stopped: Whether to give up; asked between two steps.
        """
        waiting: dict[int, tuple[Steps[None], Connection]] = {}
        sleeping: list[tuple[float, int, Steps[None]]] = []
        order = count()
        now = next_sweep = monotonic()
        running = len(lanes)
        register, modify, poll, known = self._epoll.register, self._epoll.modify, self._epoll.poll, self._known

        def step(lane: Steps[None], problem: Exception | None = None) -> None:
            nonlocal running
            try:
                waits = lane.send(None) if problem is None else lane.throw(problem)
            except StopIteration:
                running -= 1
                return
            if isinstance(waits, Connection):
                fd = waits.fd
                if waits.mask != waits.wants:
                    (modify if waits.mask else register)(fd, waits.wants)
                    waits.mask = waits.wants
                    known[fd] = waits
                waits.since = now
                waiting[fd] = lane, waits
            else:
                heapq.heappush(sleeping, (now + waits, next(order), lane))

        try:
            for lane in lanes:
                step(lane)
            while running:
                for fd, _ in poll(min(0.5, max(0.0, sleeping[0][0] - now)) if sleeping else 0.5):
                    entry = waiting.pop(fd, None)
                    if entry is None:
                        self._hang_up(fd, worker)
                    else:
                        step(entry[0])
                now = monotonic()
                while sleeping and sleeping[0][0] <= now:
                    step(heapq.heappop(sleeping)[2])
                if now >= next_sweep:
                    next_sweep = now + 0.5
                    if stopped():
                        raise StoppedError
                    quiet = now - self._limits.idle_s
                    for fd, (lane, connection) in list(waiting.items()):
                        if connection.since < quiet or connection.deadline < now:
                            del waiting[fd]
                            step(lane, TimeoutError("no answer in time"))
        finally:
            for lane in lanes:
                lane.close()

    def _hang_up(self, fd: int, worker: Worker) -> None:
        """Forget a connection that its server closed, or spoke on, while nobody waited for it."""
        self._epoll.unregister(fd)
        connection = self._known.pop(fd)
        connection.mask = 0
        for client in (worker.source, worker.target):
            if connection in client.idle:
                client.idle.remove(connection)
                connection.close()

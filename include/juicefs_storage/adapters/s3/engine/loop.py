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

    def run(
        self,
        begin: Callable[[int], Steps[None] | None],
        worker: Worker,
        stopped: Callable[[], bool],
        more: Callable[[], bool],
    ) -> None:
        """Run exchanges side by side until there are no more. An exception in one ends all.

        Args:
            begin: Gives the next exchange, by how many are under way; None: not now.
            worker: The worker of this thread.
            stopped: Whether to give up; asked every half second.
            more: Whether to go on asking `begin` where nothing is under way.
        """
        lanes: set[Steps[None]] = set()
        waiting: dict[int, tuple[Steps[None], Connection]] = {}
        sleeping: list[tuple[float, int, Steps[None]]] = []
        order = count()
        now = next_sweep = monotonic()
        register, modify, poll, known = self._epoll.register, self._epoll.modify, self._epoll.poll, self._known

        def step(lane: Steps[None], problem: Exception | None = None) -> None:
            try:
                waits = lane.send(None) if problem is None else lane.throw(problem)
            except StopIteration:
                lanes.remove(lane)
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
            while True:
                while (begun := begin(len(lanes))) is not None:
                    lanes.add(begun)
                    step(begun)
                if not lanes and not more():
                    return
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
                    for fd in self._silent(waiting, now):
                        step(waiting.pop(fd)[0], TimeoutError("no answer in time"))
        finally:
            for lane in lanes:
                lane.close()

    def _silent(self, waiting: dict[int, tuple[Steps[None], Connection]], now: float) -> list[int]:
        """Return the descriptors whose servers have been silent for too long."""
        quiet = now - self._limits.idle_s
        return [fd for fd, (_, held) in waiting.items() if held.since < quiet or held.deadline < now]

    def _hang_up(self, fd: int, worker: Worker) -> None:
        """Forget a connection that its server closed, or spoke on, while nobody waited for it."""
        self._epoll.unregister(fd)
        connection = self._known.pop(fd)
        connection.mask = 0
        for client in (worker.source, worker.target):
            if connection in client.idle:
                client.idle.remove(connection)
                connection.close()

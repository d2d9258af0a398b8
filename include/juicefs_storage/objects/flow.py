"""What moves through an engine: counted while it moves, held back to a bandwidth, or paused.

Engine, status and whoever steers share one `Flow`. All of it may be called from several threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

#: How long whoever is held back waits before it looks again: the bandwidth, or the pause, may have changed.
LOOK_S = 0.5
#: A shorter wait is not worth it, and may be no time at all to a clock.
_LEAST_S = 0.001
#: What may be caught up on after nothing moved for a while, in seconds of the bandwidth.
_BURST_S = 0.25
#: Of a large object at most so many seconds of the bandwidth move at once, within these bounds in bytes.
_STEP_S, _LEAST_STEP_BYTES, _MOST_STEP_BYTES = 0.05, 2**16, 2**20


class Bandwidth:
    """A token bucket that serves in order: bytes are reserved, and may move when all before them were allowed to.

    Args:
        bytes_s: None: no limit.
        clock: A monotonic clock.
    """

    def __init__(self, bytes_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._bytes_s = bytes_s or None
        self._reserved = self._allowed = 0.0
        self._at = clock()

    @property
    def bytes_s(self) -> float | None:
        """The limit; None: none."""
        return self._bytes_s

    def set(self, bytes_s: float | None) -> None:
        """Change the limit, for what waits already too. None and 0: no limit."""
        with self._lock:
            self._settle()
            self._bytes_s = bytes_s or None

    @property
    def step_bytes(self) -> int:
        """How many bytes of a large object may move at once: few at a low limit, or its server would hear nothing."""
        if self._bytes_s is None:
            return _MOST_STEP_BYTES
        return int(min(_MOST_STEP_BYTES, max(_LEAST_STEP_BYTES, self._bytes_s * _STEP_S)))

    def reserve(self, size: int) -> float:
        """Take a place in the line for so many bytes; give it to `wait_s`."""
        with self._lock:
            self._settle()
            place = self._reserved
            self._reserved += size
            return place

    def wait_s(self, place: float) -> float:
        """Return the seconds to wait before asking again; 0: the bytes may move now."""
        with self._lock:
            self._settle()
            short = place - self._allowed
            if self._bytes_s is None or short <= 0:
                return 0.0
            return min(LOOK_S, max(_LEAST_S, short / self._bytes_s))

    def _settle(self) -> None:
        now = self._clock()
        if self._bytes_s is None:
            self._allowed = self._reserved
        else:
            most = self._reserved + self._bytes_s * _BURST_S
            self._allowed = min(self._allowed + self._bytes_s * (now - self._at), most)
        self._at = now


@dataclass
class Moving:
    """Bytes of the one object that a thread moves now."""

    bytes: int = 0


class Flow:
    """What moves through an engine.

    Attributes:
        bandwidth: Of what is read from the stores, in all threads together. What is written was read before.
        because: Who limits or pauses it, for people.

    Args:
        bytes_s: The bandwidth; None: no limit.
        clock: A monotonic clock.
    """

    def __init__(self, bytes_s: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.bandwidth, self.because = Bandwidth(bytes_s, clock), ""
        self._clock, self._lock = clock, threading.Lock()
        self._objects = self._bytes = 0
        self._moving: list[Moving] = []
        self._resumed = threading.Event()
        self._resumed.set()
        self._paused_at = self._paused_s = 0.0

    def moving(self) -> Moving:
        """Make the counter of a thread for the large object that it moves."""
        with self._lock:
            self._moving.append(Moving())
            return self._moving[-1]

    def done(self, size: int) -> None:
        """Count an object that was treated, whatever became of it."""
        with self._lock:
            self._objects += 1
            self._bytes += size

    def counted(self) -> tuple[int, int]:
        """Return objects treated so far, and bytes, those of objects on their way included."""
        with self._lock:
            return self._objects, self._bytes + sum(each.bytes for each in self._moving)

    @property
    def paused(self) -> bool:
        """Whether nothing new may begin."""
        return not self._resumed.is_set()

    @property
    def paused_s(self) -> float:
        """For how long it has been paused, all pauses together."""
        with self._lock:
            return self._paused_s + (self._clock() - self._paused_at if self.paused else 0.0)

    def pause(self) -> None:
        """Let nothing new begin; what is on its way is finished. Idempotent."""
        with self._lock:
            if not self.paused:
                self._paused_at = self._clock()
                self._resumed.clear()

    def resume(self) -> None:
        """End the pause. Idempotent."""
        with self._lock:
            if self.paused:
                self._paused_s += self._clock() - self._paused_at
                self._resumed.set()

    def await_resumed(self) -> None:
        """Block the calling thread while it is paused."""
        self._resumed.wait()

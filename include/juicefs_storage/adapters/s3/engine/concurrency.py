"""How many objects are in flight at once: found by what the stores answer. No clock and no thread of its own."""

from __future__ import annotations

import math
import threading

#: An object may take so many times as long as at the best of times before there are too many at once.
_TOLERANCE = 1.5
#: A window without a refusal may shrink the limit by so much, one with a refusal shrinks it by that.
_SHRINK_AT_MOST, _SHRINK_ON_REFUSAL = 0.5, 0.7
#: So long after a refusal the limit grows by one a window, since the store has shown where it ends.
_CAREFUL_S = 30.0
#: So often half as many are in flight for a window, to see how long an object takes then.
_PROBE_S = 10.0
#: How long an object takes is not told by fewer.
_WINDOW_OBJECTS = 8


class Concurrency:
    """A limit that moves with the stores, never above a bound.

    A window is as many objects as the limit, all begun since it last moved. By Little's law throughput is objects in
    flight over the time that each takes, so a time that stays says that more at once gain throughput, and one that
    rises with the limit says that they only queue. The limit doubles each window until the time rises (TCP's slow
    start); from then on it follows the ratio of the best time to the present one, plus its own square root to find out
    whether there is room (Netflix' Gradient2). Refusals shrink it at once, down to one.

    While it doubles, half a window is enough: the other half of what is in flight began before the limit moved, and
    those after it would make a window last as long as two objects.

    Args:
        start: Where it begins.
        bound: Where it ends. May be set at any time, from any thread; 0 is a pause.
        floor: What a rising time alone does not shrink it below; refusals do.
    """

    def __init__(self, start: int, bound: int, floor: int = 8) -> None:
        self.bound = bound
        self._limit, self._floor = float(min(start, bound)), floor
        self._lock = threading.Lock()
        self._doubling = True
        self._best_s = math.inf
        self._refused_at = self._shrunk_until = self._held_until = self._probed_at = -math.inf
        self._before_probe = 0.0
        self._since, self._objects, self._busy_s, self._most = -math.inf, 0, 0.0, 0
        #: How often the stores have refused or failed.
        self.refusals = 0

    @property
    def limit(self) -> int:
        """How many may be in flight now."""
        return min(max(1, int(self._limit)), self.bound)

    def __str__(self) -> str:
        """Return the state, for the log."""
        failed = f", {self.refusals} tries failed" if self.refusals else ""
        return f"{self.limit} at once (bound {self.bound}{failed})"

    def wait_s(self, now: float) -> float:
        """Return the seconds before the next object may begin, as the stores asked for.

        Args:
            now: As by `time.monotonic`.
        """
        return max(0.0, self._held_until - now)

    def done(self, began: float, now: float, in_flight: int) -> None:
        """Count an object that was treated well.

        Args:
            began: When, as by `time.monotonic`.
            now: The same clock.
            in_flight: How many there were, this one included.
        """
        with self._lock:
            if began < self._since:  # it says how things were before the limit moved
                return
            self._objects += 1
            self._busy_s += now - began
            self._most = max(self._most, in_flight)
            if self._objects >= max(self.limit / 2 if self._doubling else self.limit, _WINDOW_OBJECTS):
                self._end_window(now)

    def refused(self, now: float, wait_s: float = 0.0) -> None:
        """Count an answer that asks to slow down, or a failure.

        Args:
            now: As by `time.monotonic`.
            wait_s: Nothing is to begin for so long; 0: the store did not ask for that.
        """
        with self._lock:
            self.refusals += 1
            self._held_until = max(self._held_until, now + wait_s)
            self._refused_at = now
            self._doubling = False
            if now >= self._shrunk_until:  # what was in flight at a refusal is refused for the same reason
                self._shrunk_until = now + (2 * self._best_s if self._best_s < math.inf else 0)
                self._limit = max(1.0, min(self._limit, self.bound) * _SHRINK_ON_REFUSAL)
                self._before_probe = 0.0
                self._begin_window(now)

    def _end_window(self, now: float) -> None:
        took_s, full = self._busy_s / self._objects, self._most >= self._limit / 2
        limit = min(self._limit, float(self.bound))
        if self._before_probe:  # the time under half the load is the best there is now
            self._best_s, limit, self._before_probe = took_s, self._before_probe, 0.0
        elif full:
            self._best_s = min(self._best_s, took_s)
            ratio = max(_SHRINK_AT_MOST, min(1.0, _TOLERANCE * self._best_s / took_s))
            self._doubling = self._doubling and ratio == 1
            growth = limit if self._doubling else 1.0 if now < self._refused_at + _CAREFUL_S else math.sqrt(limit)
            limit = max(min(limit, self._floor), min(limit * ratio + growth, self.bound))
            if not self._doubling and now > self._probed_at + _PROBE_S and limit >= 2:
                self._probed_at, self._before_probe, limit = now, limit, limit / 2
        self._limit = limit
        self._begin_window(now)

    def _begin_window(self, now: float) -> None:
        self._since, self._objects, self._busy_s, self._most = now, 0, 0.0, 0

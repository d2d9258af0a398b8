"""Progress of a copy, as lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from include.juicefs_storage.objects.model import ObjectOutcome
from include.juicefs_storage.objects.totals import Totals

_EVERY_S = 5.0

log = logging.getLogger(__name__)


@dataclass
class Status:
    """A line in the log every few seconds: how far, how fast, how much longer.

    Attributes:
        label: What is copied.
        objects: How many objects are expected; 0: unknown.
        tell: Gets each line.
        every_s: The least time between two lines, in seconds.
    """

    label: str = ""
    objects: int = 0
    tell: Callable[[str], None] = log.info
    every_s: float = _EVERY_S
    _start: float = field(default_factory=time.monotonic)
    _told: float = field(default_factory=time.monotonic)
    _before: int | None = None

    def update(self, totals: Totals, doing: str) -> None:
        """Log the progress, unless a line was logged just now.

        Args:
            totals: What was counted so far.
            doing: What happens now.
        """
        now = time.monotonic()
        done = totals.objects() - totals.objects(ObjectOutcome.EXTRA)
        if self._before is None:
            self._before, self._start = done, now  # an earlier try's work does not count for this one's rate
        if now - self._told < self.every_s:
            return
        self._told = now
        elapsed, moved = now - self._start, totals.bytes(ObjectOutcome.COPIED, ObjectOutcome.OVERWRITTEN)
        rate = (done - self._before) / elapsed if elapsed else 0.0
        how_far, eta = f"{done:,} objects", ""
        if self.objects:
            left = f"{max(0, self.objects - done) / rate:.0f} s" if rate else "?"
            how_far = f"{min(100.0, 100 * done / self.objects):.1f} %, {done:,} of {self.objects:,} objects"
            eta = f", ETA {left}"
        self.tell(
            f"{self.label}: {how_far}, {moved / 2**20:,.0f} MiB copied, {rate:,.0f} objects/s, {elapsed:.0f} s so "
            f"far{eta}; {doing}"
        )

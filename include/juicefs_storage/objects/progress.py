"""Progress of a copy: how far, how fast, how much longer. A line in the log every few seconds, and a record of it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from include.juicefs_storage.objects.comparison import Rows
from include.juicefs_storage.objects.flow import Flow
from include.juicefs_storage.objects.model import ObjectOutcome
from include.juicefs_storage.objects.totals import Totals

EVERY_S = 5.0
#: Rates are those of the last minute, pauses left out; before so many seconds there is none.
_WINDOW_S, _LEAST_S = 60.0, 1.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a task has come, for pages.

    Attributes:
        label: What is copied or compared.
        state: Whether it works.
        doing: What happens now.
        because: Who limits or pauses it; empty: nobody.
        objects: Treated so far.
        objects_expected: As the plan counted them; None: not known.
        bytes: Of these objects, and of those on their way.
        bytes_expected: As the plan counted them; None: not known.
        percent: By objects or by bytes, whichever is behind; None: not known.
        objects_s: Treated a second, in the last minute.
        bytes_s: Copied, or compared by content, a second.
        elapsed_s: Since this try began, pauses included.
        paused_s: Of these.
        eta_s: Seconds left at the present rates; None: not known.
        estimated_s: What the first ETA said that all of it takes, pauses left out; None: there was none.
        bandwidth_bytes_s: The task's share; None: no limit.
        at: When this was so; ISO 8601, UTC. Also the sign that the task is alive.
    """

    label: str
    state: Literal["running", "paused", "ended"]
    doing: str
    because: str = ""
    objects: int = 0
    objects_expected: int | None = None
    bytes: int = 0
    bytes_expected: int | None = None
    percent: float | None = None
    objects_s: float = 0.0
    bytes_s: float = 0.0
    elapsed_s: float = 0.0
    paused_s: float = 0.0
    eta_s: float | None = None
    estimated_s: float | None = None
    bandwidth_bytes_s: float | None = None
    at: str = ""

    def to_line(self) -> str:
        """Format it for the log."""
        share = "" if self.percent is None else f"{self.percent:.1f} %, "
        objects = f"{self.objects:,}{_of(self.objects_expected, '{:,}')} objects"
        size = f"{sized(self.bytes)}{f' of {sized(self.bytes_expected)}' if self.bytes_expected else ''}"
        eta = "" if self.eta_s is None else f", ETA {duration(self.eta_s)}"
        state = (
            f"PAUSED {self.because}" if self.state == "paused" else ", ".join(filter(None, (self.doing, self.because)))
        )
        return (
            f"{self.label}: {share}{objects}, {size}; {self.objects_s:,.0f} objects/s, {sized(self.bytes_s)}/s; "
            f"{duration(self.elapsed_s)} so far{eta}; {state}"
        )


class _Sample(NamedTuple):
    at_s: float
    objects: int
    bytes: int
    moved: int


@dataclass
class Status:
    """Where a task is. It is told every few seconds, from a thread of its own, while `told` lasts.

    Attributes:
        label: What is copied or compared.
        objects: How many objects are expected; 0: not known.
        bytes: Of these objects; 0: not known.
        flow: Counts what the engine does meanwhile.
        tell: Gets each line.
        publish: Gets each record.
        every_s: Between two lines, in seconds.
        uncounted: The outcome of objects that are not among the expected ones.
        clock: A monotonic clock.
        doing: What happens now.
    """

    label: str = ""
    objects: int = 0
    bytes: int = 0
    flow: Flow = field(default_factory=Flow)
    tell: Callable[[str], None] = log.info
    publish: Callable[[Progress], None] = lambda _: None
    every_s: float = EVERY_S
    uncounted: ObjectOutcome = ObjectOutcome.EXTRA
    clock: Callable[[], float] = time.monotonic
    doing: str = "listing"
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _earlier: tuple[int, int] = (0, 0)  # of the partitions before
    _settled: tuple[int, int] = (0, 0)  # of this one, in rows
    _mark: tuple[int, int] = (0, 0)  # what the flow had counted by then
    _skipped: tuple[int, int] = (0, 0)  # done by earlier tries
    _samples: deque[_Sample] = field(default_factory=deque)
    _estimated_s: float | None = None

    def __post_init__(self) -> None:
        self._start_s, self._paused_before_s = self.clock(), self.flow.paused_s
        self._mark = self.flow.counted()
        self._samples.append(_Sample(0.0, 0, 0, self._mark[1]))

    def begin(self, label: str) -> None:
        """Go on to another partition; those before stay counted."""
        with self._lock:
            self.label, self._earlier, self._settled = label, _sum(self._earlier, self._settled), (0, 0)

    def resume(self, totals: Totals) -> None:
        """Count what an earlier try did of this partition: it says nothing about this one's rate."""
        with self._lock:
            self._settled = self._count(totals)
            self._skipped = _sum(self._skipped, self._settled)

    def settle(self, totals: Totals, waiting: Rows | None = None) -> None:
        """Count what is done of this partition; all that the engine did is in it.

        Args:
            totals: What was counted so far.
            waiting: Rows that are not in the totals yet.
        """
        more = (len(waiting), sum(waiting.sizes)) if waiting else (0, 0)
        with self._lock:
            self._settled, self._mark = _sum(self._count(totals), more), self.flow.counted()

    def count(self, objects: int, size: int = 0) -> None:
        """Count what is done, where no engine does it.

        Args:
            objects: So far.
            size: Of these objects, in bytes.
        """
        with self._lock:
            self._settled = objects, size

    def again(self, objects: int, size: int) -> None:
        """Take back objects that the engine has compared, since it copies them next.

        Args:
            objects: How many.
            size: Of all of them, in bytes.
        """
        with self._lock:
            self._mark = _sum(self._mark, (objects, size))

    def progress(self) -> Progress:
        """Return where the task is now."""
        with self._lock:
            return self._progress()

    @contextmanager
    def told(self, before: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Tell the progress every few seconds while the block lasts, and once more at its end where there was a line.

        Args:
            before: Called before each time.
        """
        ended = threading.Event()

        def work() -> None:
            while not ended.wait(self.every_s):
                before()
                now = self.progress()
                self.tell(now.to_line())
                self.publish(now)

        thread = threading.Thread(target=work, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.publish(replace(self.progress(), state="ended", eta_s=None))

    def _progress(self) -> Progress:
        flow = self.flow
        counted, paused_s = flow.counted(), flow.paused_s - self._paused_before_s
        elapsed_s = self.clock() - self._start_s
        working_s = elapsed_s - paused_s
        objects, size = _sum(_sum(self._earlier, self._settled), _less(counted, self._mark))
        done = _less((objects, size), self._skipped)
        self._samples.append(_Sample(working_s, *done, counted[1]))
        while len(self._samples) > 2 and self._samples[1].at_s <= working_s - _WINDOW_S:
            self._samples.popleft()
        first, last = self._samples[0], self._samples[-1]
        for_s = last.at_s - first.at_s
        rates = [
            max(0.0, (now - then) / for_s) if for_s >= _LEAST_S else 0.0
            for now, then in zip(last[1:], first[1:], strict=True)
        ]
        eta_s = None if flow.paused else _eta_s([(self.objects, objects, rates[0]), (self.bytes, size, rates[1])])
        if eta_s is not None and self._estimated_s is None:
            self._estimated_s = working_s + eta_s
        shares = [100 * count / of for count, of in ((objects, self.objects), (size, self.bytes)) if of]
        return Progress(
            label=self.label,
            state="paused" if flow.paused else "running",
            doing=self.doing,
            because=flow.because,
            objects=objects,
            objects_expected=self.objects or None,
            bytes=size,
            bytes_expected=self.bytes or None,
            percent=round(min(100.0, *shares), 1) if shares else None,
            objects_s=round(rates[0], 1),
            bytes_s=round(rates[2], 1),
            elapsed_s=round(elapsed_s, 1),
            paused_s=round(paused_s, 1),
            eta_s=None if eta_s is None else round(eta_s, 1),
            estimated_s=None if self._estimated_s is None else round(self._estimated_s, 1),
            bandwidth_bytes_s=flow.bandwidth.bytes_s,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def _count(self, totals: Totals) -> tuple[int, int]:
        return (
            totals.objects() - totals.objects(self.uncounted),
            totals.bytes() - totals.bytes(self.uncounted),
        )


def _eta_s(parts: list[tuple[int, int, float]]) -> float | None:
    """Return the seconds left: the longest of the parts, each as expected, done, and done a second; None: not known."""
    left = [(max(0, expected - done), rate) for expected, done, rate in parts if expected]
    # Where nothing is left and it still works, the plan had counted less than there is.
    if not any(count for count, _ in left) or any(count and not rate for count, rate in left):
        return None
    return max(count / rate for count, rate in left if count)


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _less(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return max(0, one[0] - other[0]), max(0, one[1] - other[1])


def _of(expected: int | None, form: str) -> str:
    return "" if expected is None else f" of {form.format(expected)}"


def estimate_kept(estimated_s: float, took_s: float) -> str:
    """Hold an estimate against what came, both in seconds, as in: estimated 41 s, took 58 s, 1.4 times as long."""
    by = f" ({ratio(estimated_s, took_s)})" if estimated_s >= 1 else ""
    return f"estimated {duration(estimated_s)}, took {duration(took_s)}{by}"


def ratio(estimated_s: float, took_s: float) -> str:
    """Format by how much an estimate was off; 1 is exact."""
    return f"{took_s / estimated_s:.1f}×"  # noqa: RUF001 - a sign for people


def duration(seconds: float) -> str:
    """Format seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def sized(size: float) -> str:
    """Format bytes for people."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, (int(size).bit_length() - 1) // 10))
    return f"{size / 1024**power:,.{0 if power == 0 else 1}f} {units[power]}"

"""Where to cut the keys of a source into partitions of about the same work, whatever their layout.

The whole source is listed once, by several listers. One that has nothing to do halves what another still has before
it: a listing of one key behind the middle tells whether anything is there. So no layout has to be known beforehand.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from os.path import commonprefix
from typing import NamedTuple

from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.merge import filtered
from include.juicefs_storage.objects.model import KeyRange, Page
from include.juicefs_storage.records import Record

#: A partition holds about so much, whichever comes first.
PARTITION_OBJECTS, PARTITION_BYTES = 250_000, 256 * 2**30
#: Airflow maps a task over so many values at most (core.max_map_length); of more partitions a task takes several.
MAX_TASKS = 1_024
#: So many places to cut at are held in memory; where there are more keys, only every n-th is one.
MAX_SEGMENTS = 262_144
LISTERS = 16
#: How many keys of one LIST a lister looks for in vain before it takes what is left for too little to share.
_PROBES = 24
#: A lister that began so many pages ago has more before it than what looking for its middle costs.
_PAGES_ALONE = 8
_FIRST_STRIDE_BYTES = 4 * 2**20
_ASCII_END, _LAST_CHARACTER = 0x7F, 0x10FFFF


class Segment(NamedTuple):
    """A stretch of keys up to and with `until`, from where the one before ends; cuts fall between two of them."""

    until: str
    objects: int
    bytes: int


class Partition(Record):
    """The keys with `after` < key <= `until`, and what the source had there when it was listed."""

    index: int
    after: str | None
    until: str | None
    objects: int
    bytes: int
    where: str

    @property
    def label(self) -> str:
        """For the grid: where, and how much."""
        return f"{self.index:03} {self.where} {amount(self.objects, self.bytes)}"

    @property
    def keys(self) -> KeyRange:
        """The range."""
        return KeyRange(self.after, self.until)

    @property
    def name(self) -> str:
        """Of its manifest."""
        return f"{self.index:05}"


@dataclass
class Ruler:
    """Cut candidates and what lies between them; at most MAX_SEGMENTS, however many keys are added.

    Thread-safe as a whole is none of its concern: the caller holds a lock.
    """

    most: int = MAX_SEGMENTS
    stride: int = 1
    stride_bytes: int = _FIRST_STRIDE_BYTES
    _tracks: list[list[Segment]] = field(default_factory=list)
    _held: int = 0

    def track(self) -> list[Segment]:
        """A new list of segments, for keys that are added in order."""
        self._tracks.append([])
        return self._tracks[-1]

    def add_page(self, track: list[Segment], page: Page) -> None:
        """Add keys that follow those of the track."""
        keys, sizes, _ = page
        total, count = sum(sizes), len(keys)
        step = min(self.stride, max(1, count * self.stride_bytes // total) if total else count)
        if step >= count:
            self.add(track, Segment(keys[-1], count, total))
            return
        for first in range(0, count, step):
            last = min(first + step, count)
            self.add(track, Segment(keys[last - 1], last - first, sum(sizes[first:last])))

    def add(self, track: list[Segment], segment: Segment) -> None:
        """Add what is known of a stretch of keys that follows those of the track."""
        if track and self._fits(track[-1], segment):
            track[-1] = _joined(track[-1], segment)
            return
        track.append(segment)
        self._held += 1
        if self._held > self.most:
            self._thin()

    def segments(self) -> list[Segment]:
        """All of them, ordered by key."""
        return sorted(segment for track in self._tracks for segment in track)

    def _fits(self, one: Segment, other: Segment) -> bool:
        return one.objects + other.objects <= self.stride and one.bytes + other.bytes <= self.stride_bytes

    def _thin(self) -> None:
        while self._held > self.most // 2:
            self.stride *= 2
            self.stride_bytes *= 2
            for track in self._tracks:
                kept: list[Segment] = []
                for segment in track:
                    if kept and self._fits(kept[-1], segment):
                        kept[-1] = _joined(kept[-1], segment)
                    else:
                        kept.append(segment)
                track[:] = kept
            self._held = sum(map(len, self._tracks))


def _joined(one: Segment, other: Segment) -> Segment:
    return Segment(other.until, one.objects + other.objects, one.bytes + other.bytes)


@dataclass(eq=False)
class _Stretch:
    """What one lister has before it: keys after `at` up to `until`, which another may bring nearer."""

    at: str | None
    until: str | None
    track: list[Segment]
    pages: int = 0
    split: bool = False  # somebody looks for its middle, or there was nothing to share

    def span(self) -> tuple[int, int]:
        """Sorts the widest first: what little of the key has been settled yet, then the distance of what follows."""
        shared = _shared(self.at or "", self.until) if self.until is not None else 0
        low, high = (self.at or "")[shared : shared + 1], (self.until or "")[shared : shared + 1]
        return shared, -((ord(high) if high else _LAST_CHARACTER) - (ord(low) if low else 0))


@dataclass
class Survey:
    """Lists a range of a source completely, several stretches at once, and keeps cut candidates.

    Memory is bounded by MAX_SEGMENTS and one page a lister.
    """

    side: Bucket
    taken: Callable[[str], object] | None = None
    listers: int = LISTERS
    tell: Callable[[str], None] = lambda _: None
    ruler: Ruler = field(default_factory=Ruler)
    calls: int = 0
    objects: int = 0
    bytes: int = 0
    _busy: list[_Stretch] = field(default_factory=list)
    _todo: list[_Stretch] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _error: BaseException | None = None
    _told: float = field(default_factory=time.monotonic)

    def run(self, keys: KeyRange) -> list[Segment]:
        """List, and return the segments in order.

        Raises:
            PermanentError: The store refuses the listing.
            TransientError: The store does not answer.
        """
        self._todo = [_Stretch(keys.after, keys.until, self.ruler.track())]
        with ThreadPoolExecutor(self.listers) as pool:
            for done in [pool.submit(self._work) for _ in range(self.listers)]:
                done.result()
        return self.ruler.segments()

    def _work(self) -> None:
        try:
            while stretch := self._next():
                self._list(stretch)
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()
            raise

    def _next(self) -> _Stretch | None:
        """Something to list: what waits, else half of what another has; None when all is done."""
        while True:
            with self._changed:
                while not self._todo:
                    if self._error or not self._busy:
                        self._changed.notify_all()
                        return None
                    ready = [stretch for stretch in self._busy if not stretch.split and stretch.pages >= _PAGES_ALONE]
                    if ready:
                        victim = min(ready, key=_Stretch.span)
                        victim.split = True
                        break
                    self._changed.wait()
                else:
                    stretch = self._todo.pop()
                    self._busy.append(stretch)
                    return stretch
            self._share(victim)

    def _share(self, victim: _Stretch) -> None:
        """Cut off the upper half of what a lister has before it."""

        def first_after(key: str) -> str | None:
            with self._changed:
                if victim not in self._busy:
                    return None  # it is done: nobody will use the answer
                self.calls += 1
            return self.side.first_after(key)

        middle, until = find_cut(first_after, victim.at or "", victim.until)
        with self._changed:
            if middle is not None and victim in self._busy:
                victim.until = until
                # It may have gone past the middle meanwhile; where not, it lists up to there.
                if (victim.at or "") < middle:
                    self._todo.append(_Stretch(middle, victim.until, self.ruler.track()))
                    victim.until = middle
                victim.split, victim.pages = False, 0
            self._changed.notify_all()

    def _list(self, stretch: _Stretch) -> None:
        for page in self.side.pages(KeyRange(stretch.at, stretch.until)):
            with self._changed:
                if self._error:
                    return
                self.calls += 1
                if not page.keys:
                    continue
                until = stretch.until
                beyond = until is not None and page.keys[-1] > until
                end = bisect_right(page.keys, until) if beyond and until is not None else len(page.keys)
                self._add(stretch, Page(page.keys[:end], page.sizes[:end], page.etags[:end]) if beyond else page)
                stretch.at = page.keys[-1]
                stretch.pages += 1
                self._changed.notify_all()
            if beyond:
                break
        with self._changed:
            self._busy.remove(stretch)
            self._changed.notify_all()

    def _add(self, stretch: _Stretch, page: Page) -> None:
        for kept in filtered(iter((page,)), self.taken):
            if kept.keys:
                self.objects += len(kept.keys)
                self.bytes += sum(kept.sizes)
                self.ruler.add_page(stretch.track, kept)
        if time.monotonic() - self._told > 5:
            self._told = time.monotonic()
            self.tell(f"listed {self.objects:,} objects, {self.bytes / 2**30:,.1f} GiB, with {self.calls:,} requests")


def find_cut(first_after: Callable[[str], str | None], low: str, high: str | None) -> tuple[str | None, str | None]:
    """Find a place near the middle of a range, with keys behind it.

    Halves what the first characters that are not settled may be. Where all keys share more than the range says, the
    length of what they share is found by halving too.

    Args:
        first_after: As in model.Side: one LIST of one key.
        low: The range begins after this key.
        high: The range ends with it; None: no end.

    Returns:
        The place, None where there is too little to be worth one; and an end of the range that may be nearer.
    """
    cut, behind, most = None, "", len(low)
    for _ in range(_PROBES):
        final = True
        if high is None:
            middle = chr(_ASCII_END if low < chr(_ASCII_END) else _LAST_CHARACTER)
        else:
            same = _shared(low, high)
            one, other = _code(low, same), _code(high, same)
            if other - one > 1:
                middle = low[:same] + _character((one + other) // 2)
            elif len(high) > same + 1:
                middle = high[: same + 1]
            elif other <= 0 or (same + 1 >= most and not behind):
                break  # what is left begins with all of `low`
            elif behind and most <= same:
                break  # nothing is behind the cut but the end itself
            else:
                # Everything left begins with `low[: same + 1]`, and something differs in the character at `most`, if
                # not before.
                place = (same + 1 + most) // 2 if same + 1 < most else most
                final = place in (same + 1, most)
                code = _code(behind if place == most and behind else low, place)
                end = _ASCII_END if code < _ASCII_END - 1 else _LAST_CHARACTER
                middle = low[:place] + _character((code + end + 1) // 2)
        if high is not None and middle >= high:
            break  # what is behind `low` begins with the end itself
        found = first_after(middle)
        if found is None or (high is not None and found > high):
            high = middle
        elif final:
            return middle, high
        else:
            cut, behind, most = middle, found, _shared(low, found)
    return cut, high


def _shared(one: str, other: str) -> int:
    """How many characters two keys begin with alike."""
    return len(commonprefix([one, other]))  # noqa: RUF071  (characters it is, not path components)


def _code(text: str, place: int) -> int:
    return ord(text[place]) if place < len(text) else -1


def _character(code: int) -> str:
    # Surrogates are no characters, and have no UTF-8.
    return chr(code if not 0xD800 <= code <= 0xDFFF else 0xE000)


def cut(segments: Sequence[Segment], keys: KeyRange, count: int | None = None) -> list[Partition]:
    """Cut a range into partitions of about the same work.

    Args:
        segments: What was found there, in order.
        keys: The range; together the partitions hold all of it, also where nothing was found.
        count: How many; None: as many as PARTITION_OBJECTS and PARTITION_BYTES ask for. There may be fewer.
    """
    loads = [max(each.objects / PARTITION_OBJECTS, each.bytes / PARTITION_BYTES) for each in segments]
    total = sum(loads)
    wanted = count or max(1, math.ceil(total))
    groups: list[list[Segment]] = [[]]
    done = 0.0
    for segment, load in zip(segments, loads, strict=True):
        # Cut where the share is reached, before or after this segment, whichever is nearer.
        share = total * len(groups) / wanted
        if groups[-1] and len(groups) < wanted and done + load / 2 > share:
            groups.append([])
        groups[-1].append(segment)
        done += load
    partitions: list[Partition] = []
    for index, group in enumerate(groups):
        after = groups[index - 1][-1].until if index else keys.after
        until = group[-1].until if index < len(groups) - 1 else keys.until
        objects, size = sum(each.objects for each in group), sum(each.bytes for each in group)
        where = _where(after, group[0].until if group else None)
        partitions.append(Partition(index=index, after=after, until=until, objects=objects, bytes=size, where=where))
    return partitions


def _where(after: str | None, first: str | None) -> str:
    """Where a partition begins, for people: no more of the key than tells it from the next."""
    if first is None:
        return "all keys"
    same = _shared(after or "", first)
    text = first[: max(same + 1, 12)] if len(first) > 24 else first
    # No braces: the text goes where Airflow renders templates.
    shown = "".join(char if char.isprintable() and char not in "{}" else "?" for char in text[-40:])
    return f"{'…' if len(text) > 40 else ''}{shown}{'…' if text != first else ''}"


def amount(objects: int, size: int) -> str:
    """Objects and bytes for people."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = min(len(units) - 1, max(0, (size.bit_length() - 1) // 10))
    return f"{objects:,} objects, {size / 1024**power:,.{0 if power == 0 else 1}f} {units[power]}"


def shards(partitions: Sequence[Partition], most: int = MAX_TASKS) -> list[list[int]]:
    """The partitions of each task, by index: one each, or neighbours together where there are too many for that."""
    each = math.ceil(len(partitions) / most)
    ordered = iter(partition.index for partition in partitions)
    return [group for _ in partitions if (group := list(islice(ordered, each)))]

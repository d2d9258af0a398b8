"""Where the keys of a source may be cut, and how much lies between: bounded memory, however many keys are added."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from include.juicefs_storage.objects.model import Page

#: So many places to cut at are held in memory; where there are more keys, only every n-th is one.
MAX_SEGMENTS = 262_144
_FIRST_STRIDE_BYTES = 4 * 2**20


class Segment(NamedTuple):
    """The keys from the end of the segment before up to and with `until`. Cuts fall between two segments."""

    until: str
    objects: int
    bytes: int


def most_segments(shares: int) -> int:
    """Return how many segments a survey may hold which begins a listing, or lists one of so many shares of the rest."""
    return MAX_SEGMENTS // (shares + 1)


@dataclass
class Ruler:
    """Collects segments; joins neighbours so that at most `most` are held, beside one of each track.

    Not thread-safe; callers hold a lock.
    """

    most: int = MAX_SEGMENTS
    stride: int = 1
    stride_bytes: int = _FIRST_STRIDE_BYTES
    _tracks: list[list[Segment]] = field(default_factory=list)
    _held: int = 0

    def track(self) -> list[Segment]:
        """Begin a list of segments, for keys that are added in order."""
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
        """Add a segment that follows those of the track."""
        if track and self._fits(track[-1], segment):
            track[-1] = _joined(track[-1], segment)
            return
        track.append(segment)
        self._held += 1
        if self._spare() > self.most:
            self._thin()

    def shrink(self, most: int) -> None:
        """Hold no more than so many from now on."""
        self.most = most
        if self._spare() > self.most:
            self._thin()

    def segments(self) -> list[Segment]:
        """Return the segments of all tracks, ordered by key."""
        return sorted(segment for track in self._tracks for segment in track)

    def _fits(self, one: Segment, other: Segment) -> bool:
        return one.objects + other.objects <= self.stride and one.bytes + other.bytes <= self.stride_bytes

    def _spare(self) -> int:
        # What is in two tracks cannot be joined: other keys may lie between.
        return self._held - len(self._tracks)

    def _thin(self) -> None:
        while self._spare() > self.most // 2:
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

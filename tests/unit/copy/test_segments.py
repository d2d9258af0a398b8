"""Places to cut at are kept in bounded memory."""

from __future__ import annotations

from include.juicefs_storage.copy.partitions import cut_partitions
from include.juicefs_storage.copy.segments import Ruler, Segment
from include.juicefs_storage.objects.model import KeyRange


def test_memory_is_bounded_by_thinning() -> None:
    ruler = Ruler(most=1000)
    track = ruler.track()
    for number in range(200_000):
        ruler.add(track, Segment(f"{number:09}", 1, 5))
    segments = ruler.segments()
    assert 400 < len(segments) <= 1000
    assert sum(segment.objects for segment in segments) == 200_000
    partitions = cut_partitions(segments, KeyRange(), 20)
    assert max(partition.objects for partition in partitions) < 1.1 * min(partition.objects for partition in partitions)


def test_what_lies_in_two_tracks_is_never_joined() -> None:
    """Between two ranges that were listed there may be keys that another survey lists."""
    ruler = Ruler()
    for name in "abcd":
        track = ruler.track()
        for number in range(100):
            ruler.add(track, Segment(f"{name}{number:03}", 1, 5))
    ruler.shrink(2)
    segments = ruler.segments()
    assert len(segments) <= 6
    assert {segment.until for segment in segments} >= {"a099", "b099", "c099", "d099"}
    assert sum(segment.objects for segment in segments if segment.until.startswith("a")) == 100

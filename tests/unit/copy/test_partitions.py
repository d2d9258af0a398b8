"""Partitions cover every key once and are of about the same work, whatever the layout."""

from __future__ import annotations

import hashlib
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from include.juicefs_storage.copy.partitions import (
    PARTITION_OBJECTS,
    Partition,
    Ruler,
    Segment,
    Survey,
    cut,
    find_cut,
    shards,
)
from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.objects.model import KeyRange, Page
from tests.support.copy_fakes import MemoryBucket

MIB = 2**20
KEY = st.text(st.sampled_from("ab/9\u00e4\uffff"), min_size=1, max_size=8)


class ListingSide(MemoryBucket):
    """Keys and sizes alone, sorted once; a LIST takes some time, as a real one does."""

    def __init__(self, sizes: dict[str, int], page_keys: int = 100, latency_s: float = 0.0) -> None:
        super().__init__(page_keys=page_keys)
        self.sizes, self.ordered, self.latency_s = sizes, sorted(sizes), latency_s
        self.at_once: set[int] = set()
        self.most_at_once = 0

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        at = bisect_right(self.ordered, keys.after) if keys.after is not None else 0
        end = bisect_right(self.ordered, keys.until) if keys.until is not None else len(self.ordered)
        while at < end:
            self.at_once.add(threading.get_ident())
            self.most_at_once = max(self.most_at_once, len(self.at_once))
            time.sleep(self.latency_s)
            self.at_once.discard(threading.get_ident())
            found = self.ordered[at : min(end, at + self.page_keys)]
            yield Page(found, [self.sizes[key] for key in found], [""] * len(found))
            at += len(found)

    def first_after(self, key: str) -> str | None:
        time.sleep(self.latency_s)
        at = bisect_right(self.ordered, key)
        return self.ordered[at] if at < len(self.ordered) else None


def juicefs(blocks: int, *, hashed: bool) -> dict[str, int]:
    def head(i: int) -> str:
        return f"{i % 256:02X}/{i // 10**6}" if hashed else f"{i // 10**6}/{i // 10**3}"

    return {f"chunks/{head(i)}/{i}_0_4194304": 4 * MIB for i in range(1, blocks)} | {"juicefs_uuid": 36}


LAYOUTS = {
    "juicefs": juicefs(20_000, hashed=False),
    "juicefs with HashPrefix": juicefs(20_000, hashed=True),
    "one flat prefix": {f"data/{number:012}": 100 for number in range(20_000)},
    "deep trees": {f"a/very/deep/tree/of/{n % 7}/{n % 11}/{n % 13}/{n}.bin": n for n in range(20_000)},
    "random names": {hashlib.sha256(b"%d" % n).hexdigest(): n % 1000 for n in range(20_000)},
    "unicode": {f"päth/{chr(0x4E00 + n % 5000)}/{n}": 10 for n in range(20_000)},
    "few keys": {"a": 1, "b": 2},
    "nothing": {},
}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_any_layout_is_covered_once_and_balanced(layout: str) -> None:
    sizes = LAYOUTS[layout]
    side = ListingSide(sizes)
    survey = Survey(side, listers=8)
    segments = survey.run(KeyRange())
    assert (survey.objects, survey.bytes) == (len(sizes), sum(sizes.values()))
    partitions = cut(segments, KeyRange(), 16)
    assert_covered(partitions, sizes)
    if len(sizes) > 16:
        assert len(partitions) == 16
        loads = [partition.objects for partition in partitions]
        assert max(loads) <= 1.1 * len(sizes) / 16 + 1
    assert survey.calls <= len(sizes) // 100 + 1000


def assert_covered(partitions: list[Partition], sizes: dict[str, int], keys: KeyRange | None = None) -> None:
    """No gap, no overlap, and each says what is in it."""
    whole = keys or KeyRange()
    assert (partitions[0].after, partitions[-1].until) == (whole.after, whole.until)
    assert [one.until for one in partitions[:-1]] == [other.after for other in partitions[1:]]
    assert all(one.until is not None for one in partitions[:-1])
    assert all(str(one.until) < str(other.until) for one, other in pairwise(partitions[:-1]))
    for partition in partitions:
        inside = [
            size
            for key, size in sizes.items()
            if (partition.after is None or key > partition.after)
            and (partition.until is None or key <= partition.until)
        ]
        assert (partition.objects, partition.bytes) == (len(inside), sum(inside))


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda key: key.isprintable()), st.integers(0, 10**9)),
    st.integers(1, 20),
    st.integers(1, 5),
)
def test_no_key_is_lost_or_listed_twice(sizes: dict[str, int], count: int, page_keys: int) -> None:
    survey = Survey(ListingSide(sizes, page_keys), listers=4)
    partitions = cut(survey.run(KeyRange()), KeyRange(), count)
    assert survey.objects == len(sizes)
    assert_covered(partitions, sizes)


def test_listers_share_the_work() -> None:
    side = ListingSide(LAYOUTS["juicefs"], 50, latency_s=0.005)
    survey = Survey(side, listers=8)
    survey.run(KeyRange())
    assert survey.objects == 20_000
    assert side.most_at_once == 8


@settings(max_examples=500, deadline=None)
@example({"a99", "b", "b9"}, "a99", "b")
@given(st.sets(KEY, min_size=2), KEY, st.none() | KEY)
def test_a_cut_has_keys_behind_it(keys: set[str], low: str, high: str | None) -> None:
    assume(high is None or low < high)
    ordered = sorted(keys)
    side = ListingSide(dict.fromkeys(keys, 1))
    middle, nearer = find_cut(side.first_after, low, high)
    remaining = [key for key in ordered if key > low and (high is None or key <= high)]
    assert [key for key in ordered if key > low and (nearer is None or key <= nearer)] == remaining
    if middle is not None:
        assert low < middle
        assert any(key > middle for key in remaining)


def test_big_objects_weigh_by_their_bytes() -> None:
    sizes = {f"a{number:04}": 1 for number in range(1000)} | {f"b{number}": 128 * 2**30 for number in range(8)}
    partitions = cut(Survey(ListingSide(sizes)).run(KeyRange()), KeyRange())
    assert len(partitions) == 5
    assert_covered(partitions, sizes)
    assert max(partition.bytes for partition in partitions) <= 256 * 2**30 + 1000


def test_memory_is_bounded_by_thinning() -> None:
    ruler = Ruler(most=1000)
    track = ruler.track()
    for number in range(200_000):
        ruler.add(track, Segment(f"{number:09}", 1, 5))
    segments = ruler.segments()
    assert 400 < len(segments) <= 1000
    assert sum(segment.objects for segment in segments) == 200_000
    partitions = cut(segments, KeyRange(), 20)
    assert max(partition.objects for partition in partitions) < 1.1 * min(partition.objects for partition in partitions)


def test_the_default_is_a_quarter_of_a_million_objects() -> None:
    segments = [Segment(f"{number:05}", 1000, 1) for number in range(2_001)]
    partitions = cut(segments, KeyRange())
    assert len(partitions) == 9
    assert max(partition.objects for partition in partitions) <= PARTITION_OBJECTS


def test_a_range_of_keys_is_all_that_is_cut() -> None:
    sizes = {f"{number:04}": 1 for number in range(1000)}
    keys = KeyRange("0099", "0199x")
    survey = Survey(ListingSide(sizes, 10), taken=lambda key: not key.endswith("5"), listers=4)
    partitions = cut(survey.run(keys), keys, 4)
    taken = {key: size for key, size in sizes.items() if "0099" < key <= "0199x" and not key.endswith("5")}
    assert_covered(partitions, taken, keys)
    assert survey.objects == 90


def test_labels_say_where_and_how_much() -> None:
    partitions = cut(Survey(ListingSide(LAYOUTS["juicefs"])).run(KeyRange()), KeyRange(), 4)
    assert partitions[1].label.startswith("001 chunks/0/")
    assert "5,000 objects, 19.5 GiB" in partitions[1].label
    assert len({partition.label for partition in partitions}) == 4


def test_a_hostile_key_makes_no_template_of_a_label() -> None:
    (partition,) = cut([Segment("{{ 1/0 }}\n\u202e", 1, 1)], KeyRange())
    assert partition.label == "000 ?? 1/0 ???? 1 objects, 1 B"


def test_more_partitions_than_airflow_maps_share_tasks() -> None:
    partitions = cut([Segment(f"{number:05}", 250_000, 0) for number in range(4000)], KeyRange())
    grouped = shards(partitions)
    assert len(partitions) == 4000
    assert len(grouped) <= 1024
    assert [index for group in grouped for index in group] == list(range(4000))
    assert shards(partitions[:3]) == [[0], [1], [2]]
    assert shards([]) == []


def test_a_store_that_fails_ends_the_survey() -> None:
    class Failing(ListingSide):
        def pages(self, keys: KeyRange) -> Iterator[Page]:
            yield from super().pages(KeyRange(keys.after, "chunks/0/10/"))
            raise TransientError("down")

    with pytest.raises(TransientError, match="down"):
        Survey(Failing(LAYOUTS["juicefs"]), listers=4).run(KeyRange())


def test_a_cut_does_not_move_the_end_of_a_range_outwards() -> None:
    keys = {"/", "9", "99", "999", "9999", "99999", "999999", "9a", "a", "a99", "b", "b9"}
    _, end = find_cut(ListingSide(dict.fromkeys(keys, 1)).first_after, "a99", "b")
    assert end is not None
    assert end <= "b"

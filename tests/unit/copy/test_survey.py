"""A source is listed completely and once by several listers, whatever its layout."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.copy.partitions import Partition, cut_partitions
from include.juicefs_storage.copy.segments import Ruler
from include.juicefs_storage.copy.survey import Survey, share_out
from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.objects.flow import Flow
from include.juicefs_storage.objects.model import KeyRange, Page
from lab.process import wait_for
from tests.support.copy_fakes import ListingBucket, assert_covered

MIB = 2**20


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
    side = ListingBucket(sizes)
    survey = Survey(side, listers=8)
    segments = survey.run(KeyRange())
    assert (survey.objects, survey.bytes) == (len(sizes), sum(sizes.values()))
    partitions = cut_partitions(segments, KeyRange(), 16)
    assert_covered(partitions, sizes)
    if len(sizes) > 16:
        assert len(partitions) == 16
        loads = [partition.objects for partition in partitions]
        assert max(loads) <= 1.1 * len(sizes) / 16 + 1
    assert survey.calls <= len(sizes) // 100 + 1000


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda key: key.isprintable()), st.integers(0, 10**9)),
    st.integers(1, 20),
    st.integers(1, 5),
)
def test_no_key_is_lost_or_listed_twice(sizes: dict[str, int], count: int, page_keys: int) -> None:
    survey = Survey(ListingBucket(sizes, page_keys), listers=4)
    partitions = cut_partitions(survey.run(KeyRange()), KeyRange(), count)
    assert survey.objects == len(sizes)
    assert_covered(partitions, sizes)


def test_listers_share_the_work() -> None:
    side = ListingBucket(LAYOUTS["juicefs"], 50, latency_s=0.005)
    survey = Survey(side, listers=8)
    survey.run(KeyRange())
    assert survey.objects == 20_000
    assert side.most_at_once == 8


def test_a_survey_tells_how_far_it_is_and_asks_nothing_in_a_pause() -> None:
    side, flow, told = ListingBucket(LAYOUTS["juicefs"], 50), Flow(), list[tuple[int, int]]()

    def pausing(objects: int, size: int) -> None:
        told.append((objects, size))
        if len(told) == 20:
            flow.pause()

    survey = Survey(side, listers=4, told=pausing, await_resumed=flow.await_resumed)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(survey.run, KeyRange())
        wait_for("the pause", lambda: flow.paused, deadline_s=30)
        # What each lister had asked for by then comes in.
        assert len(told) <= 20 + 4
        assert not run.done()
        flow.resume()
        run.result(30)
    assert told[-1] == (survey.objects, survey.bytes) == (20_000, sum(LAYOUTS["juicefs"].values()))


def test_a_range_of_keys_is_all_that_is_cut_partitions() -> None:
    sizes = {f"{number:04}": 1 for number in range(1000)}
    keys = KeyRange("0099", "0199x")
    survey = Survey(ListingBucket(sizes, 10), keep=lambda key: not key.endswith("5"), listers=4)
    partitions = cut_partitions(survey.run(keys), keys, 4)
    taken = {key: size for key, size in sizes.items() if "0099" < key <= "0199x" and not key.endswith("5")}
    assert_covered(partitions, taken, keys)
    assert survey.objects == 90


def test_labels_say_where_and_how_much() -> None:
    partitions = cut_partitions(Survey(ListingBucket(LAYOUTS["juicefs"])).run(KeyRange()), KeyRange(), 4)
    assert partitions[1].label.startswith("001 chunks/0/")
    assert "5,000 objects, 19.5 GiB" in partitions[1].label
    assert len({partition.label for partition in partitions}) == 4


def test_a_store_that_fails_ends_the_survey() -> None:
    class Failing(ListingBucket):
        def pages(self, keys: KeyRange) -> Iterator[Page]:
            yield from super().pages(KeyRange(keys.after, "chunks/0/10/"))
            raise TransientError("down")

    with pytest.raises(TransientError, match="down"):
        Survey(Failing(LAYOUTS["juicefs"]), listers=4).run(KeyRange())


def planned_by_several(sizes: dict[str, int], alone: int, shares: int, page_keys: int = 100) -> list[Partition]:
    """Partitions of what one survey listed up to so many requests, and others of the rest."""
    side = ListingBucket(sizes, page_keys)
    first = Survey(side, listers=4, most_calls=alone)
    first.run(KeyRange())
    surveys = [first]
    for ranges in share_out(side, first.left, shares) if first.left else ():
        surveys.append(Survey(side, listers=4, ruler=Ruler(1000)))
        surveys[-1].run(*ranges)
    first.ruler.shrink(1000)
    assert sum(survey.objects for survey in surveys) == len(sizes)
    return cut_partitions(sorted(each for survey in surveys for each in survey.ruler.segments()), KeyRange(), 16)


@pytest.mark.parametrize("alone", [0, 30])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_one_survey_leaves_is_listed_by_others_once(layout: str, alone: int) -> None:
    sizes = LAYOUTS[layout]
    partitions = planned_by_several(sizes, alone, 5)
    assert_covered(partitions, sizes)
    if len(sizes) > 16:
        assert max(partition.objects for partition in partitions) <= 1.1 * len(sizes) / 16 + 20


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(min_size=1, max_size=6).filter(lambda key: key.isprintable()), st.integers(0, 10**9)),
    st.integers(0, 6),
    st.integers(1, 5),
)
def test_no_key_is_lost_between_surveys(sizes: dict[str, int], alone: int, shares: int) -> None:
    assert_covered(planned_by_several(sizes, alone, shares, page_keys=2), sizes)


SKEWED = {f"data/{n % (n % 50 + 1):02}/{n}": 1 for n in range(20_000)}


@pytest.mark.parametrize("layout", [*LAYOUTS, "skewed"])
def test_shares_are_of_about_the_same_work(layout: str) -> None:
    sizes = {**LAYOUTS, "skewed": SKEWED}[layout]
    shares = share_out(ListingBucket(sizes), [KeyRange()], 4)
    ordered = sorted(sizes)
    counts = [
        sum(_place(ordered, keys.until, len(sizes)) - _place(ordered, keys.after, 0) for keys in share)
        for share in shares
    ]
    assert sum(counts) == len(sizes)
    assert max(counts) <= 1.5 * len(sizes) / 4 + 2


def _place(ordered: list[str], key: str | None, without: int) -> int:
    return without if key is None else bisect_right(ordered, key)


def test_one_share_is_not_cut() -> None:
    assert share_out(ListingBucket(SKEWED), [KeyRange("data/1"), KeyRange()], 1) == [[KeyRange("data/1"), KeyRange()]]

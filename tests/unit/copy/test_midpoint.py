"""A place near the middle of a range has keys on both sides."""

from __future__ import annotations

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from include.juicefs_storage.copy.midpoint import find_cut
from tests.support.copy_fakes import ListingBucket

KEY = st.text(st.sampled_from("ab/9\u00e4\uffff"), min_size=1, max_size=8)


@settings(max_examples=500, deadline=None)
@example({"a99", "b", "b9"}, "a99", "b")
@given(st.sets(KEY, min_size=2), KEY, st.none() | KEY)
def test_a_cut_has_keys_behind_it(keys: set[str], low: str, high: str | None) -> None:
    assume(high is None or low < high)
    ordered = sorted(keys)
    side = ListingBucket(dict.fromkeys(keys, 1))
    middle, nearer = find_cut(side.first_after, low, high)
    remaining = [key for key in ordered if key > low and (high is None or key <= high)]
    assert [key for key in ordered if key > low and (nearer is None or key <= nearer)] == remaining
    if middle is not None:
        assert low < middle
        assert any(key > middle for key in remaining)


def test_a_cut_does_not_move_the_end_of_a_range_outwards() -> None:
    keys = {"/", "9", "99", "999", "9999", "99999", "999999", "9a", "a", "a99", "b", "b9"}
    _, end = find_cut(ListingBucket(dict.fromkeys(keys, 1)).first_after, "a99", "b")
    assert end is not None
    assert end <= "b"

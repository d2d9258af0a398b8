"""The objects that a volume needs come in the order in which a store lists them, whatever the ids are."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.ports import Session
from include.juicefs_storage.volume.layout import block_objects, shard_of
from include.juicefs_storage.volume.needed import needed_objects, watermark
from tests.support.fakes import FakeMetadata, setting

KIB = 1024
IDS = st.one_of(st.integers(1, 2_000), st.integers(1, 3_000_000), st.integers(1, 2**40))
SLICES = st.dictionaries(IDS, st.integers(1, 200 * KIB), max_size=60)


@pytest.mark.parametrize("hash_prefix", [False, True])
@settings(max_examples=40, deadline=None)
@given(slices=SLICES, first_id=st.one_of(st.just(0), IDS))
def test_as_a_listing_has_them(slices: dict[int, int], first_id: int, hash_prefix: bool) -> None:
    row = setting(BlockSize=64, HashPrefix=hash_prefix)
    metadata = FakeMetadata(row, sorted(slices.items()))

    found = list(needed_objects(metadata, row, first_id))

    expected = {
        key: length
        for slice_id, size in slices.items()
        if slice_id >= first_id
        for key, length in block_objects(row, slice_id, size)
    }
    assert [key for key, _ in found] == sorted(expected)
    assert dict(found) == expected

    sharded = setting(BlockSize=64, HashPrefix=hash_prefix, Shards=3)
    shards = [list(needed_objects(metadata, sharded, first_id, shard)) for shard in range(3)]
    assert sorted(block for shard in shards for block in shard) == sorted(found)
    for number, shard in enumerate(shards):
        assert shard == [block for block in found if shard_of(block[0], 3) == number]


def test_the_hash_that_spreads_keys_over_shards() -> None:
    """The test vectors of FNV-1a, 32 bits (draft-eastlake-fnv, appendix)."""
    whole = 2**32
    assert [shard_of(key, whole) for key in ("", "a", "foobar")] == [0x811C9DC5, 0xE40C292C, 0xBF9CF968]
    assert shard_of("foobar", 3) == 0xBF9CF968 % 3


def test_the_next_delta_begins_before_what_live_clients_may_still_use() -> None:
    sessions = [Session(number, "1.4.2", "h", "/m", datetime.now(UTC)) for number in range(3)]
    assert watermark(FakeMetadata(setting(), [(100_000, 1)], sessions)) == 100_001 - 3 * 4096
    assert watermark(FakeMetadata(setting(), [(100, 1)], sessions)) == 0

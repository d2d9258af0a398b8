"""Which blocks must exist, and what a store lacks."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import pytest

from include.juicefs_storage.adapters.juicefs_command import sync_urls
from include.juicefs_storage.errors import NeedsHumanError, PermanentError, TransientError
from include.juicefs_storage.switch.checks import check_consistency
from include.juicefs_storage.switch.prove_blocks import require_all_blocks
from include.juicefs_storage.volume.comparison import compare_listings, compare_sample, missing_blocks, same_contents
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD, FakeMetadata, FakeStore, setting

MIB = 1 << 20
METADATA = FakeMetadata(setting(), [(number, 100) for number in range(10)])


def test_block_keys():
    assert list(block_objects(setting(), 1_234_567, 9 * MIB)) == [
        ("myjfs/chunks/1/1234/1234567_0_4194304", 4 * MIB),
        ("myjfs/chunks/1/1234/1234567_1_4194304", 4 * MIB),
        ("myjfs/chunks/1/1234/1234567_2_1048576", MIB),
    ]
    assert list(block_objects(setting(HashPrefix=True), 300, 1)) == [("myjfs/chunks/2C/0/300_0_1", 1)]
    assert list(block_objects(setting(), 5, 0)) == []


def test_listings_are_compared_in_the_order_of_s3():
    # In S3's order of UTF-8 bytes "chunks/1/…" stands before "chunks/10/…" and "é" after "z".
    source = FakeStore({"a/10": 1, "a/1/x": 2, "a/z": 3, "a/é": 4, "a/cut": 5})
    target = FakeStore({"a/10": 1, "a/z": 3, "a/é": 4, "a/cut": 4, "a/extra": 9})
    difference = compare_listings(source.list("a/"), target.list("a/"))
    assert (difference.expected, difference.present, difference.missing, difference.different) == (5, 3, 1, 1)
    assert sorted(difference.examples) == ["different: a/cut (4 bytes instead of 5)", "missing: a/1/x"]
    assert difference.extra == 1


def _store_of(slices, setting_row):
    return FakeStore({key: length for one in slices for key, length in block_objects(setting_row, *one)})


def test_a_lost_and_a_cut_block_are_both_seen():
    row, slices = setting(), [(1, 5 * MIB), (2, 100), (3, 100)]
    store = _store_of(slices, row)
    assert missing_blocks(FakeMetadata(row, slices), row, store).missing == 0
    del store.objects["myjfs/chunks/0/0/1_1_1048576"]
    store.objects["myjfs/chunks/0/0/2_0_100"] = 3
    difference = missing_blocks(FakeMetadata(row, slices), row, store)
    assert (difference.expected, difference.present, difference.missing, difference.different) == (4, 2, 1, 1)
    metadata = FakeMetadata(row, slices)
    with pytest.raises(NeedsHumanError, match=r"1 of 4 blocks.*Files of these: /file-1, /file-2\."):
        require_all_blocks(difference, "data", metadata)

    def away(slice_ids: Collection[int]) -> Iterator[tuple[int, str]]:
        raise TransientError("gone")

    metadata.files_of = away
    with pytest.raises(NeedsHumanError, match="1 of 4 blocks"):
        require_all_blocks(difference, "data", metadata)


def test_compressed_blocks_may_have_another_length_but_not_any():
    row, slices = setting(Compression="lz4"), [(1, 4000)]
    store = FakeStore({"myjfs/chunks/0/0/1_0_4000": 60})
    assert missing_blocks(FakeMetadata(row, slices), row, store).different == 0
    store.objects["myjfs/chunks/0/0/1_0_4000"] = 3
    assert missing_blocks(FakeMetadata(row, slices), row, store).different == 1


def test_a_block_deleted_meanwhile_is_not_lost():
    row = setting()
    metadata = FakeMetadata(row, [(1, 100), (2, 100)])
    store = _store_of([(1, 100)], row)

    def exists(key: str) -> bool:
        metadata.rows = [(1, 100)]
        return False

    store.exists = exists
    found = missing_blocks(metadata, row, store)
    assert (found.expected, found.present, found.missing) == (1, 1, 0)


def test_a_block_uploaded_since_the_listing_is_not_lost():
    row = setting()
    metadata, store = FakeMetadata(row, [(1, 100), (2, 100)]), _store_of([(1, 100)], row)
    store.exists = lambda key: True
    found = missing_blocks(metadata, row, store)
    assert (found.expected, found.present, found.missing) == (2, 2, 0)


@pytest.mark.parametrize(
    ("on_target", "catch_up", "level"),
    [(10, True, "ok"), (9, True, "warning"), (9, False, "refusal"), (1, True, "warning"), (0, True, "refusal")],
)
def test_a_copy_that_is_behind_is_a_warning_and_one_that_was_not_made_a_refusal(on_target, catch_up, level):
    row = setting()
    source = _store_of([(number, 100) for number in range(10)], row)
    target = _store_of([(number, 100) for number in range(on_target)], row)
    findings, difference = check_consistency(source, target, row, METADATA, mode="listing", catch_up=catch_up)
    assert [finding.level for finding in findings] == [level]
    assert difference.missing == 10 - on_target


def test_a_block_that_differs_is_refused():
    row = setting()
    source, target = _store_of([(1, 100)], row), _store_of([(1, 100)], row)
    target.objects["myjfs/chunks/0/0/1_0_100"] = 99
    findings, _ = check_consistency(source, target, row, METADATA, mode="listing", catch_up=True)
    assert [finding.level for finding in findings] == ["refusal"]


def _at(url):
    return StorageConfig("minio", url, OLD.access_key, OLD.secret_key)


@pytest.mark.parametrize(
    ("source", "target", "urls"),
    [
        ("http://h:1/a", "http://127.0.0.1:2/b", ["minio://h:1/a/p/", "s3://127.0.0.1:2/b/p/"]),
        ("http://h:1/a", "https://n.example:2/b", ["minio://h:1/a/p/", "s3://b.n.example:2/p/"]),
        ("https://o.example/a", "http://n:2/b.c", ["s3://a.o.example/p/", "minio://n:2/b.c/p/"]),
        ("https://o.example/a", "https://n.example/b", ["eos://a.o.example/p/", "s3://b.n.example/p/"]),
    ],
)
def test_sync_urls_hold_no_keys_and_each_side_has_variables_of_its_own(source, target, urls):
    new = StorageConfig("minio", target, NEW.access_key, NEW.secret_key)
    found, keys = sync_urls(_at(source), new, "p/")
    assert found == urls
    assert sorted(keys.values()) == ["NEWKEY", "OLDKEY", "new-secret-value", "old-secret-value"]


def test_a_bucket_that_juicefs_sync_cannot_address_is_refused():
    with pytest.raises(PermanentError, match="dot in its name"):
        sync_urls(_at("http://h:1/a"), _at("https://n.example:2/b.c"), "p/")


def test_a_sample_holds_no_more_than_was_asked_for_and_sees_contents():
    row, slices = setting(), [(number, 100) for number in range(1, 1001)]
    source, target = _store_of(slices, row), _store_of(slices, row)
    metadata = FakeMetadata(row, slices)
    difference = compare_sample(metadata, row, source, target, 50)
    assert (difference.expected, difference.present) == (50, 50)
    target.contents = dict.fromkeys(target.objects, "something else")
    assert compare_sample(metadata, row, source, target, 50).different == 50
    assert len(compare_sample(metadata, row, source, target, 50).examples) == 5


def test_contents_are_compared_for_every_block_of_the_same_length():
    row, slices = setting(), [(number, 100) for number in range(1, 201)]
    source, target = _store_of(slices, row), _store_of(slices, row)
    (key, _), *_ = block_objects(row, 77, 100)
    target.contents[key] = "something else"
    found = compare_listings(source.list("myjfs/"), target.list("myjfs/"), same_contents(source, target))
    assert (found.expected, found.present, found.different) == (200, 199, 1)
    assert found.examples == [f"different: {key} (content)"]

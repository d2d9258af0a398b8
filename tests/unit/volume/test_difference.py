"""Which blocks a store lacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.objects.bucket import StoredObject
from include.juicefs_storage.switch.prove_blocks import require_all_blocks
from include.juicefs_storage.volume.difference import compare_blocks, compare_sample, missing_blocks
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.setting import Setting
from tests.support.fakes import FakeMetadata, FakeStore, setting

MIB = 1 << 20
ROW = setting()
METADATA = FakeMetadata(ROW, [(number, 100) for number in range(1, 11)])


def key_of(slice_id: int) -> str:
    return f"myjfs/chunks/0/0/{slice_id}_0_100"


def stores() -> tuple[FakeStore, FakeStore]:
    objects = {f"myjfs/chunks/0/0/{number}_0_100": 100 for number in range(1, 11)}
    return FakeStore(dict(objects)), FakeStore(dict(objects))


def test_listings_are_compared_in_the_order_of_s3() -> None:
    # In S3's order of UTF-8 bytes "chunks/1/…" stands before "chunks/10/…" and "é" after "z".
    place = "myjfs/chunks"
    source = FakeStore({f"{place}/{k}": v for k, v in {"10": 1, "1/x": 2, "z": 3, "é": 4, "cut": 5}.items()})
    target = FakeStore({f"{place}/{k}": v for k, v in {"10": 1, "z": 3, "é": 4, "cut": 4, "extra": 9}.items()})
    difference = compare_blocks(FakeMetadata(ROW), ROW, source, target, others=True)
    assert (difference.expected, difference.present, difference.missing, difference.different) == (5, 3, 1, 1)
    assert sorted(difference.examples) == [
        f"different: {place}/cut (5 bytes on the source, 4 on the target)",
        f"missing: {place}/1/x",
    ]
    assert difference.extra == 1


def _store_of(slices: list[tuple[int, int]], setting_row: Setting) -> FakeStore:
    return FakeStore({key: length for one in slices for key, length in block_objects(setting_row, *one)})


class Away(FakeMetadata):
    """Cannot say which files these are."""

    def files_of(self, slice_ids: Collection[int]) -> Iterator[tuple[int, str]]:
        raise TransientError("gone")


def test_a_lost_and_a_cut_block_are_both_seen() -> None:
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

    with pytest.raises(NeedsHumanError, match="1 of 4 blocks"):
        require_all_blocks(difference, "data", Away(row, slices))


def test_compressed_blocks_may_have_another_length_but_not_any() -> None:
    row, slices = setting(Compression="lz4"), [(1, 4000)]
    store = FakeStore({"myjfs/chunks/0/0/1_0_4000": 60})
    assert missing_blocks(FakeMetadata(row, slices), row, store).different == 0
    store.objects["myjfs/chunks/0/0/1_0_4000"] = 3
    assert missing_blocks(FakeMetadata(row, slices), row, store).different == 1


@dataclass
class Late(FakeStore):
    """Something happens when the first listing is done."""

    then: Callable[[], object] = int

    def list(self, prefix: str) -> Iterator[StoredObject]:
        yield from super().list(prefix)
        then, self.then = self.then, int
        then()


def test_a_block_deleted_meanwhile_is_not_lost() -> None:
    row = setting()
    metadata = FakeMetadata(row, [(1, 100), (2, 100)])
    store = Late(_store_of([(1, 100)], row).objects, then=lambda: metadata.rows.remove((2, 100)))
    found = missing_blocks(metadata, row, store)
    assert (found.expected, found.present, found.missing) == (1, 1, 0)


def test_a_block_uploaded_since_the_listing_is_not_lost() -> None:
    row = setting()
    metadata = FakeMetadata(row, [(1, 100), (2, 100)])
    store = Late(_store_of([(1, 100)], row).objects)
    store.then = lambda: store.objects.update(_store_of([(2, 100)], row).objects)
    found = missing_blocks(metadata, row, store)
    assert (found.expected, found.present, found.missing) == (2, 2, 0)


def test_a_block_uploaded_or_deleted_while_the_stores_are_compared_is_not_lost() -> None:
    source, target = stores()
    del source.objects["myjfs/chunks/0/0/3_0_100"], target.objects["myjfs/chunks/0/0/3_0_100"]
    metadata = FakeMetadata(ROW, list(METADATA.rows))
    source = Late(source.objects, then=lambda: metadata.rows.remove((3, 100)))
    difference = compare_blocks(metadata, ROW, source, target)
    assert (difference.expected, difference.present, difference.lost) == (9, 9, 0)


def test_a_sample_holds_no_more_than_was_asked_for_and_sees_contents() -> None:
    row, slices = setting(), [(number, 100) for number in range(1, 1001)]
    source, target = _store_of(slices, row), _store_of(slices, row)
    metadata = FakeMetadata(row, slices)
    difference = compare_sample(metadata, row, source, target, 50)
    assert (difference.expected, difference.present) == (50, 50)
    target.contents = dict.fromkeys(target.objects, "something else")
    assert compare_sample(metadata, row, source, target, 50).different == 50
    assert len(compare_sample(metadata, row, source, target, 50).examples) == 5


def test_contents_are_compared_for_every_block_of_the_same_length() -> None:
    row, slices = setting(), [(number, 100) for number in range(1, 201)]
    metadata, source, target = FakeMetadata(row, slices), _store_of(slices, row), _store_of(slices, row)
    (key, _), *_ = block_objects(row, 77, 100)
    target.contents[key] = "something else"
    found = compare_blocks(metadata, row, source, target, others=True, contents=True)
    assert (found.expected, found.present, found.different) == (200, 199, 1)
    assert found.examples == [f"different: {key} (content)"]


@pytest.mark.parametrize("others", [False, True])
def test_blocks_that_no_file_needs_count_where_that_is_wanted(others: bool) -> None:
    source, target = stores()
    source.objects["myjfs/chunks/0/0/99_0_5"] = 5
    target.objects["myjfs/chunks/0/0/98_0_5"] = 5
    found = compare_blocks(METADATA, ROW, source, target, others=others)
    assert (found.present, found.missing, found.extra) == (10, int(others), 1)
    assert found.newest_extra == (98, "myjfs/chunks/0/0/98_0_5")


@pytest.mark.parametrize("others", [False, True])
def test_what_the_old_store_has_not_whole_is_lost_unless_the_new_one_has_it(others: bool) -> None:
    source, target = stores()
    for number in (2, 3):
        del source.objects[key_of(number)]
    del target.objects[key_of(3)]
    source.objects[key_of(4)] = 7
    found = compare_blocks(METADATA, ROW, source, target, others=others)
    assert (found.expected, found.present, found.lost) == (10, 8, 2)
    assert found.lost_keys == [key_of(3), key_of(4)]
    assert found.examples_of("lost")[0] == f"lost: {key_of(3)}"


def test_as_many_lost_blocks_are_kept_as_are_asked_for() -> None:
    found = compare_blocks(METADATA, ROW, FakeStore(), FakeStore(), keep_lost=7)
    assert (found.lost, len(found.lost_keys), len(found.examples)) == (10, 7, 5)


def test_what_was_lost_before_is_counted_apart_and_nothing_else_is() -> None:
    _, store = stores()
    del store.objects[key_of(3)], store.objects[key_of(5)]
    store.objects[key_of(4)] = 7
    found = missing_blocks(METADATA, ROW, store, {key_of(3), key_of(4)})
    assert (found.expected, found.present, found.missing, found.different, found.lost) == (10, 7, 1, 0, 2)
    require_all_blocks(missing_blocks(METADATA, ROW, store, {key_of(3), key_of(4), key_of(5)}), "data", METADATA)
    with pytest.raises(NeedsHumanError, match=f"1 of 10 blocks.*missing: {key_of(5)}"):
        require_all_blocks(found, "data", METADATA)

"""Which copies are refused before a switch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.objects.bucket import StoredObject
from include.juicefs_storage.objects.no_bucket import NoBucketYet
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.checks import check_consistency
from include.juicefs_storage.switch.params import Consistency
from include.juicefs_storage.volume.checksum import CHECKSUM_HEADER, Crc32c
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.setting import Setting
from tests.support.fakes import FakeMetadata, FakeStore, setting

ROW = setting()
METADATA = FakeMetadata(ROW, [(number, 100) for number in range(1, 11)])


def stores() -> tuple[FakeStore, FakeStore]:
    objects = {f"myjfs/chunks/0/0/{number}_0_100": 100 for number in range(1, 11)}
    return FakeStore(dict(objects)), FakeStore(dict(objects))


def _store_of(slices: list[tuple[int, int]], setting_row: Setting) -> FakeStore:
    return FakeStore({key: length for one in slices for key, length in block_objects(setting_row, *one)})


@pytest.mark.parametrize(
    ("on_target", "catch_up", "level"),
    [(10, True, "ok"), (9, True, "warning"), (9, False, "refusal"), (1, True, "warning"), (0, True, "refusal")],
)
def test_a_copy_that_is_behind_is_a_warning_and_one_that_was_not_made_a_refusal(
    on_target: int, catch_up: bool, level: str
) -> None:
    row, metadata = setting(), FakeMetadata(ROW, [(number, 100) for number in range(10)])
    source = _store_of([(number, 100) for number in range(10)], row)
    target = _store_of([(number, 100) for number in range(on_target)], row)
    findings, difference = check_consistency(source, target, row, metadata, mode="listing", catch_up=catch_up)
    assert [finding.level for finding in findings] == [level]
    assert difference.missing == 10 - on_target


@pytest.mark.parametrize(("catch_up", "level"), [(True, "warning"), (False, "refusal")])
@pytest.mark.parametrize("mode", ["sample", "listing", "metadata", "content", "target", "target_content"])
def test_a_bucket_that_the_run_will_make_lacks_every_block(mode: Consistency, catch_up: bool, level: str) -> None:
    source, _ = stores()
    findings, difference = check_consistency(
        source, NoBucketYet("new"), ROW, METADATA, mode=mode, catch_up=catch_up, new_bucket=True
    )
    assert [finding.level for finding in findings] == [level]
    assert (difference.missing, difference.present) == (10, 0)


def test_a_block_that_differs_is_refused() -> None:
    row = setting()
    source, target = _store_of([(1, 100)], row), _store_of([(1, 100)], row)
    target.objects["myjfs/chunks/0/0/1_0_100"] = 99
    metadata = FakeMetadata(row, [(1, 100)])
    findings, _ = check_consistency(source, target, row, metadata, mode="listing", catch_up=True)
    assert [finding.level for finding in findings] == ["refusal"]


def test_the_switch_refuses_what_is_lost_already_and_names_the_files() -> None:
    source, target = stores()
    for store in (source, target):
        del store.objects["myjfs/chunks/0/0/3_0_100"]
        store.objects["myjfs/chunks/0/0/4_0_100"] = 3
    (finding,), difference = check_consistency(source, target, ROW, METADATA, mode="metadata", catch_up=True)
    assert (difference.expected, difference.present, difference.lost) == (10, 8, 2)
    assert finding.level == "refusal"
    assert "2 blocks that files refer to are not whole" in finding.message
    assert "/file-3, /file-4" in finding.message
    assert "a block of 100 bytes, 3 bytes on the source" in finding.message


def test_the_switch_does_not_care_for_what_no_file_needs() -> None:
    source, target = stores()
    source.objects["myjfs/chunks/0/0/0_0_5"] = 5
    target.objects |= {"myjfs/chunks/0/0/0_1_5": 5}
    del source.objects["myjfs/chunks/0/0/7_0_100"]
    (finding,), difference = check_consistency(source, target, ROW, METADATA, mode="metadata", catch_up=True)
    assert (finding.level, difference.present, difference.extra) == ("ok", 10, 1)
    del target.objects["myjfs/chunks/0/0/8_0_100"]
    target.objects["myjfs/chunks/0/0/9_0_100"] = 99
    found, difference = check_consistency(source, target, ROW, METADATA, mode="metadata", catch_up=True)
    assert [finding.level for finding in found] == ["refusal", "warning"]
    assert (difference.missing, difference.different, difference.lost) == (1, 1, 0)


@pytest.mark.parametrize("mode", ["off", "sample", "listing", "metadata", "content"])
def test_a_block_that_was_lost_long_ago_is_refused_whatever_is_compared(mode: Consistency) -> None:
    source, target = stores()
    for store in (source, target):
        del store.objects["myjfs/chunks/0/0/3_0_100"]
    found, difference = check_consistency(source, target, ROW, METADATA, mode=mode, catch_up=True)
    (refused,) = (finding for finding in found if finding.level == "refusal")
    assert "1 blocks that files refer to are not whole on the old store, such as myjfs/chunks/0/0/3_0_100" in (
        refused.message
    )
    assert "/file-3" in refused.message
    assert "accept_lost_blocks=1" in refused.remedy
    assert difference.lost_keys == ["myjfs/chunks/0/0/3_0_100"]


@pytest.mark.parametrize("mode", ["off", "sample", "listing", "metadata", "content"])
def test_lost_blocks_are_accepted_by_their_number(mode: Consistency) -> None:
    source, target = stores()
    for number in range(1, 8):
        del source.objects[f"myjfs/chunks/0/0/{number}_0_100"], target.objects[f"myjfs/chunks/0/0/{number}_0_100"]

    def check(accepted: int) -> tuple[list[str], int]:
        found, difference = check_consistency(
            source, target, ROW, METADATA, mode=mode, catch_up=True, accept_lost=accepted
        )
        return sorted({finding.level for finding in found}), len(difference.lost_keys)

    assert "refusal" in check(6)[0]
    levels, kept = check(7)
    assert (levels, kept) == (["warning"] if mode == "off" else ["ok", "warning"], 7)


def test_an_old_store_that_does_not_answer_is_refused_unless_nothing_is_to_be_compared() -> None:
    class Away(FakeStore):
        def list(self, prefix: str) -> Iterator[StoredObject]:
            raise TransientError("the old store does not answer", next_step="look at it")

    _, target = stores()
    found, _ = check_consistency(Away(), target, ROW, METADATA, mode="off", catch_up=False)
    assert [finding.level for finding in found] == ["warning", "warning"]
    assert "the old store does not answer" in found[1].message
    with pytest.raises(TransientError):
        check_consistency(Away(), target, ROW, METADATA, mode="listing", catch_up=False)


MOVED = Change(kind="moved")


def with_checksums(store: FakeStore) -> FakeStore:
    """The store as JuiceFS wrote it."""
    for key, size in store.objects.items():
        written = Crc32c()
        written.update(b"." * size)
        store.headers[key] = {CHECKSUM_HEADER: str(written.value)}
    return store


@pytest.mark.parametrize(("mode", "change"), [("target_content", Change()), ("content", MOVED)])
def test_contents_on_the_new_store_alone_are_told_by_the_checksum_of_juicefs(mode: Consistency, change: Change) -> None:
    source, target = stores()
    with_checksums(target)
    found, difference = check_consistency(source, target, ROW, METADATA, mode=mode, catch_up=True, change=change)
    assert difference.present == 10
    assert "all 10 are whole on the new store: 10 by the checksum that JuiceFS left with each" in found[-1].message
    assert found[-1].level == "ok"

    target.contents["myjfs/chunks/0/0/3_0_100"] = "flipped"
    found, _ = check_consistency(source, target, ROW, METADATA, mode=mode, catch_up=True, change=change)
    (refused,) = (finding for finding in found if finding.level == "refusal")
    assert (
        "1 blocks that files refer to are not whole on the new store, such as myjfs/chunks/0/0/3_0_100 (its content"
        in (refused.message)
    )
    assert "Files of these: /file-3." in refused.message
    assert "accept_lost_blocks=1" in refused.remedy
    found, difference = check_consistency(
        source, target, ROW, METADATA, mode=mode, catch_up=True, change=change, accept_lost=1
    )
    assert "refusal" not in {finding.level for finding in found}
    assert (difference.lost, difference.lost_keys) == (1, ["myjfs/chunks/0/0/3_0_100"])


def test_what_has_no_checksum_is_read_and_counted_in_a_warning() -> None:
    source, target = stores()
    with_checksums(target)
    for number in (3, 4):
        del target.headers[f"myjfs/chunks/0/0/{number}_0_100"]
    (whole, untold), _ = check_consistency(source, target, ROW, METADATA, mode="target_content", catch_up=True)
    assert "8 by the checksum that JuiceFS left with each, 2 by their length alone" in whole.message
    assert untold.level == "warning"
    assert untold.message.startswith("2 blocks were read in full")


def test_a_damaged_block_is_refused_though_others_are_only_missing_and_will_be_copied() -> None:
    source, target = stores()
    with_checksums(target)
    target.contents["myjfs/chunks/0/0/3_0_100"] = "flipped"
    del target.objects["myjfs/chunks/0/0/4_0_100"], source.objects["myjfs/chunks/0/0/5_0_100"]
    del target.objects["myjfs/chunks/0/0/5_0_100"]

    def check(accepted: int) -> tuple[list[str], list[str]]:
        found, difference = check_consistency(
            source, target, ROW, METADATA, mode="target_content", catch_up=True, accept_lost=accepted
        )
        return [finding.level for finding in found], difference.lost_keys

    assert "refusal" in check(0)[0]
    assert "refusal" in check(1)[0]
    levels, lost = check(2)
    assert set(levels) == {"warning"}
    assert lost == ["myjfs/chunks/0/0/3_0_100", "myjfs/chunks/0/0/5_0_100"]


def test_a_store_that_the_clients_keep_is_not_read() -> None:
    _, target = stores()
    target.contents["myjfs/chunks/0/0/3_0_100"] = "flipped"
    with_checksums(target)
    for mode in ("content", "target_content"):
        (found,), _ = check_consistency(
            target, target, ROW, METADATA, mode=mode, catch_up=True, change=Change(kind="keys")
        )
        assert found.level == "ok"
        assert "by key and size" in found.message

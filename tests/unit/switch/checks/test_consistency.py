"""Which copies are refused before a switch."""

from __future__ import annotations

import pytest

from include.juicefs_storage.switch.checks import check_consistency
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
    row = setting()
    source = _store_of([(number, 100) for number in range(10)], row)
    target = _store_of([(number, 100) for number in range(on_target)], row)
    findings, difference = check_consistency(source, target, row, METADATA, mode="listing", catch_up=catch_up)
    assert [finding.level for finding in findings] == [level]
    assert difference.missing == 10 - on_target


def test_a_block_that_differs_is_refused() -> None:
    row = setting()
    source, target = _store_of([(1, 100)], row), _store_of([(1, 100)], row)
    target.objects["myjfs/chunks/0/0/1_0_100"] = 99
    findings, _ = check_consistency(source, target, row, METADATA, mode="listing", catch_up=True)
    assert [finding.level for finding in findings] == ["refusal"]


def test_the_switch_refuses_what_is_lost_already_and_names_the_files() -> None:
    source, target = stores()
    for store in (source, target):
        del store.objects["myjfs/chunks/0/0/3_0_100"]
        store.objects["myjfs/chunks/0/0/4_0_100"] = 3
    (finding,), difference = check_consistency(source, target, ROW, METADATA, mode="metadata", catch_up=True)
    assert (difference.expected, difference.present, difference.lost) == (10, 8, 2)
    assert finding.level == "refusal"
    assert "2 of 10 blocks" in finding.message
    assert "/file-3, /file-4" in finding.message
    assert "a block of 100 bytes, 3 bytes on the source" in finding.message
    (blind,), _ = check_consistency(source, target, ROW, METADATA, mode="listing", catch_up=True)
    assert blind.level == "ok", "a comparison of two listings cannot see it"


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

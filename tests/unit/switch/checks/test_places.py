"""Backups and logs on what is switched."""

from __future__ import annotations

import pytest

from include.juicefs_storage.ports import Place
from include.juicefs_storage.switch.checks import check_places
from tests.support.fakes import NEW, OLD


@pytest.mark.parametrize(
    ("place", "level", "says"),
    [
        (Place("The folder of backups", "file:///mnt/b", volume="myjfs"), "refusal", "lies on volume myjfs"),
        (Place("The folder of backups", "file:///mnt/b", volume="other"), "warning", "JuiceFS volume other"),
        (
            Place("The folder of backups", "s3://c@b/", store=NEW.bucket.split("/")[2]),
            "warning",
            "a store of this switch",
        ),
        (
            Place("The folder of backups", "s3://c@b/", store=OLD.bucket.split("/")[2]),
            "warning",
            "a store of this switch",
        ),
    ],
)
def test_a_place_on_what_is_switched_is_named(place: Place, level: str, says: str) -> None:
    [finding] = check_places([place], "myjfs", [OLD, NEW])
    assert finding.level == level
    assert says in finding.message


def test_a_disk_and_a_third_store_are_well() -> None:
    places = [Place("Backups", "file:///opt/b"), Place("Backups", "s3://c@b/", store="third:9000")]
    assert check_places(places, "myjfs", [OLD, NEW]) == []

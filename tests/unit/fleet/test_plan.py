"""The plan of a fleet: a canary, then waves."""

from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.fleet.members import Member
from include.juicefs_storage.fleet.params import FleetParams
from include.juicefs_storage.fleet.plan import FleetPlan, make_waves
from include.juicefs_storage.switch.backup import backup_ids
from tests.support.fakes import FakeVault

ALL = {"source_endpoint": "http://old:9000", "target_conn_id": "minio_new"}


def member(key: str, clients: int = 1, **more: Any) -> Member:
    return Member(key=key, secret=f"juicefs/{key}", params={"target_bucket": "data"}, clients=clients, **more)


def plan(members: list[Member], **params: Any) -> FleetPlan:
    fleet = FleetParams.validated(ALL | params)
    waves = make_waves([each for each in members if each.ready], None, fleet.wave_size)
    return FleetPlan(run_id="manual__1+00:00", params=fleet, members=tuple(members), waves=waves)


def test_the_canary_is_the_one_with_the_fewest_clients_but_some() -> None:
    fleet = [member("idle", 0), member("big", 9), member("small", 1), member("mid", 3), member("also", 3)]
    assert make_waves(fleet, None, 2) == (("small",), ("idle", "also"), ("mid", "big"))
    assert make_waves(fleet, "big", 8) == (("big",), ("idle", "small", "also", "mid"))
    assert make_waves([member("idle", 0)], None, 3) == (("idle",),)
    assert make_waves([], None, 3) == ()
    with pytest.raises(PermanentError, match="'gone' is not among"):
        make_waves(fleet, "gone", 2)


def test_the_plan_is_one_table_with_what_blocks_whom() -> None:
    text = plan(
        [
            member("big", 5, before="http://old:9000/data", after="http://new:9000/data", missing=7, warnings=2),
            member("small"),
            member("moved", there=True),
            member("broken", blockers=("volume: It is mounted\nread-only. Remedy: unmount it",)),
            Member(key="unread", secret="juicefs/unread", blockers=("No metadata. Remedy: look.",)),
        ]
    ).to_markdown()
    rows = {
        line.split(" | ")[1].strip("`"): line.strip("| ").split(" | ")
        for line in text.splitlines()
        if "`juicefs/" in line
    }
    assert list(rows) == ["small", "big", "moved", "broken", "unread"]
    assert {key: row[0] for key, row in rows.items()} == {
        "small": "canary", "big": "1", "moved": "already there", "broken": "**blocked**", "unread": "**blocked**",
    }  # fmt: skip
    link = "[plan](juicefs-storage/runs/juicefs_storage_switch/manual__1%2B00%3A00.big.plan/plan)"
    assert rows["big"][3:] == ["`http://old:9000/data`", "`http://new:9000/data`", "5", "7", "2", link]
    assert rows["unread"][-1] == "none"
    assert "- `broken`: volume: It is mounted read-only. Remedy: unmount it" in text
    assert "Move 2 volumes from http://old:9000" in text


def test_the_plan_says_what_will_happen_in_what_order() -> None:
    members = [member("a"), member("b"), member("c")]
    full = plan(members, wave_size=2)
    assert [line.split(":")[0].split(",")[0] for line in full._steps()] == [
        "switch `a`", "ask for approval once more", "switch the others wave by wave",
        "restart the CSI components once", "if a volume fails",
    ]  # fmt: skip
    bare = " ".join(plan(members, approve_after_canary=False, restart_csi=False, on_failure="continue")._steps())
    assert "approval" not in bare
    assert "restart the" not in bare
    assert "continue with the next wave" in bare


def test_what_a_fleet_keeps_is_not_offered_as_a_backup() -> None:
    vault = FakeVault({"_fleet.manual__1": b"{}", "home.run": b"x", "home.run.switched": b"x"})
    assert backup_ids(vault) == ["home.run"]


def test_one_volume_is_one_volume() -> None:
    assert plan([member("a")]).title == "Move 1 volume from http://old:9000"
    assert plan([member("a"), member("b")]).title == "Move 2 volumes from http://old:9000 in waves"

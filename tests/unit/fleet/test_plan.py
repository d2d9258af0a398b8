"""A fleet: who belongs to it, in what order, and whose turn it is."""

from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.fleet.plan import (
    FleetPlan,
    Member,
    VolumeState,
    check_fleet_params,
    found_volume,
    make_waves,
    on_endpoint,
    registered_volume,
    run_of,
    stands,
    unique_keys,
    volumes_by_secret,
    waves_ahead,
    whose_turn,
)
from include.juicefs_storage.ports import SecretObject
from include.juicefs_storage.switch.backup import backup_ids
from tests.support.fakes import FakeVault

ALL = {"source_endpoint": "http://old:9000", "target_conn_id": "minio_new"}
WAVES = (("a",), ("b", "c"), ("d",))


def secret(name: str, volume: str, database: str, *, namespace: str = "juicefs", **more: str) -> SecretObject:
    data = {"name": volume, "metaurl": f"mysql://u:p@(db:3306)/{database}"} | more
    return SecretObject(namespace, name, "1", data={key: value for key, value in data.items() if value})


def member(key: str, clients: int = 1, **more: Any) -> Member:
    return Member(key=key, secret=f"juicefs/{key}", params={"target_bucket": "data"}, clients=clients, **more)


def test_defaults_are_the_safe_ones() -> None:
    params = check_fleet_params(ALL)
    assert (params.dry_run, params.require_approval, params.approve_after_canary) == (True, True, True)
    assert (params.on_failure, params.catch_up, params.consistency) == ("stop", True, "listing")
    assert params.soak_s > 360, "blocks that are committed late are proven too"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, ["expected one of them", "source_endpoint", "volumes"]),
        (ALL | {"volumes": ["home"]}, ["expected one of them"]),
        ({"source_endpoint": "http://old:9000"}, ["`target_conn_id`", "new store's connection"]),
        (ALL | {"source_endpoint": "http://old:9000/data"}, ["`source_endpoint`", "without bucket", "minio.old"]),
        ({"volumes": ["home", "home"]}, ["`volumes`", "each name once", "'home'"]),
        (ALL | {"wave_size": 9}, ["`wave_size`", "8", "found 9"]),
        (ALL | {"soak_s": -1}, ["`soak_s`", "found -1"]),
        (ALL | {"on_failure": "rollback"}, ["`on_failure`", "'stop' or 'continue'"]),
        (ALL | {"bucket": "data"}, ["`bucket`", "not a param", "target_bucket"]),
    ],
)
def test_a_bad_param_is_named(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PermanentError) as refused:
        check_fleet_params(given)
    assert [word for word in words if word not in str(refused.value)] == []


def test_one_volume_for_all_secrets_that_name_it_and_the_drivers_namespace_first() -> None:
    copies = SecretObject(
        "juicefs", "juicefs-pvc-secret", "1", {"juicefs/secret": "true"},
        data={"name": "home", "metaurl": "mysql://u:p@(db:3306)/home"},
    )  # fmt: skip
    found = volumes_by_secret(
        [
            secret("a-copy", "home", "home", namespace="apps", bucket="http://old:9000/data"),
            copies,
            secret("no-bucket", "home", "home"),
            secret("main", "home", "home", bucket="http://old:9000/data"),
            secret("same-name", "home", "other"),
            secret("elsewhere", "work", "work", namespace="apps"),
            secret("no-metadata", "x", "x", metaurl=""),
        ],
        "juicefs",
    )
    assert [(found.namespace, found.name, here) for found, here in found] == [
        ("juicefs", "main", True), ("juicefs", "same-name", True), ("apps", "elsewhere", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://Old:80/", "http://old", True),
        ("https://old:443", "https://old", True),
        ("http://old:9000", "http://old:9001", False),
        ("http://old:9000", "https://old:9000", False),
    ],
)
def test_an_endpoint_is_known_however_it_is_written(one: str, other: str, same: bool) -> None:
    assert on_endpoint(one, other) is same


def test_the_registry_fills_in_what_the_fleet_leaves_open_and_nothing_is_left_for_later() -> None:
    registry = {
        "home": {"namespace": "fs", "secret_name": "home", "target_conn_id": "c", "target_bucket": "homes"},
        "work": {"meta_conn_id": "work_meta", "secret_name": "work-secret", "target_bucket": "works"},
    }
    params = registered_volume(check_fleet_params({"volumes": ["home"], "settle_s": 50}), registry, "home")
    assert (params.namespace, params.target_conn_id, params.target_bucket) == ("fs", "c", "homes")
    assert (params.settle_s, params.volume) == (50, None)
    fleet = check_fleet_params(ALL)
    work = found_volume(fleet, registry, "work-secret", "olds")
    assert (work.meta_conn_id, work.target_bucket, work.secret_name) == ("work_meta", "works", "work-secret")
    other = found_volume(fleet, registry, "other-secret", "olds")
    assert (other.meta_conn_id, other.target_bucket, other.target_conn_id) == (None, "olds", "minio_new")
    assert (
        found_volume(check_fleet_params(ALL | {"target_bucket": "new"}), registry, "work-secret").target_bucket == "new"
    )
    with pytest.raises(PermanentError, match="registered: home, work"):
        registered_volume(check_fleet_params({"volumes": ["hoem"]}), registry, "hoem")


def test_volumes_of_one_name_are_told_apart() -> None:
    members = [member("home", uuid="11112222-3"), member("work", uuid="x"), member("home", uuid="33334444-5")]
    assert [each.key for each in unique_keys(members)] == ["home-11112222", "work", "home-33334444"]


def test_a_run_of_a_volume_asks_nobody_and_has_an_id_of_its_own() -> None:
    conf = member("home").conf(dry_run=False, restart_csi=False)
    assert conf == {"target_bucket": "data", "dry_run": False, "require_approval": False, "restart_csi": False}
    assert run_of("manual__1", "home") == "manual__1.home"
    assert run_of("manual__1", "home", dry_run=True) == "manual__1.home.plan"


def test_the_canary_is_the_one_with_the_fewest_clients_but_some() -> None:
    fleet = [member("idle", 0), member("big", 9), member("small", 1), member("mid", 3), member("also", 3)]
    assert make_waves(fleet, None, 2) == (("small",), ("idle", "also"), ("mid", "big"))
    assert make_waves(fleet, "big", 8) == (("big",), ("idle", "small", "also", "mid"))
    assert make_waves([member("idle", 0)], None, 3) == (("idle",),)
    assert make_waves([], None, 3) == ()
    with pytest.raises(PermanentError, match="'gone' is not among"):
        make_waves(fleet, "gone", 2)


@pytest.mark.parametrize(
    ("key", "standing", "turn"),
    [
        ("b", {"a": "moved"}, "go"),
        ("b", {"a": "moved", "c": "under way"}, "go"),
        ("b", {"a": "under way"}, "wait"),
        ("d", {"a": "moved", "b": "moved"}, "wait"),
        ("d", {"a": "moved", "b": "moved", "c": "under way"}, "wait"),
        ("d", {"a": "moved", "b": "moved", "c": "moved"}, "go"),
        ("d", {"a": "moved", "b": "failed", "c": "moved"}, "stop"),
        ("d", {"a": "moved", "b": "failed", "c": "under way"}, "stop"),
        ("c", {"a": "moved", "b": "failed"}, "stop"),
        ("c", {"a": "moved", "b": "moved", "d": "failed"}, "stop"),
        # Its own failure, of an earlier try, is no reason not to try again.
        ("b", {"a": "moved", "b": "failed"}, "go"),
    ],
)
def test_a_wave_begins_when_those_before_it_have_ended_well(
    key: str, standing: dict[str, VolumeState], turn: str
) -> None:
    everybody: dict[str, VolumeState] = {"a": "waits", "b": "waits", "c": "waits", "d": "waits", **standing}
    assert whose_turn(WAVES, key, everybody, running=False, on_failure="stop") == turn


@pytest.mark.parametrize(
    ("start", "end", "standing"),
    [
        ("none", "none", "waits"),
        ("up_for_reschedule", "none", "waits"),
        ("success", "none", "under way"),
        ("success", "up_for_reschedule", "under way"),
        ("success", "up_for_retry", "under way"),
        ("success", "success", "moved"),
        ("success", "failed", "failed"),
        ("failed", "upstream_failed", "failed"),
        ("skipped", "skipped", "left out"),
        ("upstream_failed", "upstream_failed", "left out"),
    ],
)
def test_where_a_volume_stands(start: str, end: str, standing: VolumeState) -> None:
    assert stands(start, end) == standing


def test_with_continue_a_wave_waits_for_the_end_of_those_before_it_however_they_end() -> None:
    standing: dict[str, VolumeState] = {"a": "moved", "b": "failed", "c": "under way", "d": "waits"}
    assert whose_turn(WAVES, "d", standing, running=False, on_failure="continue") == "wait"
    standing["c"] = "left out"
    assert whose_turn(WAVES, "d", standing, running=False, on_failure="continue") == "go"


def test_a_run_of_another_wave_that_nobody_watches_any_more_is_waited_for() -> None:
    standing: dict[str, VolumeState] = {"a": "moved", "b": "failed", "c": "moved", "d": "waits"}
    assert whose_turn(WAVES, "d", standing, running=True, on_failure="continue") == "wait"


def test_who_comes_later_knows_how_many_waves_are_ahead() -> None:
    standing: dict[str, VolumeState] = {"a": "moved", "b": "moved", "c": "waits", "d": "waits"}
    assert [waves_ahead(WAVES, key, standing) for key in "abd"] == [0, 0, 1]
    assert waves_ahead(WAVES, "d", dict.fromkeys("abcd", "waits")) == 2


def plan(members: list[Member], **params: Any) -> FleetPlan:
    fleet = check_fleet_params(ALL | params)
    waves = make_waves([each for each in members if each.ready], None, fleet.wave_size)
    return FleetPlan(run_id="manual__1+00:00", params=fleet, members=tuple(members), waves=waves)


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
    assert "go on with the next wave" in bare


def test_what_a_fleet_keeps_is_not_offered_as_a_backup() -> None:
    vault = FakeVault({"_fleet.manual__1": b"{}", "home.run": b"x", "home.run.switched": b"x"})
    assert backup_ids(vault) == ["home.run"]

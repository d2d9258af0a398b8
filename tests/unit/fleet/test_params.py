"""The params of a fleet, and those of its volumes' runs."""

from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.fleet.params import FleetParams, found_volume, registered_volume

ALL = {"source_endpoint": "http://old:9000", "target_conn_id": "minio_new"}


def test_defaults_are_the_safe_ones() -> None:
    params = FleetParams.validated(ALL)
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
        FleetParams.validated(given)
    assert [word for word in words if word not in str(refused.value)] == []


def test_the_registry_fills_in_what_the_fleet_leaves_open_and_nothing_is_left_for_later() -> None:
    registry = {
        "home": {"namespace": "fs", "secret_name": "home", "target_conn_id": "c", "target_bucket": "homes"},
        "work": {"meta_conn_id": "work_meta", "secret_name": "work-secret", "target_bucket": "works"},
    }
    params = registered_volume(FleetParams.validated({"volumes": ["home"], "settle_s": 50}), registry, "home")
    assert (params.namespace, params.target_conn_id, params.target_bucket) == ("fs", "c", "homes")
    assert (params.settle_s, params.volume) == (50, None)
    fleet = FleetParams.validated(ALL)
    work = found_volume(fleet, registry, "work-secret", "olds")
    assert (work.meta_conn_id, work.target_bucket, work.secret_name) == ("work_meta", "works", "work-secret")
    other = found_volume(fleet, registry, "other-secret", "olds")
    assert (other.meta_conn_id, other.target_bucket, other.target_conn_id) == (None, "olds", "minio_new")
    assert (
        found_volume(FleetParams.validated(ALL | {"target_bucket": "new"}), registry, "work-secret").target_bucket
        == "new"
    )
    with pytest.raises(PermanentError, match="registered: home, work"):
        registered_volume(FleetParams.validated({"volumes": ["hoem"]}), registry, "hoem")


@pytest.mark.parametrize("name", sorted(FleetParams.model_fields.keys() - ALL.keys()))
def test_empty_text_is_not_given(name: str) -> None:
    assert FleetParams.validated({**ALL, name: ""}) == FleetParams.validated(ALL)


def test_every_param_that_a_switch_has_too_is_passed_on_save_what_the_fleet_decides() -> None:
    changed = {"namespace": "fs", "consistency": "off", "settle_s": 50, "fence_conn_id": "admin", "late_commit_s": 0}
    params = found_volume(FleetParams.validated(ALL | changed | {"dry_run": False}), {}, "home", "data")
    assert {name: getattr(params, name) for name in changed} == changed
    assert (params.dry_run, params.require_approval, params.on_failure) == (True, True, "rollback")

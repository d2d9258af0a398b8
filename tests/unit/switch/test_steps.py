"""What the plan says will be done."""

from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.switch.change import Change, ChangeKind
from include.juicefs_storage.switch.params import SwitchParams
from include.juicefs_storage.switch.steps import planned_steps


def steps(kind: ChangeKind, **params: Any) -> str:
    given = SwitchParams.model_validate({"target_conn_id": "new", "target_bucket": "bucket", **params})
    return "\n".join(planned_steps(given, Change(kind=kind), "write the setting", ["StatefulSet/c"], ["s"]))


def test_only_between_two_stores_that_serve_is_anything_copied() -> None:
    assert "copy what the new store still lacks" in steps("copied")
    assert "copy what" not in steps("copied", catch_up=False)
    for kind in ("keys", "address", "moved"):
        assert "copy" not in steps(kind)


@pytest.mark.parametrize(("kind", "waits"), [("copied", True), ("moved", True), ("keys", False), ("address", False)])
def test_late_commits_are_waited_for_where_the_clients_leave_a_store(kind: ChangeKind, waits: bool) -> None:
    assert ("committed late" in steps(kind)) is waits
    assert "committed late" not in steps(kind, late_commit_s=0)


def test_a_fence_is_up_during_a_move_and_for_a_moment_in_a_rotation() -> None:
    assert "refuse the clients' writes" in steps("copied", fence_conn_id="admin")
    assert "refuse the old key for a few seconds" in steps("keys", fence_conn_id="admin")
    assert "refuse" not in steps("keys")


def test_the_plan_does_not_promise_a_way_back_to_a_store_that_is_gone() -> None:
    assert steps("copied").endswith("roll back")
    assert "does not serve" in steps("moved")
    assert steps("moved", on_failure="hold").endswith("for a human")


def test_the_restart_of_the_csi_components_says_what_it_is_for() -> None:
    assert "It moves no client" in steps("copied")

"""When the late copy waits, and for how long a follower is waited for."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest
from airflow.sdk.exceptions import AirflowRescheduleException

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.lease import VolumeLeases
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch import copies, proofs
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.difference import Difference
from tests.support.fakes import OLD, FakeStore


@pytest.mark.parametrize("moved", [[], ["prove_clients_on_old"]])
def test_the_late_proof_waits_only_where_a_task_has_proven_the_clients(
    monkeypatch: pytest.MonkeyPatch, moved: list[str]
) -> None:
    """Otherwise it would wait from now on, forever."""
    timing = {"applied_at": datetime.now(UTC).isoformat()}
    monkeypatch.setattr(
        copies, "pull", lambda task, key="return_value": timing if task in moved and key == "timing" else None
    )
    run = SwitchRun(cast("Runtime", SimpleNamespace(params=SimpleNamespace(late_commit_s=60))))
    run.change = Change()
    run.lease = cast("VolumeLeases", SimpleNamespace(renew=lambda: None))
    looked: list[Location] = []

    def find_missing(_: SwitchRun, location: Location) -> Difference:
        looked.append(location)
        return Difference()

    monkeypatch.setattr(proofs, "find_missing", find_missing)
    monkeypatch.setattr(proofs, "require_blocks", lambda run, location, difference: {"blocks": 0})
    location = Location(OLD, cast("Bucket", FakeStore()))
    with pytest.raises(AirflowRescheduleException) if moved else nullcontext():
        copies.catch_up_late(run, location, location, moved_by=("prove_clients_on_old", "settle_again"))
    assert bool(looked) is not bool(moved)


def await_follower(monkeypatch: pytest.MonkeyPatch, states: list[str], *, in_pod: bool, required: bool) -> bool:
    """Wait for a follower whose task has these states, one more each minute; the last one stays."""
    clock = [0.0]

    def state_now(task_id: str) -> dict[str, str]:
        return {task_id: states[min(int(clock[0] // 60), len(states) - 1)]}

    def sleep(_: float) -> None:
        clock[0] += 10

    monkeypatch.setattr(copies, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(copies, "task_states", state_now)
    monkeypatch.setattr(copies, "pull", lambda task_id, key: True)
    monkeypatch.setenv("AIRFLOW_IS_K8S_EXECUTOR_POD", "True" if in_pod else "")
    return copies.await_follower("follow_writes", required=required)


def test_a_pod_that_pulls_its_image_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await_follower(monkeypatch, ["queued"] * 8 + ["running"], in_pod=True, required=True)


def test_nothing_moves_while_the_pod_that_follows_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NeedsHumanError, match="its pod has not started within 900 s"):
        await_follower(monkeypatch, ["queued"], in_pod=True, required=True)


@pytest.mark.parametrize(("in_pod", "required"), [(False, True), (True, False)])
def test_a_follower_without_a_slot_or_on_a_way_back_is_waited_for_a_minute(
    monkeypatch: pytest.MonkeyPatch, in_pod: bool, required: bool
) -> None:
    assert not await_follower(monkeypatch, ["queued", "queued", "running"], in_pod=in_pod, required=required)


def test_a_follower_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not await_follower(monkeypatch, ["success"], in_pod=True, required=True)

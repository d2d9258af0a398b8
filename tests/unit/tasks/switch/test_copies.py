"""When the late copy waits."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest
from airflow.sdk.exceptions import AirflowRescheduleException

from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.lease import VolumeLease
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
    run.lease = cast("VolumeLease", SimpleNamespace(renew=lambda: None))
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

"""Two runs on one volume: the second is refused wherever it is, and a run that lost the volume writes nothing more."""
# ruff: noqa: TID253 (a test may import its client at once)

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from kubernetes import config

from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.switch.lease import VolumeLease, lease_name
from include.juicefs_storage.tasks.switch.judgement import ROLLBACK
from lab.environment import Lab
from lab.writer import Writer
from tests.support.harness import Start, Tell
from tests.support.world import Sides, assert_all_on, assert_nothing_lost, believed, row

OTHER = "juicefs_storage_switch/manual__from_elsewhere"


@pytest.fixture
def other(fault_lab: Lab) -> Iterator[VolumeLease]:
    """A run in another Airflow."""
    cluster = KubernetesCluster(config.new_client_from_config(str(fault_lab.kube.kubeconfig)), "juicefs")
    uuid = fault_lab.mariadb.setting()["UUID"]
    lease = VolumeLease(cluster, lease_name(uuid), OTHER, now=lambda: datetime.now(UTC))
    yield lease
    lease.release()


def take_over(other: VolumeLease) -> Callable[[], None]:
    """Let the holder's Lease expire; the other run takes the volume."""

    def take() -> None:
        lease = other.leases.lease(other.name)
        assert lease
        long_ago = datetime.now(UTC) - timedelta(seconds=lease.duration_s + 1)
        assert other.leases.write_lease(replace(lease, renewed_at=long_ago))
        other.acquire()

    return take


def test_a_volume_that_another_run_holds_is_refused_by_the_checks(
    fault_lab: Lab, sides: Sides, start: Start, other: VolumeLease, tell: Tell
) -> None:
    other.acquire()
    before, requests = row(fault_lab), len(fault_lab.kube.audit())
    run = start()
    outcome = run.go()
    assert outcome == "refused"
    assert f"Run {OTHER} holds this volume since" in run.errors["plan"]
    assert "until" in run.errors["plan"]
    assert "delete lease" in run.errors["plan"]
    assert row(fault_lab) == before
    assert [call for call in fault_lab.kube.audit()[requests:] if call.mutating and call.subresource != "exec"] == []
    tell("check_csi", "another run holds the volume", "-", f"{outcome}, all old")


def test_of_two_runs_that_were_both_approved_the_second_is_refused(
    fault_lab: Lab, sides: Sides, start: Start, other: VolumeLease, tell: Tell
) -> None:
    before = row(fault_lab)
    run = start()
    run.before = {"backup": other.acquire}
    outcome = run.go()
    assert outcome == "failed"
    assert run.failed() == {"backup"}
    assert OTHER in run.errors["backup"]
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.source)
    # It was the other's all the time.
    lease = other.leases.lease(other.name)
    assert lease
    assert lease.holder == OTHER
    tell("backup", "another run took the volume since the checks", "-", f"{outcome}, all old")


def test_a_run_that_lost_the_volume_writes_nothing_more_until_it_has_it_again(
    fault_lab: Lab, sides: Sides, start: Start, writer: Writer, other: VolumeLease, tell: Tell
) -> None:
    run = start()
    held: list[str] = []

    def look() -> None:
        lease = other.leases.lease(other.name)
        held.append(lease.holder if lease else "nobody")

    def steal() -> None:
        look()
        take_over(other)()

    run.before = {"write_setting": look, "patch_secret": steal}
    assert run.go() == "half rolled back"
    assert held == [f"juicefs_storage_switch/{run.run_id}"] * 2
    assert OTHER in run.errors["patch_secret"]
    assert set(ROLLBACK) <= run.failed()
    # As it was left when the volume was lost: the setting moved, the Secret not yet.
    assert believed(fault_lab)["setting"] == {sides.target.name}
    assert believed(fault_lab)["Secret juicefs-sc-secret"] == {sides.source.name}

    other.release()
    run.before = {}
    run.clear(ROLLBACK[0], downstream=True)
    outcome = run.go()
    writer.stop()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)
    look()
    assert held[-1] == "", "a run that has ended gives the volume back"
    tell("patch_secret", "another run took the volume over", "rollback cleared when it was free", f"{outcome}, all old")

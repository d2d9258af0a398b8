"""A volume's Lease on an API server: two runs that race, conflicts that are real, answers that are lost."""
# ruff: noqa: TID253 (a test may import its client at once)

from __future__ import annotations

import multiprocessing
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from kubernetes import config

from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.switch.lease import VolumeLease
from lab.kube.client import KubeServer
from lab.process import binary, wait_for

NS = "juicefs"
ROUNDS = 12


@pytest.fixture(autouse=True)
def no_faults(kube: KubeServer) -> Iterator[None]:
    yield
    kube.clear_faults()


def lease_of(kubeconfig: str, name: str, holder: str, duration_s: int = 600) -> VolumeLease:
    cluster = KubernetesCluster(config.new_client_from_config(kubeconfig), NS)
    return VolumeLease(cluster, name, holder, now=lambda: datetime.now(UTC), duration_s=duration_s)


@pytest.fixture
def lease(kube: KubeServer, request: pytest.FixtureRequest) -> VolumeLease:
    name = request.node.name.split("[")[0].replace("_", "-")
    return lease_of(str(kube.kubeconfig), name, "juicefs_storage_switch/manual__1")


def other(kube: KubeServer, lease: VolumeLease, duration_s: int = 600) -> VolumeLease:
    return lease_of(str(kube.kubeconfig), lease.name, "juicefs_storage_switch/manual__2", duration_s)


def race(kubeconfig: str, holder: str, start: Any, outcomes: Any) -> None:
    """One of two processes: takes a Lease a round, each time at the same moment as the other."""
    won = []
    for number in range(ROUNDS):
        lease = lease_of(kubeconfig, f"race-{number}", holder)
        start.wait(60)
        try:
            lease.acquire()
            won.append(True)
        except NeedsHumanError:
            won.append(False)
    outcomes.put((holder, won))


def test_of_two_processes_that_start_together_exactly_one_has_it(kube: KubeServer) -> None:
    context = multiprocessing.get_context("spawn")
    start, outcomes = context.Barrier(2), context.Queue()
    holders = ("switch/first", "switch/second")
    runs = [context.Process(target=race, args=(str(kube.kubeconfig), name, start, outcomes)) for name in holders]
    for run in runs:
        run.start()
    try:
        won = dict(outcomes.get(timeout=120) for _ in runs)
    finally:
        for run in runs:
            run.join(30)
            if run.is_alive():
                run.kill()
    assert [first + second for first, second in zip(*won.values(), strict=True)] == [1] * ROUNDS
    for number in range(ROUNDS):
        found = lease_of(str(kube.kubeconfig), f"race-{number}", "").leases.lease(f"race-{number}")
        assert found
        assert won[found.holder][number]
    codes = [entry.code for entry in kube.audit() if entry.resource == "leases" and entry.verb == "create"]
    assert 409 in codes, "in no round did both write at the same time: this test proved nothing"


def test_taken_renewed_refused_given_back(kube: KubeServer, lease: VolumeLease) -> None:
    lease.acquire()
    lease.confirm()
    with pytest.raises(NeedsHumanError, match="juicefs_storage_switch/manual__1 holds this volume since"):
        other(kube, lease).acquire()
    assert other(kube, lease).release() is False
    assert lease.release() is True
    other(kube, lease).acquire()
    with pytest.raises(NeedsHumanError, match="manual__2"):
        lease.confirm()


def test_kubectl_shows_the_holder(kube: KubeServer, lease: VolumeLease) -> None:
    lease.acquire()
    command = [str(binary("kubectl")), "--kubeconfig", str(kube.kubeconfig), "-n", NS, "get", "lease", lease.name]
    fields = "jsonpath={.spec.holderIdentity} {.spec.leaseDurationSeconds} {.spec.leaseTransitions}"
    shown = subprocess.run([*command, "-o", fields], check=True, capture_output=True, text=True, timeout=60).stdout
    assert shown == "juicefs_storage_switch/manual__1 600 0"


def test_a_holder_that_died_is_taken_over_after_its_time_and_then_stops(kube: KubeServer, lease: VolumeLease) -> None:
    dead, start = other(kube, lease, duration_s=2), time.monotonic()
    dead.acquire()

    def taken() -> bool:
        try:
            lease.acquire()
        except NeedsHumanError:
            return False
        return True

    wait_for("the dead holder's time has passed", taken, deadline_s=20, poll_s=0.2)
    assert time.monotonic() - start >= 1.9
    with pytest.raises(NeedsHumanError, match="manual__1"):
        dead.confirm()


@pytest.mark.parametrize(
    "action",
    [{"status": 409}, {"status": 429, "retry_after": 1}, {"status": 500}, {"drop": "before"}, {"drop": "after"}],
)
@pytest.mark.parametrize("verb", ["create", "update"])
def test_a_write_that_goes_wrong_ends_right(kube: KubeServer, lease: VolumeLease, verb: str, action: Any) -> None:
    lease = lease_of(str(kube.kubeconfig), f"wrong-{verb}-{'-'.join(map(str, action.values()))}", lease.holder)
    if verb == "update":
        lease.acquire()
    kube.order_fault({"match": {"verb": verb, "resource": "leases"}, "times": 1, "action": action})
    lease.acquire()
    lease.confirm()
    with pytest.raises(NeedsHumanError):
        other(kube, lease).acquire()
    attempts = [entry for entry in kube.audit() if (entry.verb, entry.resource) == (verb, "leases")]
    assert any(entry.code in {action.get("status"), 0} for entry in attempts), "the fault was never met"


def test_a_server_that_only_says_no_is_no_hold(kube: KubeServer, lease: VolumeLease) -> None:
    kube.order_fault({"match": {"verb": "create", "resource": "leases"}, "action": {"status": 500}})
    start = time.monotonic()
    with pytest.raises(Exception, match="Kubernetes answered 500"):
        lease.acquire()
    assert time.monotonic() - start < 30
    kube.clear_faults()
    assert lease.leases.lease(lease.name) is None

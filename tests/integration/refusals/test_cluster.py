"""What is refused of the cluster: rights, the CSI driver, another run on the volume."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from kubernetes import client

from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.ports import Right
from include.juicefs_storage.switch.checks import check_csi, needed_rights
from lab.environment import Lab
from lab.process import LabError, wait_for
from tests.support.refusals import APPS, NS, Look, refusals, warnings


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_volume_that_can_move_is_not_refused(lab: Lab, look: Look, dry_run: bool) -> None:
    findings = look(dry_run=dry_run, consistency="listing")
    assert (refusals(findings), warnings(findings)) == ([], [])
    assert {finding.check for finding in findings} >= {
        "rights", "csi", "volume", "runner", "secrets", "vault", "target", "reach", "consistency",
    }  # fmt: skip
    assert "3 pods that will use it" in next(finding.message for finding in findings if finding.check == "reach")
    assert not [key for key in lab.new_store.objects() if "probe" in key]


@pytest.mark.parametrize("right", needed_rights(NS), ids=str)
def test_a_missing_right(lab: Lab, look: Look, right: Right) -> None:
    resource = "/".join(part for part in (right.resource, right.subresource) if part)
    lab.kube.order_fault({"deny": {"verb": right.verb, "group": right.group, "resource": resource}})
    try:
        refused = refusals(look("check_rights"))
    finally:
        lab.kube.clear_faults()
    assert any(f"may not {right}." in line for line in refused)
    assert all(f" {right.verb} {resource}" in line and "deploy/rbac.yaml" in line for line in refused)


@contextlib.contextmanager
def arguments(lab: Lab, apps: client.AppsV1Api, *more: str) -> Iterator[None]:
    """The CSI node plugin runs with more arguments."""
    before = apps.read_namespaced_daemon_set("juicefs-csi-node", NS).spec.template.spec.containers[0].args

    def roll_out(args: list[str]) -> None:
        patch = [{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": args}]
        apps.patch_namespaced_daemon_set("juicefs-csi-node", NS, patch)
        lab.kubectl("rollout", "status", "daemonset/juicefs-csi-node", "-n", NS, "--timeout=60s")

    roll_out([*before, *more])
    try:
        yield
    finally:
        roll_out(before)


@pytest.mark.parametrize("flag", ["--by-process=true", "--by-process"])
def test_process_mode(lab: Lab, apps: client.AppsV1Api, look: Look, flag: str) -> None:
    with arguments(lab, apps, flag):
        (refused,) = refusals(look("check_csi"))
    assert "DaemonSet/juicefs-csi-node runs in process mode" in refused
    assert "mount-pod mode" in refused


def test_a_driver_for_sidecars_alone(lab: Lab, core: client.CoreV1Api) -> None:
    """The namespace stands for an installation by webhook.yaml: no DaemonSet in it."""
    (finding,) = check_csi(KubernetesCluster(core.api_client, APPS), rollout_timeout_s=60, now=datetime.now(UTC))
    assert finding.level == "refusal"
    assert "DaemonSet/juicefs-csi-node does not exist in namespace apps: the driver is installed for" in finding.message


def test_process_mode_that_is_off(lab: Lab, apps: client.AppsV1Api, look: Look) -> None:
    with arguments(lab, apps, "--by-process=false"):
        assert refusals(look("check_csi")) == []


def restarted(lab: Lab, workload: str) -> bool:
    """Restart a workload; `kubectl` refuses a second restart within the same second."""
    try:
        lab.kubectl("rollout", "restart", workload, "-n", NS)
    except LabError:
        return False
    return True


@contextlib.contextmanager
def rolling_out(lab: Lab, workload: str, fault: str) -> Iterator[None]:
    """A restart of a workload that does not come to its end; afterwards it is as healthy as before."""
    lab.kube.order_fault({"rollout": fault, "name": workload.split("/")[1]})
    try:
        wait_for("a restart is accepted", lambda: restarted(lab, workload), deadline_s=10)
        yield
    finally:
        lab.kube.clear_faults()
        if workload.startswith("statefulset"):  # as in a cluster: a pod that never became ready blocks its own update
            lab.kubectl("delete", "pod", "juicefs-csi-controller-1", "-n", NS)
        lab.kubectl("rollout", "status", workload, "-n", NS, "--timeout=90s")


@pytest.mark.parametrize("workload", ["StatefulSet/juicefs-csi-controller", "DaemonSet/juicefs-csi-node"])
def test_a_rollout_in_progress_is_waited_for(lab: Lab, look: Look, workload: str) -> None:
    with rolling_out(lab, workload.lower(), "never-ready"):
        wait_for("it is refused", lambda: refusals(look("check_csi")), deadline_s=30)
        (refused,) = refusals(look("check_csi"))
    assert f"{workload} is in the middle of a rollout: " in refused
    assert f"wait, then trigger again: kubectl -n {NS} rollout status {workload.lower()}" in refused
    assert refusals(look("check_csi")) == []


@pytest.mark.parametrize(
    ("fault", "trouble"), [("never-ready", "has not been ready for 1"), ("crash-loop", "is in CrashLoopBackOff")]
)
def test_a_workload_that_does_not_get_healthy_must_be_repaired(lab: Lab, look: Look, fault: str, trouble: str) -> None:
    """It differs from a rollout in why its pod waits, and in how long the pod has not been ready."""

    def broken() -> list[str]:
        return [line for line in refusals(look("check_csi", rollout_timeout_s=10)) if "is not healthy" in line]

    with rolling_out(lab, "daemonset/juicefs-csi-node", fault):
        wait_for("it is refused", broken, deadline_s=40)
        (refused,) = broken()
    assert re.match(rf"DaemonSet/juicefs-csi-node is not healthy: pod juicefs-csi-node-\w+ {trouble}", refused)
    assert "repair it first" in refused


def test_another_run_on_the_volume(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    leases, name = client.CoordinationV1Api(core.api_client), f"juicefs-storage-{lab.volume.uuid}"
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    spec = {"holderIdentity": "juicefs_storage_revert/manual__other", "leaseDurationSeconds": 3600}
    spec |= {"acquireTime": now, "renewTime": now}
    leases.create_namespaced_lease(NS, {"metadata": {"name": name}, "spec": spec})
    try:
        (refused,) = refusals(look("check_csi"))
    finally:
        leases.delete_namespaced_lease(name, NS)
    assert "juicefs_storage_revert/manual__other" in refused
    assert refusals(look("check_csi")) == []

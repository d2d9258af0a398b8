"""What the cluster must be like: rights, and a CSI driver whose restart does no harm."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import datetime
from itertools import combinations

from include.juicefs_storage.ports import Cluster, Right, Workload
from include.juicefs_storage.switch.findings import Finding, ok, refusal
from include.juicefs_storage.volume.clusters import FIRST, Clusters
from include.juicefs_storage.volume.csi import CSI_CONFIG_MAP, CSI_CONTROLLER_SELECTOR, CSI_WORKLOADS

#: Why a container of a pod that is getting on waits; any other reason is trouble.
_STARTING = frozenset({"", "ContainerCreating", "PodInitializing"})
#: A flag without a value is true.
_BY_PROCESS = re.compile(r"--by-process(=(true|t|1))?(\s|$)", re.IGNORECASE)


def needed_rights(namespace: str) -> list[Right]:
    """Return every right that the DAG uses; deploy/rbac.yaml grants exactly these."""
    rights = [
        Right("list", "pods", namespace=namespace),
        # The handshake of an exec over WebSocket is a GET; newer API servers ask for `create` as well.
        Right("get", "pods", subresource="exec", namespace=namespace),
        Right("create", "pods", subresource="exec", namespace=namespace),
        Right("get", "pods", subresource="log", namespace=namespace),
    ]
    rights += [Right(verb, "secrets", namespace=namespace) for verb in ("get", "list", "patch")]
    rights += [
        Right(verb, resource, "apps", namespace=namespace)
        for resource in ("statefulsets", "daemonsets")
        for verb in ("get", "list", "patch")
    ]
    rights.append(Right("get", "configmaps", namespace=namespace, name=CSI_CONFIG_MAP))
    rights.append(Right("list", "deployments", "apps", namespace=namespace))
    rights += [
        Right(verb, "leases", "coordination.k8s.io", namespace=namespace) for verb in ("get", "create", "update")
    ]
    rights += [Right("list", "pods"), Right("list", "persistentvolumes")]
    rights.append(Right("list", "storageclasses", "storage.k8s.io"))
    # For the diagnostics of a failure alone: asked for now, since then it is too late.
    rights += [Right("list", "events", namespace=namespace), Right("list", "persistentvolumeclaims")]
    rights += [Right("list", resource, "storage.k8s.io") for resource in ("csidrivers", "csinodes")]
    return rights


def rights_to_finish(namespace: str) -> list[Right]:
    """Return those that finishing a move uses: it patches nothing, and collects no diagnostics."""
    diagnostics = {"events", "persistentvolumeclaims", "csidrivers", "csinodes"}
    return [right for right in needed_rights(namespace) if right.verb != "patch" and right.resource not in diagnostics]


def check_each(clusters: Clusters, check: str, look: Callable[[str, Cluster], list[Finding]]) -> list[Finding]:
    """Make a check in every cluster. What it finds begins with the cluster's name, but for the first one's.

    Args:
        clusters: Which.
        check: The check's name. A further cluster that does not answer is a refusal.
        look: Makes it in one, given its name.

    Raises:
        StorageSwitchError: The first cluster does not answer.
    """

    def found_in(name: str, cluster: Cluster) -> list[Finding]:
        found = look(name, cluster)
        if not name:
            return found
        return [finding.model_copy(update={"message": f"Cluster {name}: {finding.message}"}) for finding in found]

    findings, silent = clusters.ask_each(found_in)
    if error := silent.get(FIRST):
        raise error
    return [*findings, *(refusal(check, error.problem, error.next_step) for error in silent.values())]


def check_rights(cluster: Cluster, rights: Sequence[Right] | None = None) -> list[Finding]:
    """Check every right before the first of them is needed.

    Args:
        cluster: Where.
        rights: Which; None: all that a switch uses.
    """
    rights = needed_rights(cluster.namespace) if rights is None else rights
    missing = [right for right in rights if not cluster.allows(right)]
    return [
        refusal("rights", f"The connection's user may not {right}.", "apply deploy/rbac.yaml") for right in missing
    ] or [ok("rights", f"all {len(rights)} rights are granted")]


def check_distinct(clusters: Clusters) -> list[Finding]:
    """Refuse one cluster by two connections: its clients would be counted twice.

    The UIDs of the pods in the driver's namespace tell, which takes no right that a run does not need anyway.
    """
    uids = dict(clusters.ask_all(lambda name, cluster: [(name, {pod.uid for pod in cluster.pods()})]))
    return [
        refusal(
            "csi",
            f"Connections {one or 'kubernetes_conn_id'} and {other} lead to the same cluster.",
            f"take {other} out of more_kubernetes_conn_ids, or correct its kubeconfig",
        )
        for one, other in combinations(uids, 2)
        if uids[one] & uids[other]
    ]


def check_csi(cluster: Cluster, *, rollout_timeout_s: float, now: datetime) -> list[Finding]:
    """Check that the CSI driver runs in mount-pod mode and is healthy.

    Args:
        cluster: Where it runs.
        rollout_timeout_s: A pod that is not ready for longer is broken, and not in the middle of a rollout.
        now: The time in UTC.
    """
    findings = []
    installed = {(template.kind, template.name) for template in cluster.workload_templates()}
    if absent := [f"{kind}/{name}" for kind, name in CSI_WORKLOADS if (kind, name) not in installed]:
        return [
            refusal(
                "csi",
                f"{', '.join(absent)} does not exist in namespace {cluster.namespace}: the driver is installed for "
                "sidecars alone, elsewhere, or under other names. Clients in sidecars cannot be proven.",
                "correct `namespace`, or move the driver to mount-pod mode",
            )
        ]
    for kind, name in CSI_WORKLOADS:
        workload = cluster.workload(kind, name)
        if any(_BY_PROCESS.search(arg) for arg in workload.args):
            findings.append(
                refusal(
                    "csi",
                    f"{kind}/{name} runs in process mode (--by-process=true): restarting it would break the mounts.",
                    "move the driver to mount-pod mode",
                )
            )
        if not workload.rolled_out:
            findings.append(_not_rolled_out(cluster, workload, rollout_timeout_s, now))
    if not findings and not any(pod.ready for pod in cluster.pods(CSI_CONTROLLER_SELECTOR)):
        findings.append(
            refusal("csi", f"No ready pod carries {CSI_CONTROLLER_SELECTOR}.", "see the pods of the CSI controller")
        )
    return findings or [ok("csi", "mount-pod mode, controller and node components are healthy")]


def _not_rolled_out(cluster: Cluster, workload: Workload, rollout_timeout_s: float, now: datetime) -> Finding:
    """Say what to do about a workload that is not rolled out: wait for it, or repair a pod that does not start."""
    where = f"{workload.kind}/{workload.name}"
    for pod in cluster.pods(f"app={workload.name}"):
        unready_s = (now - pod.unready_since).total_seconds() if pod.unready_since else 0
        if pod.problem not in _STARTING:
            trouble = f"is in {pod.problem}"
        elif unready_s > rollout_timeout_s:
            trouble = f"has not been ready for {unready_s:.0f} s"
        else:
            continue
        return refusal(
            "csi",
            f"{where} is not healthy: pod {pod.name} {trouble} ({workload.progress}).",
            f"repair it first: kubectl -n {cluster.namespace} describe pod {pod.name}",
        )
    return refusal(
        "csi",
        f"{where} is in the middle of a rollout: {workload.progress}.",
        f"wait, then trigger again: kubectl -n {cluster.namespace} rollout status {where.lower()}",
    )

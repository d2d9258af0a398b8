"""Restart the CSI components, and wait for their rollouts."""

from __future__ import annotations

from dataclasses import dataclass

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.ports import Cluster, Workload, WorkloadKind
from include.juicefs_storage.switch.step import LeaseCheck, carry_out, no_lease
from include.juicefs_storage.volume.clusters import Clusters, name_in, raise_first
from include.juicefs_storage.volume.csi import CSI_WORKLOADS

#: Annotation of the pod templates; its value is the run, so that a retry does not restart twice.
RESTART_ANNOTATION = "juicefs-storage-switch/restarted-by"
_BAD_STARTS = frozenset({"CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError"})
#: A component that ends once or twice while the node settles is not broken yet.
_CRASHES = 3


@dataclass(frozen=True)
class RestartCsi:
    """Restart the CSI controller and node components, in every cluster. In mount-pod mode the mounts do not notice."""

    clusters: Clusters
    stamp: str
    confirm_lease: LeaseCheck = no_lease

    def apply(self) -> list[str]:
        """Stamp the templates; the workloads' controllers do the rest.

        Returns:
            The workloads that were restarted; empty where this run had restarted them before.

        Raises:
            StorageSwitchError: It failed in a cluster; in the others it was done.
        """
        return self.clusters.in_each(self._apply)

    def _apply(self, _: str, cluster: Cluster) -> list[str]:
        annotations = {RESTART_ANNOTATION: self.stamp}
        restarted = carry_out(
            lambda: self._unstamped(cluster),
            lambda row: cluster.stamp_template(*row, annotations),
            self.confirm_lease,
        )
        return [f"{kind}/{name}" for kind, name in restarted]

    def _unstamped(self, cluster: Cluster) -> list[tuple[WorkloadKind, str]]:
        """List the workloads of a cluster that do not carry this run's stamp yet."""
        return [
            (kind, name)
            for kind, name in CSI_WORKLOADS
            if cluster.workload(kind, name).annotations.get(RESTART_ANNOTATION) != self.stamp
        ]

    def verify(self) -> list[str]:
        """List the rollouts that are not done yet, each with its progress; empty when all are done.

        Raises:
            PermanentError: A pod of a workload cannot start.
            StorageSwitchError: A cluster does not answer, and all rollouts in the others are done.
        """
        waiting, failed = self.clusters.ask_each(_unfinished)
        if not waiting or any(isinstance(error, PermanentError) for error in failed.values()):
            raise_first(failed)
        return waiting


def _unfinished(name: str, cluster: Cluster) -> list[str]:
    workloads = [cluster.workload(kind, workload) for kind, workload in CSI_WORKLOADS]
    return [name_in(name, _progress(cluster, workload)) for workload in workloads if not workload.rolled_out]


def _progress(cluster: Cluster, workload: Workload) -> str:
    line = f"{workload.kind}/{workload.name}: {workload.progress}"
    for pod in cluster.pods(f"app={workload.name}"):
        if pod.problem not in _BAD_STARTS:
            continue
        if pod.annotations.get(RESTART_ANNOTATION) != workload.annotations.get(RESTART_ANNOTATION):
            # The rollout replaces it: no verdict on the restart.
            line += f"; pod {pod.name} from before the restart is in {pod.problem}"
            if workload.kind == "StatefulSet":
                line += f" and may hold the others up: kubectl -n {pod.namespace} delete pod {pod.name}"
        elif pod.problem != "CrashLoopBackOff" or pod.restarts >= _CRASHES:
            raise PermanentError(
                f"Pod {pod.name} of {workload.kind}/{workload.name} is in {pod.problem}. Its last lines:\n"
                f"{cluster.log_tail(pod.name, container=pod.waiting_container)}",
                state="the existing mounts keep working; new volumes may not mount",
                next_step=f"kubectl -n {pod.namespace} describe pod {pod.name}",
            )
    return line

"""Compare the pods with those before the move: a switch restarts and deletes none."""

from __future__ import annotations

from typing import NamedTuple

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.switch.plan import Plan
from include.juicefs_storage.volume.clusters import cluster_of
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods, running_mount_pods
from include.juicefs_storage.volume.users import PodIdentity


class PodChanges(NamedTuple):
    """How the pods of a volume differ from those before the move, one line each.

    Attributes:
        gone: Pods that left without a trace of a restart, as when an application was scaled down.
        restarted: Pods that restarted or were replaced.
    """

    gone: list[str]
    restarted: list[str]

    def require_no_restarts(self) -> None:
        """Refuse any restart.

        Raises:
            NeedsHumanError: A pod restarted or was replaced.
        """
        if self.restarted:
            raise NeedsHumanError(
                "Pods restarted since the volume moved:\n" + "\n".join(f"- {line}" for line in self.restarted),
                next_step="kubectl describe these pods: a switch restarts none of them",
            )


def compare_pods(pods: VolumePods, plan: Plan) -> PodChanges:
    """Compare the UIDs and restart counts of the volume's pods with those in the plan.

    Args:
        pods: The volume's mount pods; its business pods are found by its PVs.
        plan: What was carried out.
    """
    mounts_now = {pod.name: pod for pod in running_mount_pods(pods.clusters)}
    business_now = {(pod.namespace, pod.name): pod for pod in pods.business_pods(plan.mount_pods)}
    nodes_in_use = {(cluster_of(pod.namespace), pod.node) for pod in business_now.values()}
    changes = PodChanges([], [])
    for before in plan.mount_pods:
        now = mounts_now.get(before.name)
        if now is None:
            used = (cluster_of(before.name), before.node) in nodes_in_use
            (changes.restarted if used else changes.gone).append(f"mount pod {before.name} is gone")
        elif (now.uid, now.restarts) != (before.uid, before.restarts):
            changes.restarted.append(f"mount pod {before.name}: {_change(before, now.uid, now.restarts)}")
    for identity in plan.business_pods:
        found = business_now.get((identity.namespace, identity.name))
        name = f"{identity.namespace}/{identity.name}"
        if found is None:
            changes.gone.append(f"pod {name} is gone")
        elif (found.uid, found.restarts) != (identity.uid, identity.restarts):
            changes.restarted.append(f"pod {name}: {_change(identity, found.uid, found.restarts)}")
    return changes


def _change(before: MountPod | PodIdentity, uid: str, restarts: int) -> str:
    return f"UID {before.uid} → {uid}, restarts {before.restarts} → {restarts}"

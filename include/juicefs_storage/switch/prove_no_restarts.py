"""Prove that no pod restarted while the volume moved."""

from __future__ import annotations

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.switch.plan import Plan
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods, running_mount_pods
from include.juicefs_storage.volume.users import PodIdentity, business_pods


def compare_pods(pods: VolumePods, plan: Plan) -> list[str]:
    """Compare the UIDs and restart counts of the volume's pods with those in the plan.

    Args:
        pods: The volume's mount pods; its business pods are found by its PVs.
        plan: What was carried out.

    Returns:
        Pods that left meanwhile without a trace of a restart, one line each; usually empty.

    Raises:
        NeedsHumanError: A pod restarted or was replaced while the volume moved.
    """
    mounts_now = {pod.name: pod for pod in running_mount_pods(pods.cluster)}
    business_now = {
        (pod.namespace, pod.name): pod for pod in business_pods(pods.cluster, pods.volumes_of(plan.mount_pods))
    }
    nodes_in_use = {pod.node for pod in business_now.values()}
    broken: list[str] = []
    gone: list[str] = []
    for before in plan.mount_pods:
        now = mounts_now.get(before.name)
        if now is None:
            (broken if before.node in nodes_in_use else gone).append(f"mount pod {before.name} is gone")
        elif (now.uid, now.restarts) != (before.uid, before.restarts):
            broken.append(f"mount pod {before.name}: {_change(before, now.uid, now.restarts)}")
    for identity in plan.business_pods:
        found = business_now.get((identity.namespace, identity.name))
        name = f"{identity.namespace}/{identity.name}"
        if found is None:
            gone.append(f"pod {name} is gone")
        elif (found.uid, found.restarts) != (identity.uid, identity.restarts):
            broken.append(f"pod {name}: {_change(identity, found.uid, found.restarts)}")
    if broken:
        raise NeedsHumanError(
            "Pods restarted while the volume moved:\n" + "\n".join(f"- {line}" for line in broken),
            next_step="kubectl describe these pods: the switch itself restarts none of them",
        )
    return gone


def _change(before: MountPod | PodIdentity, uid: str, restarts: int) -> str:
    return f"UID {before.uid} → {uid}, restarts {before.restarts} → {restarts}"

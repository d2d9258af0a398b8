"""Who uses a volume beside its mount pods: business pods, and sessions of other clients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from pydantic import BaseModel, ConfigDict

from include.juicefs_storage.ports import Cluster, PersistentVolume, Session


class PodIdentity(BaseModel):
    """What must not change about a pod that keeps running."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    namespace: str
    name: str
    uid: str
    node: str
    restarts: int


def business_pods(cluster: Cluster, volumes: Sequence[PersistentVolume]) -> list[PodIdentity]:
    """List the pods that use the volume through a claim, in whatever namespace they are."""
    claims = {(volume.claim_namespace, volume.claim_name) for volume in volumes if volume.claim_name}
    return [
        PodIdentity(namespace=pod.namespace, name=pod.name, uid=pod.uid, node=pod.node, restarts=pod.restarts)
        for namespace in sorted({namespace for namespace, _ in claims})
        for pod in cluster.pods(namespace=namespace)
        if any((namespace, claim) in claims for claim in pod.claims)
    ]


def unknown_sessions(sessions: Sequence[Session], mount_paths: Iterable[str]) -> list[Session]:
    """List the sessions of clients that are not among the mount pods and so cannot be proven.

    The last part of the mount point (`<volume id>-<6 random characters>`) tells a mount pod's session.
    """
    known = {PurePosixPath(path).name for path in mount_paths}
    return [session for session in sessions if PurePosixPath(session.mount_point).name not in known]

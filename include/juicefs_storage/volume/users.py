"""Who uses a volume beside its mount pods: business pods, and sessions of other clients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
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


def session_name(session: Session) -> str:
    """Return how a person names a client that is no mount pod: `host:mount point`. A gateway's is `host:s3gateway`."""
    return f"{session.host}:{session.mount_point}"


def is_accepted(session: Session, accepted: Iterable[str]) -> bool:
    """Return whether a person has accepted that a client is not proven.

    Args:
        session: The client's.
        accepted: Patterns of `session_name`, with `*`, `?` and `[…]`, and session ids.
    """
    name = session_name(session)
    return any(pattern == str(session.sid) or fnmatchcase(name, pattern) for pattern in accepted)


def accepted_clients(sessions: Iterable[Session], accepted: Sequence[str]) -> list[str]:
    """Name the clients that are accepted as not proven, each once.

    Args:
        sessions: The clients that are no mount pods.
        accepted: See `is_accepted`.
    """
    return sorted({session_name(session) for session in sessions if is_accepted(session, accepted)})

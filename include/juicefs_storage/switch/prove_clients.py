"""Prove that every client uses a storage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.ports import Pod, Session
from include.juicefs_storage.records import Record
from include.juicefs_storage.volume.canary import ClientState, Move, prove_client
from include.juicefs_storage.volume.mount_pods import VolumePods, find_mount_path, running_mount_pods
from include.juicefs_storage.volume.users import unknown_sessions

_PARALLEL_PODS = 8
_CANARY_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


class ClientProof(Record):
    """One mount pod that was proven to use a storage.

    Attributes:
        after_s: How long after the first look, in seconds.
    """

    pod: str
    uid: str
    node: str
    after_s: float
    #: It followed only when the setting was written once more.
    was_stuck: bool = False
    #: What proved it, see `ClientState`.
    by: str = "block"


def prove_every_client(
    pods: VolumePods,
    move: Move,
    canary: str,
    *,
    timeout_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    unstick: Callable[[], None] | None = None,
    sessions: Callable[[], Sequence[Session]] = tuple,
) -> list[ClientProof]:
    """Prove every mount pod of the volume, waiting for those that have not followed yet.

    Args:
        pods: The volume's mount pods. One that is being deleted must follow as well, or be gone.
        move: The storage that the clients must use, and the one that they leave.
        canary: How the names of the files begin that are written through the mounts and removed again.
        timeout_s: How long the clients may take altogether, in seconds. What is found of a client later than that
            counts: other volumes' pods that do not answer may take the whole time.
        clock: A monotonic clock.
        sleep: Waits the given seconds.
        unstick: Makes every client try again; called once, where some show the storage in two looks on end and do not
            use it. They have the whole time again then.
        sessions: Lists the volume's clients: none but the mount pods may be left, for no other can be proven.

    Raises:
        PermanentError: Some client did not follow in time; each is named with what was found.
    """
    start = since = clock()
    proven: dict[str, ClientProof] = {}
    seen_stuck: set[str] = set()
    unstuck: set[str] = set()
    refused = ""
    while True:
        looked = clock()
        others, everyone = sessions(), running_mount_pods(pods.cluster)
        asked = [pod for pod in everyone if pod.uid not in proven]
        with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
            found = list(pool.map(lambda pod: (_state(pods, pod, move, canary), clock()), asked))
        unasked = {pod.uid for pod, (state, _) in zip(asked, found, strict=True) if state is None and pod.terminating}
        known = [find_mount_path(pod) for pod in everyone if pod.uid not in unasked]
        waiting = {
            f"session {session.sid} on {session.host} at {session.mount_point}": "no mount pod, it cannot be proven: "
            "unmount it, or wait until its session has expired if it is dead"
            for session in unknown_sessions(others, known)
        }
        stuck, found_at = set(), [looked] if waiting else []
        for pod, (state, at) in zip(asked, found, strict=True):
            if state is None:
                continue
            if state.problem:
                waiting[pod.name] = state.problem
                found_at.append(at)
                stuck |= {pod.uid} if state.stuck else set()
            else:
                proven[pod.uid] = ClientProof(
                    pod=pod.name,
                    uid=pod.uid,
                    node=pod.node,
                    after_s=round(clock() - start, 1),
                    was_stuck=pod.uid in unstuck,
                    by=state.by,
                )
        if not waiting:
            return sorted(proven.values(), key=lambda proof: proof.pod)
        if unstick and not unstuck and (unstuck := stuck & seen_stuck):
            log.warning("Clients do not use the setting that they have read; it is written once more: %s", waiting)
            try:
                unstick()
            except StorageSwitchError as error:
                refused = f"\nThe setting was not written once more: {error.problem} {error.next_step}"
            since = clock()
        seen_stuck = stuck
        if min(found_at) - since >= timeout_s:
            listed = "\n".join(f"- {name}: {problem}" for name, problem in waiting.items())
            raise PermanentError(
                f"{len(waiting)} of {len(proven) + len(waiting)} clients do not use {move.config.bucket} "
                f"after {clock() - start:.0f} s:\n{listed}{refused}",
                next_step=f"kubectl -n {pods.cluster.namespace} logs <mount pod>, look for 'object storage:'; a client "
                "that cannot follow tries again when the setting changes, or when its pod is restarted",
            )
        sleep(1)


def _state(pods: VolumePods, pod: Pod, move: Move, canary: str) -> ClientState | None:
    """Ask for one client's state; None for another volume's client."""
    try:
        if pods.config(pod) is None:
            return None
        # A file of its own: of one that several clients write, each shows the block that another wrote last.
        return prove_client(pods.cluster, pod, move, f"{canary}-{pod.uid}", timeout_s=_CANARY_TIMEOUT_S)
    except StorageSwitchError as error:
        return ClientState(error.problem)

"""Prove that every client uses a storage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.ports import Pod, Session
from include.juicefs_storage.records import Record
from include.juicefs_storage.volume.canary import (
    ClientState,
    Move,
    is_read_only,
    nearest_writer,
    prove_client,
    prove_reader,
)
from include.juicefs_storage.volume.mount_pods import VolumePods, find_mount_path, mount_pods_seen
from include.juicefs_storage.volume.users import unknown_sessions

_PARALLEL_PODS = 8
_CANARY_TIMEOUT_S = 30.0

log = logging.getLogger(__name__)


class ClientProof(Record):
    """One mount pod that was proven to use a storage.

    Attributes:
        after_s: How long after the first look, in seconds.
        at: When, by Airflow's clock (UTC, ISO 8601).
    """

    pod: str
    uid: str
    node: str
    after_s: float
    #: It followed only when the setting was written once more.
    was_stuck: bool = False
    #: What proved it, see `ClientState`.
    by: str = "block"
    at: str = ""
    #: How long after the setting was written its log shows the reload, in seconds; None where it does not.
    reloaded_s: float | None = None


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
    canary_timeout_s: float = _CANARY_TIMEOUT_S,
    on_look: Callable[[Collection[ClientProof], Mapping[str, str]], None] | None = None,
) -> list[ClientProof]:
    """Prove every mount pod of the volume, waiting for those that have not followed yet.

    One that is mounted read-only is proven by reading what a client writes that is proven already.

    Args:
        pods: The volume's mount pods. One that is being deleted must follow as well, or be gone. Another cluster than
            the first that does not answer is waited for as a client is, while those in the others are proven.
        move: The storage that the clients must use, and the one that they leave.
        canary: How the names of the files begin that are written through the mounts and removed again.
        timeout_s: How long the clients may take altogether, in seconds. What is found of a client later than that
            counts: other volumes' pods that do not answer may take the whole time.
        clock: A monotonic clock.
        sleep: Waits the given seconds.
        unstick: Makes every client try again; called once, where some show the storage in two looks on end, or say in
            their log that they cannot, and do not use it. They have the whole time again then.
        sessions: Lists the volume's clients: none but the mount pods may be left, for no other can be proven.
        canary_timeout_s: How long one write through a mount may take, in seconds.
        on_look: Called after each look with the clients that are proven, and what the others show, by their names.

    Raises:
        PermanentError: Some client did not follow in time; each is named with what was found.
    """
    started = since = clock()
    clients = _Clients(pods, move, canary, sessions, clock, canary_timeout_s)
    refused = ""
    while True:
        stuck_before = clients.stuck
        clients.look(started)
        if on_look:
            on_look(clients.proven.values(), clients.waiting)
        if not clients.waiting:
            return sorted(clients.proven.values(), key=lambda proof: proof.pod)
        if unstick and not clients.unstuck and (stuck := clients.stuck & (stuck_before | clients.failed)):
            clients.unstuck = stuck
            log.warning(
                "Clients do not use the setting that they have read; it is written once more: %s", clients.waiting
            )
            try:
                unstick()
            except StorageSwitchError as error:
                refused = f"\nThe setting was not written once more: {error.problem} {error.next_step}"
            since = clock()
        if clients.found_at - since >= timeout_s:
            listed = "\n".join(f"- {name}: {problem}" for name, problem in clients.waiting.items())
            raise PermanentError(
                f"{len(clients.waiting)} of {len(clients.proven) + len(clients.waiting)} clients do not use "
                f"{move.config.bucket} after {clock() - started:.0f} s:\n{listed}{refused}",
                next_step=f"kubectl -n {pods.clusters.namespace} logs <mount pod>, look for 'object storage:'; a "
                "client that cannot follow tries again when the setting changes, or when its pod is restarted",
            )
        sleep(1)


@dataclass
class _Clients:
    """The volume's clients, as the looks at them have found them so far.

    Attributes:
        pods: The volume's mount pods.
        move: Between which storages they move.
        canary: How the names of the files begin that are written through the mounts.
        sessions: Lists the volume's clients.
        clock: A monotonic clock.
        canary_timeout_s: How long one write through a mount may take, in seconds.
        proven: UID of a mount pod -> its proof.
        waiting: What the last look did not prove, each with the problem.
        found_at: When the first of these was found, by `clock`.
        stuck: UIDs of those that had read the setting at the last look and did not use it.
        failed: UIDs of those whose log says that they could not use it.
        unstuck: UIDs of those for which the setting was written once more.
        writers: UID -> mount pod of those that are proven and can write.
    """

    pods: VolumePods
    move: Move
    canary: str
    sessions: Callable[[], Sequence[Session]]
    clock: Callable[[], float]
    canary_timeout_s: float
    proven: dict[str, ClientProof] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    found_at: float = 0.0
    stuck: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    unstuck: set[str] = field(default_factory=set)
    writers: dict[str, Pod] = field(default_factory=dict)

    def look(self, started: float) -> None:
        """Look once at every client that is not proven yet; `started` is when the first look began."""
        looked = self.clock()
        others = self.sessions()
        everyone, silent = mount_pods_seen(self.pods.clusters)
        asked = [pod for pod in everyone if pod.uid not in self.proven]
        with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
            found = list(pool.map(self._ask, asked))
            self._find_writers(everyone, [(pod, state) for pod, (state, _) in zip(asked, found, strict=True)])
            writable = self.writers or any(state and not state.reads for state, _ in found)
            found = list(
                pool.map(
                    lambda pod, state_at: (
                        self._ask_reader(pod, writable=bool(writable))
                        if state_at[0] and state_at[0].reads
                        else state_at
                    ),
                    asked,
                    found,
                )
            )
        unasked = {pod.uid for pod, (state, _) in zip(asked, found, strict=True) if state is None and pod.terminating}
        known = [find_mount_path(pod) for pod in everyone if pod.uid not in unasked]
        self.waiting = {f"clients in cluster {name}": error.problem for name, error in silent.items()}
        if not silent:  # else it may be one of them
            self.waiting |= {
                f"session {session.sid} on {session.host} at {session.mount_point}": "no mount pod, it cannot be "
                "proven: unmount it, or wait until its session has expired if it is dead"
                for session in unknown_sessions(others, known)
            }
        self.stuck, found_at = set(), [looked] if self.waiting else []
        for pod, (state, at) in zip(asked, found, strict=True):
            if state is None:
                continue
            if state.problem:
                self.waiting[pod.name] = state.problem
                found_at.append(at)
                self.stuck |= {pod.uid} if state.stuck else set()
                self.failed |= {pod.uid} if state.failed else set()
            else:
                self.proven[pod.uid] = ClientProof(
                    pod=pod.name,
                    uid=pod.uid,
                    node=pod.node,
                    after_s=round(self.clock() - started, 1),
                    was_stuck=pod.uid in self.unstuck,
                    by=state.by,
                    at=datetime.now(UTC).isoformat(),
                    reloaded_s=state.reloaded_s,
                )
        self.found_at = min(found_at, default=looked)

    def _ask(self, pod: Pod) -> tuple[ClientState | None, float]:
        return _state(self.pods, pod, self.move, self.canary, self.canary_timeout_s), self.clock()

    def _find_writers(self, everyone: Sequence[Pod], states: Sequence[tuple[Pod, ClientState | None]]) -> None:
        there = {pod.uid for pod in everyone if not pod.terminating}
        proven = {pod.uid: pod for pod, state in states if state and not state.problem and not state.reads}
        self.writers = {uid: pod for uid, pod in (self.writers | proven).items() if uid in there}

    def _ask_reader(self, pod: Pod, *, writable: bool) -> tuple[ClientState, float]:
        writer = nearest_writer(self.writers.values(), pod)
        if writable and not writer:
            return ClientState("it is mounted read-only, and no client is proven yet that writes for it"), self.clock()
        block_bytes, name = self.pods.setting.block_bytes, f"{self.canary}-{pod.uid}"
        try:
            state = prove_reader(
                self.pods.clusters,
                pod,
                writer,
                self.move,
                name,
                block_bytes=block_bytes,
                timeout_s=self.canary_timeout_s,
            )
        except StorageSwitchError as error:
            state = ClientState(error.problem)
        return state, self.clock()


def _state(pods: VolumePods, pod: Pod, move: Move, canary: str, timeout_s: float) -> ClientState | None:
    """Ask for one client's state; None for another volume's client."""
    try:
        if (config := pods.config(pod)) is None:
            return None
        if is_read_only(config):
            return ClientState(reads=True)
        # A file of its own: of one that several clients write, each shows the block that another wrote last.
        return prove_client(pods.clusters, pod, move, f"{canary}-{pod.uid}", timeout_s=timeout_s)
    except StorageSwitchError as error:
        return ClientState(error.problem)

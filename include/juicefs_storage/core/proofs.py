"""What a switch proves instead of hoping: every client moved, no block lost, no pod restarted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from include.juicefs_storage.core.clients import (
    MOUNT_POD_SELECTOR,
    MountPod,
    PodIdentity,
    Standing,
    business_pods,
    mount_path,
    prove_client,
    read_config,
    unknown_sessions,
)
from include.juicefs_storage.core.copying import Difference, files_of_examples, missing_blocks
from include.juicefs_storage.core.errors import NeedsHumanError, PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.core.plan import Frozen, Plan
from include.juicefs_storage.core.ports import Cluster, JuiceFS, MetadataStore, ObjectStore, Pod, Session
from include.juicefs_storage.core.setting import Setting, StorageConfig

_PARALLEL_PODS = 8
_CANARY_TIMEOUT_S = 30.0
_COPY_PASSES = 5

log = logging.getLogger(__name__)


class ClientProof(Frozen):
    """One mount pod that was proven to use a storage."""

    pod: str
    node: str
    after_s: float
    #: It followed only when the setting was written once more.
    was_stuck: bool = False


def prove_clients(
    cluster: Cluster,
    setting: Setting,
    config: StorageConfig,
    store: ObjectStore,
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
        cluster: Where the mount pods are.
        setting: Tells which mount pods serve this volume.
        config: The storage that the clients must use.
        store: The bucket behind it.
        canary: How the names of the files begin that are written through the mounts and removed again.
        timeout_s: How long the clients may take altogether, in seconds.
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
        others, everyone = sessions(), cluster.pods(MOUNT_POD_SELECTOR)
        pods = [pod for pod in everyone if pod.uid not in proven]
        with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
            found = list(pool.map(lambda pod: _standing(cluster, pod, setting, config, store, canary), pods))
        waiting = {
            f"session {session.sid} on {session.host} at {session.mount_point}": "no mount pod, it cannot be proven: "
            "unmount it, or wait until its session has expired if it is dead"
            for session in unknown_sessions(others, map(mount_path, everyone))
        }
        stuck = set()
        for pod, standing in zip(pods, found, strict=True):
            if standing is None:
                continue
            if standing.problem:
                waiting[pod.name] = standing.problem
                stuck |= {pod.uid} if standing.stuck else set()
            else:
                proven[pod.uid] = ClientProof(
                    pod=pod.name, node=pod.node, after_s=round(clock() - start, 1), was_stuck=pod.uid in unstuck
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
        if clock() - since >= timeout_s:
            listed = "\n".join(f"- {name}: {problem}" for name, problem in waiting.items())
            raise PermanentError(
                f"{len(waiting)} of {len(proven) + len(waiting)} clients do not use {config.bucket} "
                f"after {clock() - start:.0f} s:\n{listed}{refused}",
                next_step=f"kubectl -n {cluster.namespace} logs <mount pod>, look for 'object storage:'; a client that "
                "cannot follow tries again when the setting changes, or when its pod starts anew",
            )
        sleep(1)


def _standing(
    cluster: Cluster, pod: Pod, setting: Setting, config: StorageConfig, store: ObjectStore, canary: str
) -> Standing | None:
    """None for another volume's client."""
    try:
        if (read_config(cluster, pod).get("Format") or {}).get("UUID") != setting.uuid:
            return None
        # A file of its own: of one that several clients write, each shows the block that another wrote last.
        return prove_client(cluster, pod, config, store, f"{canary}-{pod.uid}", timeout_s=_CANARY_TIMEOUT_S)
    except StorageSwitchError as error:
        return Standing(error.problem)


def catch_up(
    juicefs: JuiceFS,
    metadata: MetadataStore,
    setting: Setting,
    source: StorageConfig,
    target: StorageConfig,
    target_store: ObjectStore,
    *,
    timeout_s: float,
) -> tuple[int, Difference]:
    """Copy blocks that only one store has to the other, until the metadata misses none there.

    Nothing is overwritten and nothing is deleted. A pass that copied something is followed by another: an upload that
    was under way when its client moved may land late.

    Args:
        juicefs: Makes the copy.
        metadata: Tells which blocks must exist.
        setting: Tells their keys.
        source: Where the blocks are.
        target: Where they must be.
        target_store: The same, to look into.
        timeout_s: How long one pass may take, in seconds.

    Returns:
        The number of blocks copied, and what the metadata still misses on the target.
    """
    copied = 0
    difference = Difference()
    for _ in range(_COPY_PASSES):
        result = juicefs.copy_missing(source, target, f"{setting.name}/chunks/", timeout_s=timeout_s)
        copied += result.copied
        difference = missing_blocks(metadata, setting, target_store)
        if not result.copied and not difference.missing:
            break
    return copied, difference


def require_all_blocks(difference: Difference, bucket: str, metadata: MetadataStore) -> None:
    """Refuse to call anything done while a block that some file refers to is missing or cut.

    Args:
        difference: What a store lacks.
        bucket: Of the store, for the message.
        metadata: Tells which files these are; read in full, and only where something is missing.

    Raises:
        NeedsHumanError: Blocks are missing or differ.
    """
    if difference.missing or difference.different:
        files = ", ".join(files_of_examples(difference, metadata)) or "not known"
        raise NeedsHumanError(
            f"{difference.missing} of {difference.expected} blocks that files refer to are not in {bucket}, "
            f"{difference.different} have another length: {'; '.join(difference.examples)}. Files of these: {files}.",
            state="reads of these blocks fail until they are there",
            next_step="clear catch_up with Downstream; if they are in neither store, restore the files from elsewhere",
        )


def prove_no_restarts(cluster: Cluster, plan: Plan) -> list[str]:
    """Compare the pods' UIDs and restart counts with those in the plan.

    Returns:
        Pods that left meanwhile without a trace of a restart, one line each; usually empty.

    Raises:
        NeedsHumanError: A pod restarted or was replaced while the volume moved.
    """
    mounts_now = {pod.name: pod for pod in cluster.pods(MOUNT_POD_SELECTOR)}
    business_now = {(pod.namespace, pod.name): pod for pod in business_pods(cluster, cluster.persistent_volumes())}
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


def prove_status(juicefs: JuiceFS, setting: Setting, config: StorageConfig) -> None:
    """`juicefs status` names this volume on this storage.

    Raises:
        TransientError: It names something else.
    """
    form = juicefs.status().get("Setting") or {}
    if form.get("UUID") != setting.uuid or form.get("Bucket") != config.bucket:
        raise TransientError(
            f"`juicefs status` shows bucket {form.get('Bucket')!r}, expected {config.bucket!r}.",
            next_step="the task tries again; if it goes on, somebody writes the setting",
        )


def prove_fresh_mount(juicefs: JuiceFS, store: ObjectStore, config: StorageConfig, canary: str) -> int:
    """A new mount with an empty cache reads and writes, and what it writes lands on the storage.

    Returns:
        The number of objects found on the storage.

    Raises:
        TransientError: An object that was written is not there.
    """
    try:
        keys = juicefs.mount_fresh(canary)
        if missing := [key for key in keys if not store.exists(key)]:
            raise TransientError(
                f"A fresh mount wrote {missing[0]}, which is not in {config.bucket}.", next_step="the task tries again"
            )
        return len(keys)
    finally:
        juicefs.unmount_fresh(canary)

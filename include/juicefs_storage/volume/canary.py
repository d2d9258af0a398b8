"""A canary: a block written through one mount, which shows the store that this client writes to."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from include.juicefs_storage.errors import StorageSwitchError, TransientError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import Pod, PodAccess
from include.juicefs_storage.volume.clusters import cluster_of
from include.juicefs_storage.volume.mount_pods import (
    MOUNT_CONTAINER,
    mount_options,
    mount_path,
    read_config,
    run_in_mount,
    storage_overrides,
)
from include.juicefs_storage.volume.setting import StorageConfig

log = logging.getLogger(__name__)

OBJECT_KEY = re.compile(r"\S+/chunks/\S+_\d+_\d+")
#: How the name of every canary begins, whichever run wrote it.
CANARY_PREFIX = ".storage-switch-"
_WRITE_CANARY = """\
set -e
dd if=/dev/urandom of="$1/$2" bs=4096 count=1 conv=fsync 2>/dev/null
/usr/local/bin/juicefs info "$1/$2"
"""
#: Free blocks, their size in bytes, free inodes: JuiceFS answers by its quotas (StatFS of pkg/meta in JuiceFS 1.4).
_ROOM = 'stat -f -c "%a %S %d" "$1"'
#: A whole block: a client caches a smaller one that it writes, and the mounts of a node may share their cache.
_WRITE_BLOCK = """\
set -e
dd if=/dev/urandom of="$1/$2" bs=65536 count="$3" conv=fsync 2>/dev/null
/usr/local/bin/juicefs info "$1/$2"
"""
_BLOCK_PART_BYTES = 65536
_COUNT_BYTES = 'cat "$1/$2" | wc -c'
_REMOVE_CANARY = 'rm -f "$1/$2"'
#: Both lines of a reload, see NewReloadableStorage in cmd/mount.go of JuiceFS 1.4; values are quoted as Go does.
_RELOAD = re.compile(
    r"(?:^(?P<at>\d{4}/\d\d/\d\d \d\d:\d\d:\d\d)[^\n]*)?"
    r'found new configuration: storage="(?P<storage>[^"]*)" bucket="(?P<bucket>[^"]*)"(?: ak="(?P<key>[^"]*)")?',
    re.MULTILINE,
)
_RELOAD_FAILURE = re.compile(r"<WARNING>: object storage: ([^\n]*)")
_LOG_LINES = 20_000
_WHETHER = "whether the client uses the new values"
_WHICH = "which store the client uses, since both have it"
#: Clocks of Airflow and of the nodes may differ by so many seconds.
_CLOCK_MARGIN_S = 120
#: Time zones differ by a multiple of so many seconds.
_ZONE_S = 900


class Room(NamedTuple):
    """What may still be written through a mount before a quota is met: the volume's or a directory's.

    Attributes:
        free_bytes: How many bytes.
        free_files: How many files and directories.
    """

    free_bytes: int
    free_files: int


class ClientState(NamedTuple):
    """What was found about a client and a storage.

    Attributes:
        problem: What was found instead of the proof; empty when proven.
        stuck: It has read the setting and does not use what it says: it retries only when the setting changes.
        failed: Its log says so.
        reads: It is mounted read-only, and was not asked.
        reloaded_s: How long after the setting was written its log shows the reload, in seconds; None where it does not.
        by: What proved it: a `block` that only this client can have written there; a block while the store refused the
            other `key`; a `read` of a block that only that storage has, or while the store refused the other key
            (`read_key`); where both stores show the block, its `log`, or its `start` after the setting was written.
    """

    problem: str = ""
    stuck: bool = False
    failed: bool = False
    by: str = ""
    reloaded_s: float | None = None
    reads: bool = False


@dataclass(frozen=True)
class Move:
    """Between which storages a client moves.

    Attributes:
        config: The storage that it must use.
        store: The bucket behind it.
        left: The bucket that it used before; None where that is not at hand: then a block proves less.
        since: When the setting was written (UTC, by Airflow's clock).
        returning: The clients had this storage before. One that never left it may have failed to reload another.
        one_store: The clients keep their store, and get another key or address for it: a block alone proves nothing.
        key_refused: The store refuses the key that the clients had before.
        refuses_reads: It refuses reads as well: it does not know the key.
    """

    config: StorageConfig
    store: Bucket
    left: Bucket | None = None
    since: datetime | None = None
    returning: bool = False
    one_store: bool = False
    key_refused: bool = False
    refuses_reads: bool = True

    def left_has(self, keys: Sequence[str]) -> bool:
        """Return whether the bucket that the client used before has one of these objects.

        One that cannot be read has nothing that could have been copied from there.
        """
        try:
            return self.left is not None and any(self.left.exists(key) for key in keys)
        except StorageSwitchError as error:
            log.warning("%s was not asked for the canaries: %s", self.left and self.left.name, error.problem)
            return False


def canary_name(salt: str) -> str:
    """Return the prefix of the canary files' names. The same salt gives the same: a retry removes what is left."""
    return f"{CANARY_PREFIX}{hashlib.sha256(salt.encode()).hexdigest()[:12]}"


def room_of(cluster: PodAccess, pod: str, path: str) -> Room | None:
    """Ask a mount how much may still be written through it.

    Args:
        cluster: Where the mount pod is.
        pod: Its name.
        path: Where it has the volume mounted.

    Returns:
        None where the pod's image cannot tell.

    Raises:
        TransientError: The pod cannot be asked.
    """
    result = run_in_mount(cluster, pod, _ROOM, path)
    numbers = result.stdout.split()
    if result.returncode != 0 or len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
        return None
    blocks, block_bytes, files = map(int, numbers)
    return Room(blocks * block_bytes, files)


@dataclass(frozen=True)
class Reload:
    """What a client's log says of the setting that it found last.

    Attributes:
        found: It names the storage that the client must use.
        failure: Why the client could not use it; empty where the log shows no failure. It keeps the storage that it
            has then, and does not retry before the setting changes.
        at: When, by the clock and in the time zone of the client; None where the line does not say.
    """

    found: bool = False
    failure: str = ""
    at: datetime | None = None

    def after_s(self, since: datetime | None) -> float | None:
        """How many seconds after a moment it was, where it was within `_ZONE_S`; None where that is not known.

        Args:
            since: In UTC. The client's time zone is not known: zones differ by multiples of `_ZONE_S`.
        """
        if not (self.found and self.at and since):
            return None
        after_s = (self.at - since.replace(tzinfo=None)).total_seconds() % _ZONE_S
        # The log has whole seconds.
        return 0.0 if after_s > _ZONE_S - _CLOCK_MARGIN_S else round(after_s, 1)


def last_reload(client_log: str, config: StorageConfig) -> Reload:
    """Find the last reload in a client's log.

    Args:
        client_log: Since the setting was written, or longer.
        config: The storage that the client must use.
    """
    reloads = list(_RELOAD.finditer(client_log))
    if not reloads:
        return Reload()
    last = reloads[-1]
    wanted = (config.storage, config.bucket, config.access_key.get_secret_value())
    found = (last["storage"].lower(), *last.group("bucket", "key"))
    failure = _RELOAD_FAILURE.search(client_log, last.end())
    at = datetime.strptime(last["at"], "%Y/%m/%d %H:%M:%S") if last["at"] else None  # noqa: DTZ007  of whichever zone
    return Reload(found == wanted, failure[1][:200] if failure else "", at)


def prove_client(cluster: PodAccess, pod: Pod, move: Move, canary: str, *, timeout_s: float) -> ClientState:
    """Prove that one client uses a storage, by what only this client can have done.

    It writes a block through its mount. That block is on the storage and not where the client wrote before, and the
    client's log shows no failed reload, unless the client may never have left the storage. Where both show the block
    (one store under two names, other keys for one bucket, replication) the block tells nothing: then the log must show
    the reload, or the client must have started after the setting was written. The file `canary` in the volume's root
    is removed again.

    Args:
        cluster: Where the pod is.
        pod: The client's mount pod.
        move: Between which storages.
        canary: The file's name; no other client may write it.
        timeout_s: How long the write may take, in seconds.

    Raises:
        StorageSwitchError: The pod or the store cannot be asked.
    """
    if shown := _shows_another(cluster, pod, move.config):
        return shown
    path = mount_path(pod)
    try:
        result = run_in_mount(cluster, pod.name, _WRITE_CANARY, path, canary, timeout_s=timeout_s)
    except TransientError as error:
        # A write to a store that does not serve hangs: only the log tells why the client is still there.
        if not (reload := _read_reload(cluster, pod, move)).failure:
            raise
        return _unproven(error.problem, reload, stuck=True)
    try:
        keys: list[str] = OBJECT_KEY.findall(result.stdout)
        if result.returncode != 0 or not keys:
            ended = f"exit code {result.returncode}"
            problem = f"a file cannot be written through its mount ({ended}): {result.stderr[-300:]}"
            return _unproven(problem, _read_reload(cluster, pod, move), stuck=False)
        return _judge_block(cluster, pod, move, keys)
    finally:
        # Only now: a volume without trash deletes the block together with the file.
        run_in_mount(cluster, pod.name, _REMOVE_CANARY, path, canary)


def is_read_only(config: Mapping[str, Any]) -> bool:
    """Return whether a client mounts its volume read-only, by its `.config`."""
    return bool((config.get("Meta") or {}).get("ReadOnly"))


def nearest_writer(writers: Iterable[Pod], reader: Pod) -> Pod | None:
    """Choose who writes for a client that only reads: on another node if possible, since a node may share its cache."""

    def node(pod: Pod) -> tuple[str, str]:
        return cluster_of(pod.name), pod.node

    return min(writers, key=lambda other: node(other) == node(reader), default=None)


def prove_reader(
    cluster: PodAccess, pod: Pod, writer: Pod | None, move: Move, canary: str, *, block_bytes: int, timeout_s: float
) -> ClientState:
    """Prove that a client that is mounted read-only uses a storage, by a block that it has never read.

    Another client writes the block, which only the storage has. Where both stores show it, or nobody can write one,
    the log or the start tells, as in `prove_client`.

    Args:
        cluster: Where the pods are.
        pod: The client's mount pod.
        writer: The mount pod of a client of the volume that is proven and can write; None where there is none.
        move: Between which storages.
        canary: The file's name; no other client may write it.
        block_bytes: The size of a whole block of the volume.
        timeout_s: How long the write may take, and how long the read, in seconds.

    Raises:
        StorageSwitchError: A pod or a store cannot be asked.
    """
    if shown := _shows_another(cluster, pod, move.config):
        return shown
    reload = _read_reload(cluster, pod, move)
    if writer is None:
        return _judge_log(pod, move, reload, "no client can write a block for it to read")
    path, parts = mount_path(writer), block_bytes // _BLOCK_PART_BYTES
    try:
        written = run_in_mount(cluster, writer.name, _WRITE_BLOCK, path, canary, str(parts), timeout_s=timeout_s)
        keys: list[str] = OBJECT_KEY.findall(written.stdout)
        if written.returncode != 0 or not keys or not all(map(move.store.exists, keys)):
            return ClientState(f"no block can be written through {writer.name} for it to read: {written.stderr[-300:]}")
        read = run_in_mount(cluster, pod.name, _COUNT_BYTES, mount_path(pod), canary, timeout_s=timeout_s)
        refused = move.key_refused and move.refuses_reads
        # After the read: one store may replicate to the other meanwhile.
        on_both = not refused and (move.one_store or move.key_refused or move.left_has(keys))
    finally:
        run_in_mount(cluster, writer.name, _REMOVE_CANARY, path, canary)
    if read.stdout.split() != [str(parts * _BLOCK_PART_BYTES)]:
        return _unproven(
            f"a block that another client wrote to {move.config.bucket} cannot be read through its mount: "
            f"{read.stderr[-300:]}",
            reload,
            stuck=True,
        )
    if on_both or (reload.failure and not move.returning):
        return _judge_log(pod, move, reload, f"the block that it read does not tell {_what(move)}")
    return ClientState(by="read_key" if refused else "read", reloaded_s=reload.after_s(move.since))


def _shows_another(cluster: PodAccess, pod: Pod, config: StorageConfig) -> ClientState | None:
    """Return what a client's `.config` shows instead of a storage; None where it shows this one."""
    form = read_config(cluster, pod).get("Format") or {}
    if str(form.get("Storage", "")).lower() != config.storage or form.get("Bucket") != config.bucket:
        options = ", ".join(storage_overrides(mount_options(pod)))
        remedy = f": its mount options say {options}; remove them and restart its pod" if options else ""
        return ClientState(f"its .config shows bucket {form.get('Bucket')!r}{remedy}")
    if form.get("AccessKey") != config.access_key.get_secret_value():
        return ClientState("its .config shows another access key")
    return None


def _judge_block(cluster: PodAccess, pod: Pod, move: Move, keys: Sequence[str]) -> ClientState:
    """Judge by a block that was written through a client's mount."""
    bucket, reload = move.config.bucket, _read_reload(cluster, pod, move)
    if missing := [key for key in keys if not move.store.exists(key)]:
        return _unproven(f"a block written through its mount is not in {bucket}: {missing[0]}", reload, stuck=True)
    on_both = not move.key_refused and (move.one_store or move.left_has(keys))
    if reload.failure and (on_both or not move.returning):
        return _unproven("its block is there", reload, stuck=True)
    if not on_both:
        return ClientState(by="key" if move.key_refused else "block", reloaded_s=reload.after_s(move.since))
    return _judge_log(pod, move, reload, f"its block does not tell {_what(move)}")


def _what(move: Move) -> str:
    return _WHETHER if move.one_store else _WHICH


def _judge_log(pod: Pod, move: Move, reload: Reload, why: str) -> ClientState:
    """Judge by a client's log, or its start, where nothing else tells; `why` nothing else does."""
    if reload.failure:
        return _unproven(why, reload, stuck=True)
    if reload.found:
        return ClientState(by="log", reloaded_s=reload.after_s(move.since))
    if move.since and pod.started_at and pod.started_at > move.since:
        return ClientState(by="start")
    return ClientState(
        f"{why}, and its log does not show that it reloaded {move.config.bucket} since the setting was written",
        stuck=True,
    )


def _unproven(problem: str, reload: Reload, *, stuck: bool) -> ClientState:
    if reload.failure:
        problem = f"it could not use the setting that it had read ({reload.failure}); {problem}"
        return ClientState(problem, stuck=True, failed=True)
    return ClientState(problem, stuck=stuck)


def _read_reload(cluster: PodAccess, pod: Pod, move: Move) -> Reload:
    """Read the client's last reload, as far as its log can be read."""
    since_s = (datetime.now(UTC) - move.since).total_seconds() + _CLOCK_MARGIN_S if move.since else None
    try:
        return last_reload(cluster.log_tail(pod.name, _LOG_LINES, MOUNT_CONTAINER, since_s), move.config)
    except StorageSwitchError as error:
        log.warning("The log of mount pod %s cannot be read: %s", pod.name, error.problem)
        return Reload()

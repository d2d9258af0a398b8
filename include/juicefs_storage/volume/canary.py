"""A canary: a block written through one mount, which shows the store that this client writes to."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from typing import NamedTuple

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import Cluster, Pod
from include.juicefs_storage.volume.mount_pods import (
    MOUNT_CONTAINER,
    mount_options,
    mount_path,
    read_config,
    run_in_mount,
    storage_overrides,
)
from include.juicefs_storage.volume.setting import StorageConfig

OBJECT_KEY = re.compile(r"\S+/chunks/\S+_\d+_\d+")
_WRITE_CANARY = """\
set -e
dd if=/dev/urandom of="$1/$2" bs=4096 count=1 conv=fsync 2>/dev/null
/usr/local/bin/juicefs info "$1/$2"
"""
#: Free blocks, their size in bytes, free inodes: JuiceFS answers by its quotas (StatFS of pkg/meta in JuiceFS 1.4).
_ROOM = 'stat -f -c "%a %S %d" "$1"'
_REMOVE_CANARY = 'rm -f "$1/$2"'
_RELOAD_FAILURE = re.compile(r"<WARNING>: object storage: ([^\n]*)")
_LOG_LINES = 300


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
        stuck: It has read the setting and does not use what it says: it tries again only when the setting changes.
    """

    problem: str = ""
    stuck: bool = False


def canary_name(salt: str) -> str:
    """Prefix of the names of the canary files. The same salt gives the same name: a retry removes what is left."""
    return f".storage-switch-{hashlib.sha256(salt.encode()).hexdigest()[:12]}"


def room_of(cluster: Cluster, pod: str, path: str) -> Room | None:
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


def reload_warning(client_log: str) -> str:
    """Why a client could not use the setting that it found last; empty where its log tells of no failure.

    `found new configuration: …`, then `object storage: …` where that failed (NewReloadableStorage in cmd/mount.go of
    JuiceFS 1.4): it keeps the storage that it has, and does not try again before the setting changes.
    """
    _, found, since = client_log.rpartition("found new configuration:")
    failure = _RELOAD_FAILURE.search(since) if found else None
    return failure[1][:200] if failure else ""


def prove_client(
    cluster: Cluster, pod: Pod, config: StorageConfig, store: Bucket, canary: str, *, timeout_s: float
) -> ClientState:
    """Prove that one client uses a storage: by its `.config`, then by a block written through its mount.

    Only the block is conclusive: a client may show the new bucket and still write to the old one.

    Args:
        cluster: Where the mount pod is.
        pod: The mount pod.
        config: The storage that the client must use.
        store: The bucket behind it.
        canary: Name of the file in the volume's root. It is removed again.
        timeout_s: How long the write may take, in seconds.

    Raises:
        StorageSwitchError: The pod or the store cannot be asked.
    """
    form = read_config(cluster, pod).get("Format") or {}
    if form.get("Storage") != config.storage or form.get("Bucket") != config.bucket:
        options = ", ".join(storage_overrides(mount_options(pod)))
        remedy = f": its mount options say {options}; remove them and restart it" if options else ""
        return ClientState(f"its .config shows bucket {form.get('Bucket')!r}{remedy}")
    if form.get("AccessKey") != config.access_key.get_secret_value():
        return ClientState("its .config shows another access key")
    path = mount_path(pod)
    result = run_in_mount(cluster, pod.name, _WRITE_CANARY, path, canary, timeout_s=timeout_s)
    try:
        keys = OBJECT_KEY.findall(result.stdout)
        written = result.returncode == 0 and bool(keys)
        missing = [key for key in keys if not store.exists(key)] if written else []
        if written and not missing:
            return ClientState()
        failure = f"a file cannot be written through its mount (exit code {result.returncode}): {result.stderr[-300:]}"
        problem = f"a block written through its mount is not in {config.bucket}: {missing[0]}" if written else failure
        with suppress(StorageSwitchError):  # the reason is left out then
            if warning := reload_warning(cluster.log_tail(pod.name, _LOG_LINES, MOUNT_CONTAINER)):
                return ClientState(f"it could not use the setting that it had read ({warning}); {problem}", stuck=True)
        return ClientState(problem, stuck=written)
    finally:
        # Only now: a volume without trash deletes the block together with the file.
        run_in_mount(cluster, pod.name, _REMOVE_CANARY, path, canary)

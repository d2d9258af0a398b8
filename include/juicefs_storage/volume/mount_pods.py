"""The mount pods of a volume: which they are, and what the client in each of them believes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.ports import Cluster, ExecResult, Pod
from include.juicefs_storage.volume.setting import Setting, StorageConfig

MOUNT_POD_SELECTOR = "app.kubernetes.io/name=juicefs-mount"
MOUNT_CONTAINER = "jfs-mount"
_PARALLEL_PODS = 8
_MOUNT_PATH = re.compile(r"(?<=\s)(/jfs/[^\s'\"]+)")
#: Where the driver's command for a mount pod turns from `format` to the mount itself.
_MOUNT_COMMAND = re.compile(r"mount\.juicefs\s|juicefs\s+mount\s")
_FORMAT_BUCKET = re.compile(r"--bucket[= ]['\"]?([^\s'\"]+)")
_OVERRIDE = re.compile(r"(?:^|--|[\s,'\"])(?P<option>(?:bucket|storage)[= ][^\s,'\"]+)")
# Fixed text; values arrive as positional arguments. /bin/sh of the mount image is enough.
_READ_CONFIG = 'cat "$1/.config"'
_READ_STATS = 'cat "$1/.stats"'
_REQUEST_ERRORS = "juicefs_object_request_errors"


class MountPod(BaseModel):
    """A mount pod of the volume, as recorded before the switch and proven after it."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    name: str
    uid: str
    node: str
    restarts: int
    volume_id: str
    mount_path: str
    storage: str
    bucket: str
    heartbeat_s: float
    writeback: bool
    read_only: bool
    version: str
    request_errors: float
    #: Blocks that wait in the cache of a writeback mount, and whether its options make them wait.
    staged_blocks: int = 0
    upload_delayed: bool = False
    #: `bucket=…`, `storage=…` among the options of the mount command.
    overrides: tuple[str, ...] = ()


def mount_path(pod: Pod) -> str:
    """Where a mount pod mounts its volume, from its command line.

    Raises:
        PermanentError: The command names no path below /jfs.
    """
    for command in pod.commands:
        if found := _MOUNT_PATH.search(command):
            return found.group(1)
    raise PermanentError(
        f"Mount pod {pod.name}: expected a mount path below /jfs in its command, found none.",
        next_step=f"kubectl -n {pod.namespace} describe pod {pod.name}",
    )


def run_in_mount(cluster: Cluster, pod: str, script: str, *args: str, timeout_s: float = 30) -> ExecResult:
    """Run a fixed script of `sh` in the container of a mount pod.

    Args:
        cluster: Where the pod is.
        pod: Its name.
        script: Fixed text, never put together from values.
        args: The script's positional arguments.
        timeout_s: How long it may run, in seconds.

    Raises:
        PermanentError: The connection's user may not exec here.
        TransientError: It was not started, or its answer was lost.
    """
    command = ["sh", "-c", script, "sh", *args]
    return cluster.exec(pod, MOUNT_CONTAINER, command, timeout_s=timeout_s)


def read_config(cluster: Cluster, pod: Pod) -> dict[str, Any]:
    """What the client in a mount pod believes: `.config` of its mount. Holds keys: never log it."""
    path = mount_path(pod)
    result = run_in_mount(cluster, pod.name, _READ_CONFIG, path)
    try:
        config = json.loads(result.stdout)
    except ValueError:
        config = None
    if result.returncode != 0 or not isinstance(config, dict):
        raise TransientError(
            f"Mount pod {pod.name}: {path}/.config cannot be read (exit code {result.returncode}).",
            next_step=f"kubectl -n {pod.namespace} logs {pod.name}",
        )
    return config


def _read_stats(cluster: Cluster, pod: Pod) -> Mapping[str, float]:
    """The counters of a client without labels (`.stats`)."""
    result = run_in_mount(cluster, pod.name, _READ_STATS, mount_path(pod))
    rows = (line.split() for line in result.stdout.splitlines())
    return {row[0]: float(row[1]) for row in rows if len(row) == 2}


def request_errors(cluster: Cluster, mounts: Sequence[MountPod]) -> dict[str, int]:
    """How many object requests failed in each client since it started; each try counts, whatever the request was for.

    Returns:
        Name of the mount pod to number; those that are not the same pods any more are left out.
    """
    uids = {mount.uid for mount in mounts}
    pods = [pod for pod in cluster.pods(MOUNT_POD_SELECTOR) if pod.uid in uids]
    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        found = pool.map(lambda pod: _read_stats(cluster, pod).get(_REQUEST_ERRORS, 0.0), pods)
        return {pod.name: int(errors) for pod, errors in zip(pods, found, strict=True)}


def storage_overrides(options: str) -> tuple[str, ...]:
    """`bucket=…` and `storage=…` among mount options: a client that has them does not follow the setting."""
    return tuple(found["option"] for found in _OVERRIDE.finditer(options))


def mount_options(pod: Pod) -> str:
    """The mount command without the `format` before it, which names the bucket as well."""
    return " ".join(_MOUNT_COMMAND.split(command, maxsplit=1)[-1] for command in pod.commands)


def stale_mount_pods(cluster: Cluster, known: Sequence[MountPod], target: StorageConfig) -> list[Pod]:
    """Mount pods that (re)started since `known` was recorded, whose `format` names another bucket than the target.

    They may belong to another volume, where these have something in common.
    """
    restarts = {mount.uid: mount.restarts for mount in known}
    volumes = {mount.volume_id for mount in known}
    return [
        pod
        for pod in cluster.pods(MOUNT_POD_SELECTOR)
        if restarts.get(pod.uid) != pod.restarts
        and (bucket := _format_bucket(pod)) not in {None, target.bucket}
        and (not volumes or pod.labels.get("volume-id") in volumes or bucket in {mount.bucket for mount in known})
    ]


def _format_bucket(pod: Pod) -> str | None:
    """The bucket that a mount pod's `format` writes into the setting as it starts."""
    commands = (_MOUNT_COMMAND.split(command, maxsplit=1)[0] for command in pod.commands)
    return next((found[1] for command in commands if (found := _FORMAT_BUCKET.search(command))), None)


def mount_pods_naming(cluster: Cluster, bucket: str) -> list[str]:
    """Names of the mount pods whose command names a bucket: started anew, such a pod writes it into the setting."""
    return sorted(pod.name for pod in cluster.pods(MOUNT_POD_SELECTOR) if _format_bucket(pod) == bucket)


def find_mount_pods(cluster: Cluster, setting: Setting) -> list[MountPod]:
    """Every mount pod that serves this volume, told by the UUID in its `.config`."""
    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        found = pool.map(lambda pod: _mount_pod(cluster, pod, setting), cluster.pods(MOUNT_POD_SELECTOR))
    return sorted((mount for mount in found if mount), key=lambda mount: mount.name)


def _mount_pod(cluster: Cluster, pod: Pod, setting: Setting) -> MountPod | None:
    config = read_config(cluster, pod)
    form, meta, chunk = config.get("Format") or {}, config.get("Meta") or {}, config.get("Chunk") or {}
    if form.get("UUID") != setting.uuid:
        return None
    stats = _read_stats(cluster, pod)
    return MountPod(
        name=pod.name,
        uid=pod.uid,
        node=pod.node,
        restarts=pod.restarts,
        volume_id=pod.labels.get("volume-id", ""),
        mount_path=mount_path(pod),
        storage=form.get("Storage", ""),
        bucket=form.get("Bucket", ""),
        heartbeat_s=float(meta.get("Heartbeat", 0)) / 1e9,
        writeback=bool(chunk.get("Writeback")),
        read_only=bool(meta.get("ReadOnly")),
        version=str(config.get("Version", "")),
        request_errors=stats.get(_REQUEST_ERRORS, 0.0),
        staged_blocks=int(stats.get("juicefs_staging_blocks", 0)),
        upload_delayed=bool(chunk.get("UploadDelay") or chunk.get("UploadHours")),
        overrides=storage_overrides(mount_options(pod)),
    )

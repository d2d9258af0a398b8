"""The volume's clients: mount pods, what each of them believes, and the proof of where it writes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from include.juicefs_storage.errors import PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.ports import Cluster, ExecResult, ObjectStore, PersistentVolume, Pod, Session
from include.juicefs_storage.volume.setting import Setting, StorageConfig

MOUNT_POD_SELECTOR = "app.kubernetes.io/name=juicefs-mount"
MOUNT_CONTAINER = "jfs-mount"
_MOUNT_PATH = re.compile(r"(?<=\s)(/jfs/[^\s'\"]+)")
OBJECT_KEY = re.compile(r"\S+/chunks/\S+_\d+_\d+")
_PARALLEL_PODS = 8
#: Where the driver's command for a mount pod turns from `format` to the mount itself.
_MOUNT_COMMAND = re.compile(r"mount\.juicefs\s|juicefs\s+mount\s")
_FORMAT_BUCKET = re.compile(r"--bucket[= ]['\"]?([^\s'\"]+)")
_OVERRIDE = re.compile(r"(?:^|--|[\s,'\"])(?P<option>(?:bucket|storage)[= ][^\s,'\"]+)")

# Fixed text; values arrive as positional arguments. /bin/sh of the mount image is enough.
_READ_CONFIG = 'cat "$1/.config"'
_READ_STATS = 'cat "$1/.stats"'
_WRITE_CANARY = """\
set -e
dd if=/dev/urandom of="$1/$2" bs=4096 count=1 conv=fsync 2>/dev/null
/usr/local/bin/juicefs info "$1/$2"
"""
_REMOVE_CANARY = 'rm -f "$1/$2"'
_REACH_TIMEOUT_S = 30
#: What the images hold: curl, which also proves that the pod trusts the certificate; bash, which only connects.
_REACH = """\
if command -v curl >/dev/null 2>&1; then
  exec curl --silent --show-error --output /dev/null --max-time 10 "$1/"
elif command -v bash >/dev/null 2>&1 && command -v timeout >/dev/null 2>&1; then
  exec timeout 10 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$2" "$3"
fi
exit 69
"""
_CANNOT_ASK = 69
_RELOAD_FAILURE = re.compile(r"<WARNING>: object storage: ([^\n]*)")
_LOG_LINES = 300
_REQUEST_ERRORS = "juicefs_object_request_errors"


class MountPod(BaseModel):
    """A mount pod of the volume, as recorded before the switch and proven after it."""

    model_config = ConfigDict(frozen=True)

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


class ClientState(NamedTuple):
    """How a client stands to a storage.

    Attributes:
        problem: What was found instead of the proof; empty when proven.
        stuck: It has read the setting and does not use what it says: it tries again only when the setting changes.
    """

    problem: str = ""
    stuck: bool = False


class PodIdentity(BaseModel):
    """What must not change about a pod that goes on running."""

    model_config = ConfigDict(frozen=True)

    namespace: str
    name: str
    uid: str
    node: str
    restarts: int


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


def _in_pod(cluster: Cluster, pod: str, script: str, *args: str, timeout_s: float = 30) -> ExecResult:
    command = ["sh", "-c", script, "sh", *args]
    return cluster.exec(pod, MOUNT_CONTAINER, command, timeout_s=timeout_s)


def read_config(cluster: Cluster, pod: Pod) -> dict[str, Any]:
    """What the client in a mount pod believes: `.config` of its mount. Holds keys: never log it."""
    path = mount_path(pod)
    result = _in_pod(cluster, pod.name, _READ_CONFIG, path)
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
    result = _in_pod(cluster, pod.name, _READ_STATS, mount_path(pod))
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


def _mount_options(pod: Pod) -> str:
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
        overrides=storage_overrides(_mount_options(pod)),
    )


def cannot_reach(cluster: Cluster, pod: str, container: str, endpoint: str) -> str | None:
    """Connect from a pod to an endpoint, without keys: any answer will do.

    Args:
        cluster: Where the pod is.
        pod: Its name.
        container: Its container.
        endpoint: `http(s)://host[:port]`.

    Returns:
        The empty string where it can be reached, what is wrong where it cannot, None where the pod could not be asked.
    """
    url = urlsplit(endpoint)
    port = url.port or {"http": 80, "https": 443}[url.scheme]
    command = ["sh", "-c", _REACH, "sh", endpoint, url.hostname or "", str(port)]
    try:
        result = cluster.exec(pod, container, command, timeout_s=_REACH_TIMEOUT_S)
    except TransientError:
        return None
    if result.returncode in {_CANNOT_ASK, 126, 127}:
        return None
    if result.returncode == 0:
        return ""
    return next(iter(result.stderr.splitlines()), f"exit code {result.returncode}")[:200]


def business_pods(cluster: Cluster, volumes: Sequence[PersistentVolume]) -> list[PodIdentity]:
    """The pods that use the volume through a claim, in whatever namespace they are."""
    claims = {(volume.claim_namespace, volume.claim_name) for volume in volumes if volume.claim_name}
    return [
        PodIdentity(namespace=pod.namespace, name=pod.name, uid=pod.uid, node=pod.node, restarts=pod.restarts)
        for namespace in sorted({namespace for namespace, _ in claims})
        for pod in cluster.pods(namespace=namespace)
        if any((namespace, claim) in claims for claim in pod.claims)
    ]


def unknown_sessions(sessions: Sequence[Session], mount_paths: Iterable[str]) -> list[Session]:
    """Sessions of clients that are not among the mount pods and so cannot be proven.

    The last part of the mount point (`<volume id>-<6 random characters>`) tells a mount pod's session.
    """
    known = {PurePosixPath(path).name for path in mount_paths}
    return [session for session in sessions if PurePosixPath(session.mount_point).name not in known]


def reload_warning(client_log: str) -> str:
    """Why a client could not use the setting that it found last; empty where its log tells of no failure.

    `found new configuration: …`, then `object storage: …` where that failed (NewReloadableStorage in cmd/mount.go of
    JuiceFS 1.4): it keeps the storage that it has, and does not try again before the setting changes.
    """
    _, found, since = client_log.rpartition("found new configuration:")
    failure = _RELOAD_FAILURE.search(since) if found else None
    return failure[1][:200] if failure else ""


def canary_name(salt: str) -> str:
    """How the names of the files begin that prove mounts: the same for the same salt, so that a repeat removes them."""
    return f".storage-switch-{hashlib.sha256(salt.encode()).hexdigest()[:12]}"


def prove_client(
    cluster: Cluster, pod: Pod, config: StorageConfig, store: ObjectStore, canary: str, *, timeout_s: float
) -> ClientState:
    """Prove that one client uses a storage: by its `.config`, then by a block written through its very mount.

    The file `canary` in the volume's root is removed again.

    Only the block is conclusive: a client may show the new bucket and still write to the old one.
    """
    form = read_config(cluster, pod).get("Format") or {}
    if form.get("Storage") != config.storage or form.get("Bucket") != config.bucket:
        options = ", ".join(storage_overrides(_mount_options(pod)))
        remedy = f": its mount options say {options}; remove them and start it anew" if options else ""
        return ClientState(f"its .config shows bucket {form.get('Bucket')!r}{remedy}")
    if form.get("AccessKey") != config.access_key.get_secret_value():
        return ClientState("its .config shows another access key")
    path = mount_path(pod)
    result = _in_pod(cluster, pod.name, _WRITE_CANARY, path, canary, timeout_s=timeout_s)
    try:
        keys = OBJECT_KEY.findall(result.stdout)
        written = result.returncode == 0 and bool(keys)
        missing = [key for key in keys if not store.exists(key)] if written else []
        if written and not missing:
            return ClientState()
        failure = f"a file cannot be written through its mount (exit code {result.returncode}): {result.stderr[-300:]}"
        problem = f"a block written through its mount is not in {config.bucket}: {missing[0]}" if written else failure
        with suppress(StorageSwitchError):  # it is told without the reason then
            if warning := reload_warning(cluster.log_tail(pod.name, _LOG_LINES, MOUNT_CONTAINER)):
                return ClientState(f"it could not use the setting that it had read ({warning}); {problem}", stuck=True)
        return ClientState(problem, stuck=written)
    finally:
        # Only now: a volume without trash deletes the block together with the file.
        _in_pod(cluster, pod.name, _REMOVE_CANARY, path, canary)

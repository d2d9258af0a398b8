"""The mount pods of a volume: which they are, and what the client in each of them believes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict

from include.juicefs_storage.errors import PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.ports import Cluster, ExecResult, PersistentVolume, Pod, PodAccess, SecretObject
from include.juicefs_storage.volume.clusters import FIRST, Clusters, cluster_of, kubectl, name_in
from include.juicefs_storage.volume.format_command import MOUNT_COMMAND, find_format
from include.juicefs_storage.volume.secret import volume_secrets
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from include.juicefs_storage.volume.users import PodIdentity, business_pods

MOUNT_POD_SELECTOR = "app.kubernetes.io/name=juicefs-mount"
MOUNT_CONTAINER = "jfs-mount"
#: What the driver says about whom a mount pod serves: the PV's volume handle (or what several PVs share), and the UUID.
VOLUME_ID_LABEL, UUID_ANNOTATION = "volume-id", "juicefs-uuid"
_DRIVER_COPY = re.compile(r"juicefs-(.+)-secret")
_PARALLEL_PODS = 8
_MOUNT_PATH = re.compile(r"(?<=\s)(/jfs/[^\s'\"]+)")
_OVERRIDE = re.compile(r"(?:^|--|[\s,'\"])(?P<option>(?:bucket|storage)[= ][^\s,'\"]+)")
# Fixed text; values arrive as positional arguments. /bin/sh of the mount image is enough.
# A mount with the option prefix-internal has them as `.jfs.config` and `.jfs.stats`.
_READ_CONFIG = 'cat "$1/.config" 2>/dev/null || cat "$1/.jfs.config"'
_READ_STATS = 'cat "$1/.stats" 2>/dev/null || cat "$1/.jfs.stats"'
_REQUEST_ERRORS = "juicefs_object_request_errors"

log = logging.getLogger(__name__)


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
    #: What it holds in memory for files that are read and written, and its uploads under way.
    buffered_bytes: int = 0
    uploading: int = 0
    #: Blocks that wait in the cache of a writeback mount, and whether its options make them wait.
    staged_blocks: int = 0
    upload_delayed: bool = False
    #: `bucket=…`, `storage=…` among the options of the mount command.
    overrides: tuple[str, ...] = ()

    @property
    def load(self) -> str:
        """What the client holds and has under way, in words."""
        buffered = f"{self.buffered_bytes / 2**20:,.1f} MiB in its buffers"
        return f"{buffered}, {counted(self.uploading, 'upload')}, {counted(self.staged_blocks, 'staged block')}"


def find_mount_path(pod: Pod) -> str:
    """Return where a mount pod mounts its volume, by its command; empty where that names no path below /jfs."""
    return next((found[1] for command in pod.commands if (found := _MOUNT_PATH.search(command))), "")


def mount_path(pod: Pod) -> str:
    """Return what `find_mount_path` finds.

    Raises:
        PermanentError: The command names no path below /jfs.
    """
    if path := find_mount_path(pod):
        return path
    raise PermanentError(
        f"Mount pod {pod.name}: expected a mount path below /jfs in its command, found none.",
        next_step=kubectl(pod.namespace, "describe pod", pod.name),
    )


def run_in_mount(cluster: PodAccess, pod: str, script: str, *args: str, timeout_s: float = 30) -> ExecResult:
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


def read_config(cluster: PodAccess, pod: Pod) -> dict[str, Any]:
    """Read what the client in a mount pod believes: `.config` of its mount. Holds keys: never log it."""
    path = mount_path(pod)
    result = run_in_mount(cluster, pod.name, _READ_CONFIG, path)
    try:
        config = json.loads(result.stdout)
    except ValueError:
        config = None
    if result.returncode != 0 or not isinstance(config, dict) or not isinstance(config.get("Format"), dict):
        raise TransientError(
            f"Mount pod {pod.name}: {path}/.config cannot be read (exit code {result.returncode}).",
            next_step=kubectl(pod.namespace, "logs", pod.name),
        )
    return config


def _read_stats(cluster: PodAccess, pod: Pod) -> Mapping[str, float]:
    """Read the counters of a client without labels (`.stats`)."""
    result = run_in_mount(cluster, pod.name, _READ_STATS, mount_path(pod))
    rows = (line.split() for line in result.stdout.splitlines())
    return {row[0]: float(row[1]) for row in rows if len(row) == 2}


def request_errors(clusters: Clusters, mounts: Sequence[MountPod]) -> dict[str, int]:
    """Count the object requests that failed in each client since it started; each try counts, of whatever request.

    Returns:
        Name of the mount pod to number; those that are not the same pods any more, or cannot be asked, are left out.
    """
    uids = {mount.uid for mount in mounts}
    pods = [pod for pod in mount_pods_seen(clusters)[0] if pod.uid in uids]

    def errors(pod: Pod) -> int | None:
        try:
            return int(_read_stats(clusters, pod).get(_REQUEST_ERRORS, 0.0))
        except StorageSwitchError:
            return None

    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        counted = zip(pods, pool.map(errors, pods), strict=True)
        return {pod.name: number for pod, number in counted if number is not None}


def storage_overrides(options: str) -> tuple[str, ...]:
    """Return `bucket=…` and `storage=…` among mount options: a client that has them does not follow the setting."""
    return tuple(found["option"] for found in _OVERRIDE.finditer(options))


def mount_options(pod: Pod) -> str:
    """Return the mount command without the `format` before it, which names the bucket as well."""
    return " ".join(MOUNT_COMMAND.split(command, maxsplit=1)[-1] for command in pod.commands)


def stale_mount_pods(clusters: Clusters, known: Sequence[MountPod], target: StorageConfig) -> list[Pod]:
    """Find mount pods that (re)started since `known` was recorded and whose `format` names another bucket.

    A pod of another volume is among them where it shares a volume id or a bucket with this one.

    Args:
        clusters: Where the pods are; those of another cluster than the first that does not answer are not seen.
        known: The volume's mount pods as recorded.
        target: The storage that the clients must use.
    """
    restarts = {mount.uid: mount.restarts for mount in known}
    volumes = {name_in(cluster_of(mount.name), mount.volume_id) for mount in known}
    return [
        pod
        for pod in mount_pods_seen(clusters)[0]
        if not pod.terminating
        and restarts.get(pod.uid) != pod.restarts
        and (bucket := _format_bucket(pod)) not in {None, target.bucket}
        and (
            not volumes
            or name_in(cluster_of(pod.name), pod.labels.get(VOLUME_ID_LABEL, "")) in volumes
            or bucket in {mount.bucket for mount in known}
        )
    ]


def _format_bucket(pod: Pod) -> str | None:
    """Return the bucket that a mount pod's `format` writes into the setting as it starts; None where it writes none."""
    found = find_format(pod.commands)
    return found.bucket if found and found.updates and found.bucket else None


def mount_pods_naming(cluster: PodAccess, bucket: str) -> list[str]:
    """Name the mount pods whose command names a bucket: restarted, such a pod writes it into the setting."""
    return sorted(pod.name for pod in running_mount_pods(cluster) if _format_bucket(pod) == bucket)


def running_mount_pods(cluster: PodAccess) -> list[Pod]:
    """List the mount pods of all volumes, without those that have ended: these serve nobody."""
    return [pod for pod in cluster.pods(MOUNT_POD_SELECTOR) if not pod.ended]


def mount_pods_seen(clusters: Clusters) -> tuple[list[Pod], dict[str, StorageSwitchError]]:
    """List the mount pods as `running_mount_pods` does, without those of other clusters that do not answer.

    Returns:
        The pods, and the error of each cluster that does not answer, by its name.

    Raises:
        StorageSwitchError: The first cluster does not answer.
    """
    found, silent = clusters.pods_seen(MOUNT_POD_SELECTOR)
    if error := silent.get(FIRST):
        raise error
    return [pod for pod in found if not pod.ended], silent


@dataclass(frozen=True)
class VolumeInCluster:
    """A volume in one cluster: what there belongs to it, by its Secrets."""

    cluster: Cluster
    setting: Setting
    secret_name: str

    @cached_property
    def _secrets(self) -> list[SecretObject]:
        return volume_secrets(self.cluster, self.secret_name, self.setting.name)

    @cached_property
    def persistent_volumes(self) -> list[PersistentVolume]:
        """The PVs that mount this volume, by their Secrets."""
        names, ids = {(secret.namespace, secret.name) for secret in self._secrets}, self._copies
        return [
            volume
            for volume in self.cluster.persistent_volumes()
            if (volume.secret_namespace, volume.secret_name) in names or volume.volume_handle in ids
        ]

    def volumes_of(self, mounts: Sequence[MountPod]) -> list[PersistentVolume]:
        """List the PVs that mount this volume: by their Secrets, or served by one of these mount pods there."""
        served, names = _served(self.cluster, mounts), {volume.name for volume in self.persistent_volumes}
        return [*self.persistent_volumes, *(volume for volume in served if volume.name not in names)]

    @property
    def _copies(self) -> set[str]:
        """The volume ids for which the driver has made a copy of the Secret: `juicefs-<volume id>-secret`."""
        return {found[1] for secret in self._secrets if (found := _DRIVER_COPY.fullmatch(secret.name))}

    @cached_property
    def volume_ids(self) -> frozenset[str]:
        """What the label `volume-id` of the volume's mount pods may be."""
        return frozenset({volume.volume_handle for volume in self.persistent_volumes} | self._copies)

    def belongs(self, pod: Pod) -> bool:
        """Return whether a mount pod serves this volume by its volume-id and the driver's annotation."""
        return (
            pod.annotations.get(UUID_ANNOTATION) == self.setting.uuid
            or pod.labels.get(VOLUME_ID_LABEL, "") in self.volume_ids
        )


@dataclass(frozen=True)
class VolumePods:
    """The mount pods of one volume, among those of all volumes.

    The UUID in the `.config` of a mount decides which volume a pod serves. A pod that cannot be asked counts as this
    volume's only if its cluster says so, see `belongs`: another volume's broken pod does not affect a run.

    Attributes:
        clusters: Where the pods are.
        setting: The volume's setting.
        secret_name: The volume's Secret, in each cluster.
    """

    clusters: Clusters
    setting: Setting
    secret_name: str

    @cached_property
    def by_cluster(self) -> dict[str, VolumeInCluster]:
        """The volume in each cluster, by the cluster's name."""
        return {
            name: VolumeInCluster(cluster, self.setting, self.secret_name)
            for name, cluster in self.clusters.each.items()
        }

    def served(self, mounts: Sequence[MountPod]) -> list[PersistentVolume]:
        """List the PVs that these mount pods serve, each in its own cluster."""
        return self.clusters.ask_all(lambda name, cluster: _served(cluster, mounts_in(name, mounts)))

    def business_pods(self, mounts: Sequence[MountPod]) -> list[PodIdentity]:
        """List the pods that use the volume through a claim: by the PVs of its Secrets, and those that these serve."""

        def read(name: str, cluster: Cluster) -> list[PodIdentity]:
            found = business_pods(cluster, self.by_cluster[name].volumes_of(mounts_in(name, mounts)))
            return [pod.model_copy(update={"namespace": name_in(name, pod.namespace)}) for pod in found]

        return self.clusters.ask_all(read)

    def belongs(self, pod: Pod) -> bool:
        """Return whether a mount pod serves this volume, by what its own cluster says."""
        return self.by_cluster[cluster_of(pod.name)].belongs(pod)

    def config(self, pod: Pod) -> dict[str, Any] | None:
        """Read what the client in a mount pod believes, see `read_config`; None where the pod serves another volume.

        Raises:
            StorageSwitchError: The pod serves this volume and cannot be asked.
        """
        try:
            config = read_config(self.clusters, pod)
        except StorageSwitchError as error:
            # One that is being deleted has a session for as long as its client lives: that is looked at.
            if pod.terminating or not self.belongs(pod):
                log.warning("%s Not of volume %s: left alone.", error.problem, self.setting.name)
                return None
            raise
        return config if config["Format"].get("UUID") == self.setting.uuid else None

    def mounts(self, among: Collection[str] | None = None) -> list[MountPod]:
        """List every mount pod that serves this volume and stays.

        Args:
            among: UIDs: only these are asked, so that no other pod is waited for.

        Raises:
            StorageSwitchError: A pod of this volume cannot be asked.
        """
        pods = [
            pod
            for pod in running_mount_pods(self.clusters)
            if not pod.terminating and (among is None or pod.uid in among)
        ]
        with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
            found = pool.map(self._mount, pods)
            return sorted((mount for mount in found if mount), key=lambda mount: mount.name)

    def leaving(self) -> list[str]:
        """List the mount paths of the pods, of whichever volume, that are being deleted and may still run."""
        return [path for pod in running_mount_pods(self.clusters) if pod.terminating and (path := find_mount_path(pod))]

    def _mount(self, pod: Pod) -> MountPod | None:
        config = self.config(pod)
        return _mount_pod(pod, config, _read_stats(self.clusters, pod)) if config else None


def mounts_in(cluster: str, mounts: Sequence[MountPod]) -> list[MountPod]:
    """Return those of some mount pods that are in a cluster."""
    return [mount for mount in mounts if cluster_of(mount.name) == cluster]


def _served(cluster: Cluster, mounts: Sequence[MountPod]) -> list[PersistentVolume]:
    handles = {mount.volume_id for mount in mounts}
    return [volume for volume in cluster.persistent_volumes() if volume.volume_handle in handles]


def _mount_pod(pod: Pod, config: Mapping[str, Any], stats: Mapping[str, float]) -> MountPod:
    form, meta, chunk = config["Format"], config.get("Meta") or {}, config.get("Chunk") or {}
    return MountPod(
        name=pod.name,
        uid=pod.uid,
        node=pod.node,
        restarts=pod.restarts,
        volume_id=pod.labels.get(VOLUME_ID_LABEL, ""),
        mount_path=mount_path(pod),
        storage=form.get("Storage", "").lower(),
        bucket=form.get("Bucket", ""),
        heartbeat_s=float(meta.get("Heartbeat", 0)) / 1e9,
        writeback=bool(chunk.get("Writeback")),
        read_only=bool(meta.get("ReadOnly")),
        version=str(config.get("Version", "")),
        request_errors=stats.get(_REQUEST_ERRORS, 0.0),
        buffered_bytes=int(stats.get("juicefs_used_buffer_size_bytes", 0)),
        uploading=int(stats.get("juicefs_object_request_uploading", 0)),
        staged_blocks=int(stats.get("juicefs_staging_blocks", 0)),
        upload_delayed=bool(chunk.get("UploadDelay") or chunk.get("UploadHours")),
        overrides=storage_overrides(mount_options(pod)),
    )

"""What carries the values of another store than the one that a volume is to use, and may bring them back.

Each start of the driver's containers runs `juicefs format`, see `format_command`. So a pod that was made before the
setting changed writes the old values back when its container restarts, provided that the old store takes them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import SecretStr

from include.juicefs_storage.ports import Cluster, Pod, SecretObject
from include.juicefs_storage.volume.clusters import FIRST, name_in
from include.juicefs_storage.volume.csi import CSI_CONFIG_MAP
from include.juicefs_storage.volume.format_command import FormatCommand, find_format
from include.juicefs_storage.volume.mount_pods import (
    MOUNT_POD_SELECTOR,
    VOLUME_ID_LABEL,
    VolumeInCluster,
    VolumePods,
    storage_overrides,
)
from include.juicefs_storage.volume.secret import desired_values, holds_volume, volume_secrets, written_by_format
from include.juicefs_storage.volume.setting import StorageConfig

CarrierKind = Literal["mount pod", "pod", "Secret", "workload", "PersistentVolume", "StorageClass", "ConfigMap"]
#: What brings the values of each kind back.
_BY: Mapping[CarrierKind, str] = {
    "mount pod": "a restart of its container",
    "pod": "a restart of its container",
    "Secret": "the next mount pod that is made by it",
    "workload": "its own client, which does not follow the setting where it names the store",
    "PersistentVolume": "its next mount pod, which does not follow the setting",
    "StorageClass": "the next volume of this class, which does not follow the setting",
    "ConfigMap": "the next mount pod, which does not follow the setting",
}
_SETTINGS_KEY, _FORMAT_KEY = "jfsSettings", "FormatCmd"
#: Sidecars, and whatever else mounts by itself, beside the driver's own containers.
_OWN_CONTAINERS = frozenset({"juicefs-csi-controller", "juicefs-csi-node"})


@dataclass(frozen=True)
class Carrier:
    """One object with other values.

    Attributes:
        kind: What it is.
        namespace: Where it is; empty where it has none.
        name: Its name.
        found: Which values it has, in words: no key is among them.
        writes: What it would write into the setting, with the keys that it would have then; None where it writes
            nothing. Left out of `repr`.
        by: What brings its values back.
        cluster: The name of its cluster.
    """

    kind: CarrierKind
    namespace: str
    name: str
    found: str
    writes: StorageConfig | None = field(default=None, repr=False)
    by: str = ""
    cluster: str = FIRST

    @property
    def line(self) -> str:
        """Say what it has and what would bring that back."""
        where = name_in(self.cluster, f"{self.namespace}/{self.name}" if self.namespace else self.name)
        # `format` tries the store before it writes.
        what = "writes it into the setting, if that store takes its keys" if self.writes else "leaves the setting alone"
        by = self.by or _BY[self.kind]
        return f"{self.kind} `{where}`: {self.found}; {by}" + (f" {what}" if self.kind in _FORMATS else "")


_FORMATS = frozenset({"mount pod", "pod", "Secret"})


def find_carriers(
    pods: VolumePods,
    secret_name: str,
    target: StorageConfig,
    *,
    left: Collection[str] = (),
    will_patch: bool = False,
) -> list[Carrier]:
    """Find everything that carries the values of another store or key than a volume is to use. Reads only.

    Args:
        pods: The volume's mount pods; their clusters are looked through.
        secret_name: The volume's Secret, in each cluster.
        target: What the volume uses, or will use.
        left: The buckets, as the setting named them, that the volume leaves or has left.
        will_patch: The Secrets of the driver's namespace get the target's values before anything else happens.

    Raises:
        StorageSwitchError: A cluster cannot be read.
    """
    return pods.clusters.ask_all(
        lambda name, _: [
            replace(carrier, cluster=name)
            for carrier in _in_cluster(pods.by_cluster[name], secret_name, target, left=left, will_patch=will_patch)
        ]
    )


def _in_cluster(
    pods: VolumeInCluster, secret_name: str, target: StorageConfig, *, left: Collection[str], will_patch: bool
) -> list[Carrier]:
    cluster = pods.cluster
    secrets = volume_secrets(cluster, secret_name, pods.setting.name)
    keys = {secret.name: _secret_key(secret, target if will_patch else None) for secret in secrets}
    elsewhere = [
        secret
        for secret in cluster.secrets_everywhere() or ()
        if secret.namespace != cluster.namespace and holds_volume(secret, secrets[0])
    ]
    return [
        *_of_pods(pods, keys, target),
        *(found for secret in secrets for found in _of_secret(secret, target, patched=will_patch)),
        *(found for secret in elsewhere for found in _of_secret(secret, target, patched=False)),
        *_of_workloads(cluster, {bucket for bucket in left if bucket != target.bucket}),
        *_of_options(cluster, pods, {(secret.namespace, secret.name) for secret in secrets}),
    ]


def _secret_key(secret: SecretObject, target: StorageConfig | None) -> str:
    """Return the secret key that a container gets from a Secret, as it is or as the target has it."""
    values = {**secret.data, **(desired_values(secret, target) if target else {})}
    return values.get("secretkey") or values.get("secret-key", "")


def _of_pods(pods: VolumeInCluster, keys: Mapping[str, str], target: StorageConfig) -> Iterator[Carrier]:
    cluster = pods.cluster
    namespaces = sorted({volume.claim_namespace for volume in pods.persistent_volumes if volume.claim_namespace})
    mount_pods = cluster.pods(MOUNT_POD_SELECTOR)
    known = {pod.uid for pod in mount_pods}
    others = [pod for namespace in [None, *namespaces] for pod in cluster.pods(namespace=namespace)]
    for pod in mount_pods:
        if pods.belongs(pod):
            yield from _of_pod("mount pod", pod, keys, target)
    for pod in {pod.uid: pod for pod in others if pod.uid not in known}.values():
        if pod.labels.get("app") not in _OWN_CONTAINERS and _names_volume(pod, pods.setting.name):
            yield from _of_pod("pod", pod, keys, target)


def _names_volume(pod: Pod, name: str) -> bool:
    found = find_format(pod.commands)
    return found is not None and found.volume == name


def _of_pod(kind: CarrierKind, pod: Pod, keys: Mapping[str, str], target: StorageConfig) -> Iterator[Carrier]:
    command = None if pod.ended else find_format(pod.commands)
    if command and _differs(command, target):
        secret_key = keys.get(f"juicefs-{pod.labels.get(VOLUME_ID_LABEL, '')}-secret", "")
        yield Carrier(
            kind, pod.namespace, pod.name, f"its command names {command.bucket}", _written(command, secret_key)
        )


def _differs(command: FormatCommand, target: StorageConfig) -> bool:
    other_key = command.access_key and command.access_key != target.access_key.get_secret_value()
    return bool(command.bucket) and (command.bucket != target.bucket or bool(other_key))


def _written(command: FormatCommand, secret_key: str) -> StorageConfig | None:
    if not (command.updates and command.storage and command.bucket):
        return None
    return StorageConfig(command.storage, command.bucket, SecretStr(command.access_key), SecretStr(secret_key))


def _of_secret(secret: SecretObject, target: StorageConfig, *, patched: bool) -> Iterator[Carrier]:
    wanted = desired_values(secret, target)
    differing = sorted(key for key, value in wanted.items() if secret.data.get(key) != value)
    if differing and not patched:
        bucket = secret.data.get("bucket", "")
        named = f" and names {bucket}" if bucket and bucket != target.bucket else ""
        yield Carrier(
            "Secret",
            secret.namespace,
            secret.name,
            f"has other values of {', '.join(differing)}{named}",
            written_by_format(secret.data),
        )
    if options := storage_overrides(secret.data.get("format-options", "")):
        yield Carrier("Secret", secret.namespace, secret.name, f"has format-options {', '.join(options)}")
    if (remembered := _remembered(secret)) and _differs(remembered[0], target):
        yield Carrier(
            "Secret",
            secret.namespace,
            secret.name,
            f"its `{_SETTINGS_KEY}` remember {remembered[0].bucket}",
            _written(*remembered),
            by="a mount pod that is made while the PersistentVolume's own Secret is gone",
        )


def _remembered(secret: SecretObject) -> tuple[FormatCommand, str] | None:
    """Read the command that the driver remembers for the case that the PersistentVolume's Secret is gone."""
    try:
        settings = json.loads(secret.data.get(_SETTINGS_KEY, "{}"))
    except ValueError:
        return None
    if not isinstance(settings, dict):
        return None
    command = find_format([str(settings.get(_FORMAT_KEY, ""))])
    key = settings.get("secret-key") or settings.get("secretkey") or ""
    return (command, str(key)) if command else None


def _of_workloads(cluster: Cluster, left: Collection[str]) -> Iterator[Carrier]:
    """Find workloads that name a store that the volume leaves in their own arguments."""
    for template in cluster.workload_templates() if left else ():
        for bucket in sorted(bucket for bucket in left if any(bucket in arg for arg in template.args)):
            name = f"{template.kind}/{template.name}"
            yield Carrier("workload", template.namespace, name, f"its arguments name {bucket}")


def _of_options(cluster: Cluster, pods: VolumeInCluster, secrets: set[tuple[str, str]]) -> Iterator[Carrier]:
    for volume in pods.persistent_volumes:
        if options := storage_overrides(",".join(volume.mount_options)):
            yield Carrier("PersistentVolume", "", volume.name, f"has mountOptions {', '.join(options)}")
    for storage_class in cluster.storage_classes():
        options = storage_overrides(",".join(storage_class.mount_options))
        if options and (storage_class.secret_namespace, storage_class.secret_name) in secrets:
            yield Carrier("StorageClass", "", storage_class.name, f"has mountOptions {', '.join(options)}")
    if options := storage_overrides(",".join(cluster.driver_mount_options())):
        found = f"has mountOptions {', '.join(options)}"
        yield Carrier("ConfigMap", cluster.namespace, CSI_CONFIG_MAP, found)


def restarts_that_write(carriers: Iterable[Carrier]) -> list[Carrier]:
    """List the pods whose restart writes other values into the setting."""
    return [carrier for carrier in carriers if carrier.kind in {"mount pod", "pod"} and carrier.writes]


def name_some(carriers: Sequence[Carrier], most: int = 5) -> str:
    """Name carriers, some of many.

    Args:
        carriers: Which.
        most: How many at most.
    """
    more = f" and {len(carriers) - most} more" if len(carriers) > most else ""
    return f"{', '.join(name_in(carrier.cluster, carrier.name) for carrier in carriers[:most])}{more}"

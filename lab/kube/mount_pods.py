"""What the CSI driver writes: the mount pod of a volume, its command, and the volume's own Secret."""

import hashlib
import json
import re
import secrets
import shlex
import string
import uuid
from dataclasses import dataclass
from functools import cached_property

from lab.kube.fuse import ADDRESS_IN_POD, FOLDER_IN_POD
from lab.kube.store import SECRETS, Obj, not_found

LABEL = "juicefs-mount"
FINALIZER = "juicefs.com/finalizer"
_CLI = "/usr/local/bin/juicefs"
#: The volume through which a client hands its FUSE descriptor to the driver, and its open files to the next client.
FUSE_VOLUME = "jfs-fuse-fd"
HASH_LABEL, UPGRADE_LABEL = "juicefs-hash", "juicefs-upgrade-uuid"
_IMAGE = "juicedata/mount:ce-v1.4.2"
#: In the driver's order; `secret-key` comes from the environment.
_FORMAT_KEYS = (
    "storage", "bucket", "access-key", "block-size", "compress", "trash-days", "capacity", "inodes", "shards",
)  # fmt: skip
_PATH = re.compile(r"exec /bin/mount\.juicefs \S+ (/jfs/\S+) ")
_CHECK_MOUNT = '#!/bin/sh\nwhile ! mount | grep "$1" | grep JuiceFS; do sleep 3; done\n'


@dataclass(frozen=True)
class Setting:
    """What the driver makes of a Secret and a PersistentVolume.

    Attributes:
        volume: The PersistentVolume.
        values: The Secret's values, decoded.
        format_command: Of the Secret, or what the volume's own Secret remembers of one that is gone.
        keeps_fuse: Whether csi-node keeps the FUSE descriptors of its mount pods.
    """

    volume: Obj
    values: dict[str, str]
    format_command: str
    keeps_fuse: bool = False

    @classmethod
    def of(cls, volume: Obj, values: dict[str, str], *, keeps_fuse: bool = False) -> "Setting":
        """Return the setting by a Secret's values; ApiError 404 where they lack the volume's name or metaurl."""
        return cls(volume, values, _format_command(values), keeps_fuse)

    @classmethod
    def remembered(cls, volume: Obj, values: dict[str, str], *, keeps_fuse: bool = False) -> "Setting":
        """Return the setting that the volume's own Secret remembers."""
        kept = json.loads(values["jfsSettings"])
        own = {"name": kept["name"], "metaurl": kept["metaurl"], "secret-key": kept.get("secret-key", "")}
        return cls(volume, own | {"envs": json.dumps(kept["envs_map"])}, kept["FormatCmd"], keeps_fuse)

    @property
    def unique_id(self) -> str:
        """Return what names mount pods and the volume's own Secret: the volume's handle."""
        return str(self.volume["spec"]["csi"]["volumeHandle"])

    @property
    def secret_name(self) -> str:
        """Return the name of the volume's own Secret."""
        return f"juicefs-{self.unique_id}-secret"

    @property
    def options(self) -> list[str]:
        """Return the mount options of the PersistentVolume."""
        return list(self.volume["spec"].get("mountOptions", []))

    @cached_property
    def envs(self) -> dict[str, str]:
        """Return the variables that the Secret's key `envs` adds to the client's environment."""
        return dict(json.loads(self.values.get("envs") or "{}"))

    @property
    def digest(self) -> str:
        """Return the hash that the driver labels mount pods with: another one, another mount pod."""
        return hashlib.sha256(json.dumps([self.values, self.options], sort_keys=True).encode()).hexdigest()[:63]

    def secret(self) -> dict[str, str]:
        """Return the values of the volume's own Secret."""
        setting = {
            "isCe": True, "name": self.values["name"], "metaurl": self.values["metaurl"],
            "source": self.values["metaurl"], "storage": self.values.get("storage", ""),
            "secret-key": self.values.get("secret-key", ""), "envs_map": self.envs, "UniqueId": self.unique_id,
            "MountPath": f"/jfs/{self.unique_id}", "Options": self.options, "FormatCmd": self.format_command,
            "SecretName": self.secret_name,
        }  # fmt: skip
        plain = {"metaurl": self.values["metaurl"], "jfsSettings": json.dumps(setting), "check_mount.sh": _CHECK_MOUNT}
        if self.values.get("secret-key"):
            plain["secretkey"] = self.values["secret-key"]
        return plain | self.envs

    def mount_pod(
        self, node: str, name: str, mount_path: str, upgrade_uuid: str = "", more: dict[str, str] | None = None
    ) -> Obj:
        """Return a mount pod without users.

        Args:
            node: Where it runs.
            name: As `pod_name` gives it.
            mount_path: In the pod; one that is made again keeps the path of the one before.
            upgrade_uuid: What names the mount; one that is made again keeps it.
            more: Variables beside those of every mount pod.
        """
        labels = {"app.kubernetes.io/name": LABEL, "volume-id": self.unique_id, HASH_LABEL: self.digest}
        metadata = {
            "name": name,
            "labels": labels | {UPGRADE_LABEL: upgrade_uuid or uuid.uuid4().hex},
            "annotations": {"juicefs-uniqueid": self.unique_id},
            "finalizers": [FINALIZER],
        }
        return {"metadata": metadata, "spec": self._spec(node, mount_path, more or {})}

    def _spec(self, node: str, mount_path: str, more: dict[str, str]) -> Obj:
        joined = ",".join([*self.options, "cache-dir=/var/jfsCache"])
        mount = f"exec /bin/mount.juicefs ${{metaurl}} {mount_path} -o {shlex.quote(joined)}"
        keys = ["metaurl", *(["secretkey"] if self.values.get("secret-key") else []), *self.envs]
        refs = [{"name": k, "valueFrom": {"secretKeyRef": {"name": self.secret_name, "key": k}}} for k in keys]
        hook = ["sh", "-c", f"umount {mount_path} -l; rmdir {mount_path}; exit 0"]
        plain = [{"name": name, "value": value} for name, value in ({"JFS_FOREGROUND": "1"} | more).items()]
        container: Obj = {
            "name": "jfs-mount",
            "image": _IMAGE,
            # A line each, as the driver joins them: a format that fails does not keep the mount from starting.
            "command": ["sh", "-c", f"{self.format_command}\n{mount}"],
            "env": [
                {"name": "JFS_INSIDE_CONTAINER", "value": "1"},
                *refs,
                {"name": "JFS_FOREGROUND", "value": "1"},
                *plain,
            ],
            "securityContext": {"privileged": True, "runAsUser": 0},
            "volumeMounts": [{"name": "jfs-dir", "mountPath": "/jfs", "mountPropagation": "Bidirectional"}],
        }
        volumes = [jfs_dir()]
        if self.keeps_fuse:
            container["env"].append({"name": "JFS_SUPER_COMM", "value": ADDRESS_IN_POD})
            container["volumeMounts"].append({"name": FUSE_VOLUME, "mountPath": FOLDER_IN_POD})
            volumes.append({"name": FUSE_VOLUME, "hostPath": {"path": "/var/run/juicefs-csi"}})
        else:
            container["lifecycle"] = {"preStop": {"exec": {"command": hook}}}
        return {
            "nodeName": node,
            "hostname": self.unique_id,
            "hostNetwork": True,
            "containers": [container],
            "volumes": volumes,
            "restartPolicy": "OnFailure",
            "terminationGracePeriodSeconds": 10,
        }


def pod_name(node: str, unique_id: str) -> str:
    """Return a new name for a mount pod; it ends with six random letters."""
    suffix = "".join(secrets.choice(string.ascii_lowercase) for _ in range(6))
    return f"juicefs-{node}-{unique_id}-{suffix}"


def is_mount_pod(pod: Obj) -> bool:
    """Return whether a pod serves a mount."""
    return bool(pod["metadata"].get("labels", {}).get("app.kubernetes.io/name") == LABEL)


def mount_path(pod: Obj) -> str:
    """Return where a mount pod mounts, by its command: one that was made again has a new name and the old path."""
    found = _PATH.search(" ".join(pod["spec"]["containers"][0].get("command", [])))
    meta = pod["metadata"]
    return found[1] if found else f"/jfs/{meta['labels'].get('volume-id', '')}-{meta['name'][-6:]}"


def users(pod: Obj) -> dict[str, str]:
    """Return the users of a mount pod: annotations whose value is where the user has it mounted."""
    annotations = pod["metadata"].get("annotations", {}) if is_mount_pod(pod) else {}
    return {k: v for k, v in annotations.items() if k.startswith("juicefs-") and v.startswith("/var/lib/kubelet/")}


def reference_key(target: str) -> str:
    """Return the annotation's key of a user: 55 hex digits, so that it fits a key's 63 characters."""
    return f"juicefs-{hashlib.sha256(target.encode()).hexdigest()}"[:63]


def jfs_dir() -> Obj:
    """Return the volume through which pods share the machine's mount directory."""
    return {"name": "jfs-dir", "hostPath": {"path": "/var/lib/juicefs/volume", "type": "DirectoryOrCreate"}}


def _format_command(values: dict[str, str]) -> str:
    """Return the driver's: it leaves the setting alone only where the Secret says nothing about the store."""
    if not values.get("name") or not values.get("metaurl"):
        raise not_found(SECRETS, "name or metaurl")
    words = [_CLI, "format"]
    if not values.get("storage") or not values.get("bucket"):
        words.append("--no-update")
    words += [f"--{key}={shlex.quote(values[key])}" for key in _FORMAT_KEYS if values.get(key)]
    if values.get("secret-key"):
        words.append("--secret-key=${secretkey}")
    return " ".join([*words, "${metaurl}", values["name"]])

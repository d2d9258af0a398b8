"""More volumes in the lab's cluster, for what concerns every volume on a store; and more mounts of the lab's own."""

import dataclasses
import json
from functools import partial
from pathlib import Path

from lab.environment import Lab
from lab.kube.csi import APPS, DRIVER, NAMESPACE, SECRET
from lab.process import wait_for
from lab.volume import STORAGE, Volume

_NODE = "node-1"


def add_volume(lab: Lab, name: str, *, heartbeat_s: int = 3) -> Lab:
    """Add a volume on the old store, with one mount, to a running lab (about 3 s).

    Args:
        lab: A lab that is up; `lab.down()` takes the volume down too.
        name: Of the volume and of its database.
        heartbeat_s: Of its mount, in seconds.

    Returns:
        The same lab seen from that volume: its setting, its metadata, fresh mounts of it.
    """
    mariadb = lab.mariadb.add_database(name)
    own = dataclasses.replace(lab, mariadb=mariadb, volume=Volume.format(name, mariadb, lab.old_store))
    _create(lab, name, [_secret(own), *_claim(name, secret_name(name), heartbeat_s)])
    return own


def add_mount(lab: Lab, heartbeat_s: int) -> Path:
    """Add a mount of the lab's own volume, with a heartbeat of its own, to a running lab (about 3 s).

    Args:
        lab: A lab that is up; `lab.down()` takes the mount down too.
        heartbeat_s: How often this client looks for a new setting, in seconds; one mount each.

    Returns:
        The machine's path of the mount.
    """
    name = f"heartbeat-{heartbeat_s}s"
    _create(lab, name, _claim(name, SECRET, heartbeat_s))
    return mount_of(lab, name)


def _create(lab: Lab, name: str, items: list[dict[str, object]]) -> None:
    """Create objects, and wait until the pod that uses the volume is ready."""
    objects = lab.state / f"{name}.objects.json"
    objects.touch(mode=0o600)
    objects.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    lab.kubectl("create", "--validate=false", "-f", str(objects))
    wait_for(f"volume {name} is mounted", partial(_is_ready, lab, name), deadline_s=60, poll_s=0.3)


def secret_name(name: str) -> str:
    """Return the name of an added volume's Secret."""
    return f"{name}-secret"


def mount_of(lab: Lab, name: str) -> Path:
    """Return the machine's path of an added volume's mount."""
    return next(mount for mount in lab.mounts() if mount.name.startswith(f"{_handle(name)}-"))


def _handle(name: str) -> str:
    return f"pv-{name}"


def _is_ready(lab: Lab, name: str) -> bool:
    pod = json.loads(lab.kubectl("-n", APPS, "get", "pod", f"app-{name}", "-o", "json"))
    return any(status["ready"] for status in pod["status"].get("containerStatuses", []))


def _secret(lab: Lab) -> dict[str, object]:
    name, store = lab.volume.name, lab.old_store
    values = {
        "name": name,
        "metaurl": lab.mariadb.meta_url_with_password,
        "storage": STORAGE,
        "bucket": store.bucket_url,
        "access-key": store.access_key,
        "secret-key": store.secret_key,
    }
    return _object("Secret", secret_name(name), NAMESPACE, stringData=values, type="Opaque")


def _claim(name: str, secret: str, heartbeat_s: int) -> list[dict[str, object]]:
    """PersistentVolume, claim and a business pod, as somebody who provisions by hand makes them."""
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeMode": "Filesystem"}
    size = {"storage": "1Gi"}
    source = {
        "driver": DRIVER,
        "volumeHandle": _handle(name),
        "fsType": "juicefs",
        "nodePublishSecretRef": {"name": secret, "namespace": NAMESPACE},
    }
    options = [f"heartbeat={heartbeat_s}", "no-usage-report", "cache-size=512", "metrics=127.0.0.1:0"]
    container = {
        "name": "app",
        "image": "debian:bookworm-slim",
        "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    return [
        _object(
            "PersistentVolume",
            _handle(name),
            spec=common
            | {
                "capacity": size,
                "csi": source,
                "claimRef": {"kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": APPS, "name": name},
                "mountOptions": options,
                "persistentVolumeReclaimPolicy": "Retain",
            },
        ),
        _object(
            "PersistentVolumeClaim",
            name,
            APPS,
            spec=common | {"resources": {"requests": size}, "volumeName": _handle(name)},
        ),
        _object(
            "Pod",
            f"app-{name}",
            APPS,
            spec={
                "nodeName": _NODE,
                "containers": [container],
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": name}}],
                "terminationGracePeriodSeconds": 5,
            },
        ),
    ]


def _object(kind: str, name: str, namespace: str = "", **rest: object) -> dict[str, object]:
    metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata} | rest

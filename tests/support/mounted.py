"""Another mount pod of the lab's volume, with mount options of its own."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kubernetes import client

from lab.process import wait_for
from tests.support.refusals import APPS, MOUNT_PODS, NS

if TYPE_CHECKING:
    from pathlib import Path

    from lab.environment import Lab


@contextlib.contextmanager
def mounted(core: client.CoreV1Api, *options: str) -> Iterator[client.V1Pod]:
    """Another mount pod of the volume, whose PV has these mountOptions as well."""
    name = f"extra-{uuid.uuid4().hex[:8]}"
    claim = core.read_namespaced_persistent_volume_claim("data", APPS)
    volume = core.read_persistent_volume(claim.spec.volume_name)
    spec = core.api_client.sanitize_for_serialization(volume.spec)
    spec["csi"]["volumeHandle"] = name
    spec["claimRef"] = {"kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": APPS, "name": name}
    spec["mountOptions"] = [*(option for option in spec["mountOptions"] if "heartbeat" not in option), *options]
    if not any("heartbeat" in option for option in options):
        spec["mountOptions"].append("heartbeat=3")
    core.create_persistent_volume({"metadata": {"name": name}, "spec": spec})
    bound = {"volumeName": name, "accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    core.create_namespaced_persistent_volume_claim(APPS, {"metadata": {"name": name}, "spec": bound})
    container = {"name": "app", "image": "busybox", "volumeMounts": [{"name": "d", "mountPath": "/data"}]}
    volumes = [{"name": "d", "persistentVolumeClaim": {"claimName": name}}]
    pod = {"nodeName": "node-1", "containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 2}
    core.create_namespaced_pod(APPS, {"metadata": {"name": name}, "spec": pod})

    def mount_pods() -> list[client.V1Pod]:
        return list(core.list_namespaced_pod(NS, label_selector=f"{MOUNT_PODS},volume-id={name}").items)

    try:
        wait_for("the pod runs", lambda: ready(core.read_namespaced_pod(name, APPS)), deadline_s=40)
        yield mount_pods()[0]
    finally:
        core.delete_namespaced_pod(name, APPS)
        wait_for("its mount pod is gone", lambda: not mount_pods(), deadline_s=40)
        core.delete_namespaced_persistent_volume_claim(name, APPS)
        core.delete_persistent_volume(name)
        with contextlib.suppress(client.ApiException):
            core.delete_namespaced_secret(f"juicefs-{name}-secret", NS)


def ready(pod: client.V1Pod) -> bool:
    return any(row.type == "Ready" and row.status == "True" for row in pod.status.conditions or [])


def mount_of(lab: Lab, pod: client.V1Pod) -> Path:
    """Return the host's path of a mount pod's mount."""
    return lab.kube.state / "jfs" / f"{pod.metadata.labels['volume-id']}-{pod.metadata.name[-6:]}"

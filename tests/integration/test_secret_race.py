"""Mount pods that start while a volume moves: whatever they write, the setting is the intended one in the end."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import base64
import contextlib
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
from kubernetes import client, config
from pydantic import SecretStr

from include.juicefs_storage.adapters.juicefs_command import in_controller_pod
from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.settle import Settled, guard_setting
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods, read_config, stale_mount_pods
from include.juicefs_storage.volume.secret import storage_values, volume_secrets, written_by_format
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from lab.environment import Lab
from lab.process import wait_for

NS, APPS, SECRET = "juicefs", "apps", "juicefs-sc-secret"
MOUNT_PODS = "app.kubernetes.io/name=juicefs-mount"
#: Three heartbeats of the lab.
SETTLE_S = 10


@dataclass(frozen=True)
class World:
    lab: Lab
    core: client.CoreV1Api
    cluster: KubernetesCluster
    before: Setting
    mounts: list[MountPod]
    target: StorageConfig
    write: WriteSetting
    patch: PatchSecrets

    def guard_setting(self, for_s: float = SETTLE_S) -> Settled:
        """As the task does it."""
        return guard_setting(
            self.write,
            self.patch,
            lambda: stale_mount_pods(Clusters(self.cluster), self.mounts, self.target),
            for_s=for_s,
            clock=time.monotonic,
            sleep=time.sleep,
        )

    def bucket(self) -> str:
        return str(self.lab.mariadb.setting()["Bucket"])


def keep_trying(step: Callable[[], object]) -> None:
    """As Airflow does with a task: once more after an error that may go away."""
    try:
        step()
    except TransientError:
        step()


@pytest.fixture
def world(lab: Lab) -> Iterator[World]:
    core = client.CoreV1Api(config.new_client_from_config(str(lab.kube.kubeconfig)))
    cluster = KubernetesCluster(core.api_client, NS)
    metaurl = Metaurl.parse(lab.mariadb.meta_url_with_password)
    metadata, juicefs = MySqlMetadata.from_metaurl(metaurl), in_controller_pod(cluster, metaurl)
    before = metadata.read_setting()
    target = StorageConfig(
        "minio", lab.new_store.bucket_url, SecretStr(lab.new_store.access_key), SecretStr(lab.new_store.secret_key)
    )
    held = {item.metadata.name: item.data for item in core.list_namespaced_secret(NS).items}
    stale = [written_by_format(storage_values(secret.data)) for secret in volume_secrets(cluster, SECRET, before.name)]
    yield World(
        lab,
        core,
        cluster,
        before,
        VolumePods(Clusters(cluster), before, "juicefs-sc-secret").mounts(),
        target,
        WriteSetting(metadata, juicefs, before, target, stale=[storage for storage in stale if storage]),
        PatchSecrets(Clusters(cluster), SECRET, before.name, target),
    )
    for name, data in held.items():
        core.replace_namespaced_secret(name, NS, {"metadata": {"name": name}, "data": data})
    lab.mariadb.query("UPDATE jfs_setting SET value = %s WHERE name = 'format'", [before.raw.decode()])
    wait_for("the mounts are back", lambda: used(cluster) == {before.bucket}, deadline_s=30)
    new = lab.new_store
    for key in new.objects("myjfs/testing/"):
        new.client().delete_object(Bucket=new.bucket, Key=key)


def used(cluster: KubernetesCluster) -> set[str]:
    """The buckets that the mount pods show."""
    return {read_config(cluster, pod)["Format"]["Bucket"] for pod in cluster.pods(MOUNT_PODS)}


@contextlib.contextmanager
def volumes(world: World, names: list[str]) -> Iterator[None]:
    """Further PVs and claims of the volume: the first pod on each starts a mount pod of its own."""
    core = world.core
    claim = core.read_namespaced_persistent_volume_claim("data", APPS)
    first = core.api_client.sanitize_for_serialization(core.read_persistent_volume(claim.spec.volume_name).spec)
    for name in names:
        reference = {"kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": APPS, "name": name}
        spec = first | {"csi": first["csi"] | {"volumeHandle": name}, "claimRef": reference}
        core.create_persistent_volume({"metadata": {"name": name}, "spec": spec})
        bound = {"volumeName": name, "accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
        core.create_namespaced_persistent_volume_claim(APPS, {"metadata": {"name": name}, "spec": bound})
    try:
        yield
    finally:
        for name in names:
            with contextlib.suppress(client.ApiException):
                core.delete_namespaced_pod(name, APPS)
        selector = f"{MOUNT_PODS},volume-id in ({', '.join(names)})"
        wait_for(
            "their mount pods are gone",
            lambda: not core.list_namespaced_pod(NS, label_selector=selector).items,
            deadline_s=60,
        )
        for name in names:
            core.delete_namespaced_persistent_volume_claim(name, APPS)
            core.delete_persistent_volume(name)
            with contextlib.suppress(client.ApiException):
                core.delete_namespaced_secret(f"juicefs-{name}-secret", NS)


def start_app(core: client.CoreV1Api, name: str) -> None:
    container = {"name": "app", "image": "busybox", "volumeMounts": [{"name": "d", "mountPath": "/data"}]}
    claims = [{"name": "d", "persistentVolumeClaim": {"claimName": name}}]
    spec = {"nodeName": "node-2", "containers": [container], "volumes": claims, "terminationGracePeriodSeconds": 2}
    core.create_namespaced_pod(APPS, {"metadata": {"name": name}, "spec": spec})


def format_bucket(world: World, name: str) -> str:
    (pod,) = world.core.list_namespaced_pod(NS, label_selector=f"{MOUNT_PODS},volume-id={name}").items
    words = shlex.split(pod.spec.containers[0].command[2])
    return next(word.removeprefix("--bucket=") for word in words if word.startswith("--bucket="))


@pytest.mark.parametrize("first_s", [-0.8, -0.4])
def test_mount_pods_that_start_at_any_moment(world: World, first_s: float) -> None:
    """One every 0.6 s, from before the setting is written until long after the Secret was patched."""
    offsets = [first_s + 0.6 * number for number in range(8)]
    names = [f"race-{number}" for number in range(len(offsets))]
    begin = threading.Event()
    started = time.monotonic() + 1.0

    def storm() -> None:
        begin.wait()
        client_of_its_own = client.CoreV1Api(config.new_client_from_config(str(world.lab.kube.kubeconfig)))
        for name, offset in zip(names, offsets, strict=True):
            threading.Event().wait(max(0.0, started + offset - time.monotonic()))
            start_app(client_of_its_own, name)

    with volumes(world, names):
        started = time.monotonic() + 1.0
        pods = threading.Thread(target=storm)
        pods.start()
        begin.set()
        threading.Event().wait(max(0.0, started - time.monotonic()))
        keep_trying(world.write.apply)
        # What a busy cluster takes between the two: pods that start meanwhile have the old values.
        threading.Event().wait(1.2)
        keep_trying(world.patch.apply)
        settled = world.guard_setting()
        pods.join()
        assert world.bucket() == world.target.bucket
        buckets = {name: format_bucket(world, name) for name in names}
        assert set(buckets.values()) == {world.before.bucket, world.target.bucket}, "both kinds of pods were there"
        wait_for("every client follows", lambda: used(world.cluster) == {world.target.bucket}, deadline_s=30)
        assert settled.repaired, "no pod wrote the old values: this test proved nothing"
        assert settled.waiting == ()
        stale = {name for name, bucket in buckets.items() if bucket == world.before.bucket}
        assert all(any(f"-{name}-" in pod for name in stale) for pod in settled.wrote), "nobody else is suspected"
        wait_for("all of them started", lambda: all(pod.ready for pod in world.cluster.pods(MOUNT_PODS)), deadline_s=40)
    assert world.bucket() == world.target.bucket
    assert world.patch.plan() == []


@contextlib.contextmanager
def late_pod(world: World, storage: StorageConfig) -> Iterator[Callable[[], None]]:
    """A mount pod that was made with these values and cannot start yet; returns how to let it."""
    core, name = world.core, "juicefs-node-2-late-abcdef"
    words = ["/usr/local/bin/juicefs", "format", f"--storage={storage.storage}", f"--bucket={storage.bucket}"]
    words += [f"--access-key={storage.access_key.get_secret_value()}"]
    options = "heartbeat=3,no-usage-report,cache-dir=/var/jfsCache,metrics=127.0.0.1:0"
    script = (
        f"{shlex.join(words)} --secret-key=${{secretkey}} ${{metaurl}} {world.before.name}\n"
        f"exec /bin/mount.juicefs ${{metaurl}} /jfs/late-abcdef -o {options}"
    )

    def encoded(value: str) -> str:
        return base64.b64encode(value.encode()).decode()

    keys = ("metaurl", "secretkey")
    # Not named as the volume's Secrets are: a store that takes the same keys in both places has nothing to patch there.
    environment = [{"name": key, "valueFrom": {"secretKeyRef": {"name": "late", "key": f"x-{key}"}}} for key in keys]
    container = {
        "name": "jfs-mount",
        "image": "juicedata/mount:ce-v1.4.2",
        "command": ["sh", "-c", script],
        "env": [*environment, {"name": "JFS_FOREGROUND", "value": "1"}],
        "volumeMounts": [{"name": "jfs-dir", "mountPath": "/jfs"}],
    }
    folder = {"name": "jfs-dir", "hostPath": {"path": "/var/lib/juicefs/volume"}}
    spec = {
        "nodeName": "node-2",
        "hostname": "late",
        "containers": [container],
        "volumes": [folder],
        "terminationGracePeriodSeconds": 5,
    }
    labels = {"app.kubernetes.io/name": "juicefs-mount", "volume-id": "late"}
    core.create_namespaced_pod(NS, {"metadata": {"name": name, "labels": labels}, "spec": spec})

    def let_it_start() -> None:
        data = {
            "x-metaurl": encoded(world.lab.mariadb.meta_url_with_password),
            "x-secretkey": encoded(storage.secret_key.get_secret_value()),
        }
        client.CoreV1Api(config.new_client_from_config(str(world.lab.kube.kubeconfig))).create_namespaced_secret(
            NS, {"metadata": {"name": "late"}, "data": data}
        )

    try:
        yield let_it_start
    finally:
        core.delete_namespaced_pod(name, NS)
        with contextlib.suppress(client.ApiException):
            core.delete_namespaced_secret("late", NS)
        wait_for(
            "it is gone",
            lambda: name not in {pod.metadata.name for pod in core.list_namespaced_pod(NS).items},
            deadline_s=30,
        )


def test_a_mount_pod_that_starts_after_the_watch_is_waited_for(world: World) -> None:
    """An image that is pulled slowly: the pod was made before the patch, and formats long after it."""
    with late_pod(world, world.before.config) as let_it_start:
        world.write.apply()
        world.patch.apply()
        timer = threading.Timer(7, let_it_start)
        timer.start()
        begun = time.monotonic()
        settled = world.guard_setting(for_s=3)
        timer.join()
        assert time.monotonic() - begun > 7
        assert len(settled.repaired) == 1
        assert settled.wrote == ("juicefs-node-2-late-abcdef",)
        assert settled.waiting == ()
        assert world.bucket() == world.target.bucket


def test_a_secret_that_said_something_else_than_the_setting(world: World) -> None:
    """A third value in the row is put right where it is known to come from a Secret."""
    alias = replace(world.before.config, bucket=world.before.bucket + "/")
    step = replace(world.write, stale=[*world.write.stale, alias])
    with late_pod(world, alias) as let_it_start:
        assert step.apply().written
        let_it_start()
        wait_for("it wrote its values", lambda: world.bucket() == alias.bucket, deadline_s=40)
        assert step.apply().written
        assert world.bucket() == world.target.bucket


def test_secrets_that_somebody_puts_back_are_patched_again(world: World) -> None:
    """A sync of what renders the Secret, in the middle of the watch."""
    before = world.core.read_namespaced_secret(SECRET, NS).data
    world.write.apply()
    world.patch.apply()

    def sync() -> None:
        own = client.CoreV1Api(config.new_client_from_config(str(world.lab.kube.kubeconfig)))
        own.replace_namespaced_secret(SECRET, NS, {"metadata": {"name": SECRET}, "data": before})

    timer = threading.Timer(3, sync)
    timer.start()
    settled = world.guard_setting()
    timer.join()
    assert settled.repaired == (f"Secret {NS}/{SECRET} held other values",)
    assert world.patch.plan() == []
    assert world.bucket() == world.target.bucket

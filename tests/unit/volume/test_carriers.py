"""Who carries other values than the volume uses: pods by their commands, Secrets, workloads, options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import SecretStr

from include.juicefs_storage.ports import PersistentVolume, Pod, SecretObject, StorageClass, WorkloadTemplate
from include.juicefs_storage.volume.carriers import Carrier, find_carriers, name_some, restarts_that_write
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.mount_pods import MOUNT_POD_SELECTOR, VolumePods
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import METAURL, NEW, OLD, FakeCluster, setting

PV = PersistentVolume("pv-1", "pvc-1", "juicefs", "main", "apps", "data")
VALUES = {"name": "myjfs", "metaurl": METAURL, "storage": "minio"}


def command(config: StorageConfig, *, update: str = "", name: str = "myjfs") -> str:
    key = config.access_key.get_secret_value()
    words = f"juicefs format {update} --storage={config.storage} --bucket={config.bucket} --access-key={key}"
    return f"sh -c {words} --secret-key=${{secretkey}} ${{metaurl}} {name}\nexec /bin/mount.juicefs ${{metaurl}} /jfs/x"


def pod(name: str, run: str, *, namespace: str = "juicefs", volume_id: str = "pvc-1", **more: Any) -> Pod:
    labels = {"app.kubernetes.io/name": "juicefs-mount", "volume-id": volume_id} if volume_id else {}
    return Pod(namespace, name, name, "node-1", True, 0, "", labels, (run,), (), **more)


@dataclass
class Cluster(FakeCluster):
    """A cluster with everything that is looked through."""

    running: list[Pod] = field(default_factory=list)
    elsewhere: list[SecretObject] = field(default_factory=list)
    workloads: list[WorkloadTemplate] = field(default_factory=list)
    volumes: list[PersistentVolume] = field(default_factory=lambda: [PV])
    classes: list[StorageClass] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        found = [pod for pod in self.running if pod.namespace == (namespace or self.namespace)]
        return [pod for pod in found if pod.labels] if label_selector == MOUNT_POD_SELECTOR else found

    def secrets_everywhere(self) -> Sequence[SecretObject]:
        return [*self.store.values(), *self.elsewhere]

    def workload_templates(self) -> list[WorkloadTemplate]:
        return self.workloads

    def persistent_volumes(self) -> list[PersistentVolume]:
        return self.volumes

    def storage_classes(self) -> list[StorageClass]:
        return self.classes

    def driver_mount_options(self) -> list[str]:
        return self.options


def values(config: StorageConfig, **more: str) -> dict[str, str]:
    keys = {"access_key": config.access_key.get_secret_value(), "secret_key": config.secret_key.get_secret_value()}
    return {**VALUES, "bucket": config.bucket, **keys, **more}


def cluster(config: StorageConfig, *running: Pod) -> Cluster:
    found = Cluster(running=list(running))
    found.add("main", **values(config))
    found.add("juicefs-pvc-1-secret", metaurl=METAURL, secretkey=config.secret_key.get_secret_value())
    return found


def carriers(found: Cluster, target: StorageConfig = NEW, *, will_patch: bool = False) -> list[Carrier]:
    pods = VolumePods(Clusters(found), setting(OLD), "main")
    return find_carriers(pods, "main", target, left=[OLD.bucket], will_patch=will_patch)


def test_a_pod_from_before_writes_the_old_bucket_with_the_new_secret_key() -> None:
    (found,) = carriers(cluster(OLD, pod("old-pod", command(OLD))), will_patch=True)
    assert (found.kind, found.name, found.writes) == ("mount pod", "old-pod", replace(OLD, secret_key=NEW.secret_key))
    assert restarts_that_write([found]) == [found]
    assert "writes it into the setting, if that store takes its keys" in found.line
    assert OLD.bucket in found.line


def test_pods_that_name_the_new_store_that_do_not_update_or_have_ended_are_harmless() -> None:
    world = cluster(
        NEW,
        pod("new", command(NEW)),
        pod("no-update", command(OLD, update="--no-update")),
        pod("ended", command(OLD), phase="Succeeded"),
        pod("another-volume", command(OLD), volume_id="pvc-9"),
    )
    (found,) = carriers(world)
    assert (found.name, found.writes) == ("no-update", None)
    assert "leaves the setting alone" in found.line


def test_another_access_key_for_the_same_bucket_counts() -> None:
    rotated = replace(OLD, access_key=SecretStr("ROTATED"), secret_key=NEW.secret_key)
    (found,) = carriers(cluster(rotated, pod("old-pod", command(OLD))), rotated)
    assert found.writes == replace(OLD, secret_key=NEW.secret_key)


def test_jobs_and_sidecars_count_where_they_name_the_volume() -> None:
    world = cluster(
        NEW,
        pod("juicefs-abc-createvol-x", command(OLD), volume_id=""),
        pod("app-with-sidecar", command(OLD), volume_id="", namespace="apps"),
        pod("another-volumes-job", command(OLD, name="theirs"), volume_id=""),
    )
    assert {found.name for found in carriers(world)} == {"juicefs-abc-createvol-x", "app-with-sidecar"}


def test_secrets_here_elsewhere_and_what_the_driver_remembers() -> None:
    world = cluster(NEW)
    world.add("copy", **values(OLD))
    remembered = json.dumps({"FormatCmd": command(OLD).split("\n")[0], "secret-key": "old-secret-value"})
    world.add("juicefs-pvc-2-secret", metaurl=METAURL, jfsSettings=remembered)
    theirs = {key.replace("_", "-"): value for key, value in values(OLD).items()}
    world.elsewhere = [SecretObject("apps", "data-jfs-secret", "1", data=theirs)]
    found = {carrier.name: carrier for carrier in carriers(world)}
    assert set(found) == {"copy", "juicefs-pvc-2-secret", "data-jfs-secret"}
    assert {carrier.writes for carrier in found.values()} == {OLD}
    assert {c.name for c in carriers(world, will_patch=True)} == {"juicefs-pvc-2-secret", "data-jfs-secret"}
    assert not any(secret in repr(found) for secret in ("old-secret-value", "OLDKEY"))
    assert not any("old-secret-value" in carrier.line for carrier in found.values())


def test_workloads_and_options() -> None:
    world = cluster(NEW)
    gateway = ("juicefs", "gateway", f"--bucket={OLD.bucket}")
    world.workloads = [WorkloadTemplate("Deployment", "juicefs", "gateway", {}, frozenset(), gateway)]
    world.volumes = [replace(PV, mount_options=("bucket=http://own/b",))]
    world.classes = [StorageClass("sc", "juicefs", "main", ("storage=s3",))]
    world.options = ["bucket=http://everywhere/b"]
    assert [found.kind for found in carriers(world)] == ["workload", "PersistentVolume", "StorageClass", "ConfigMap"]


def test_nothing_is_found_where_all_agree() -> None:
    assert carriers(cluster(NEW, pod("new", command(NEW)))) == []


def test_many_are_named_in_part() -> None:
    many = [Carrier("mount pod", "juicefs", f"p{number}", "") for number in range(7)]
    assert name_some(many) == "p0, p1, p2, p3, p4 and 2 more"

"""Which mount pods follow the setting, and which may write old values into it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.ports import ExecResult, PersistentVolume, Pod, SecretObject
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.mount_pods import (
    _READ_CONFIG,
    _READ_STATS,
    MountPod,
    VolumeInCluster,
    VolumePods,
    request_errors,
    stale_mount_pods,
    storage_overrides,
)
from tests.support.bare import BareCluster
from tests.support.fakes import METAURL, MOUNT, NEW, OLD, UUID, setting


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("/jfs/x -o heartbeat=3,bucket=http://h:9000/b,cache-dir=/c", ("bucket=http://h:9000/b",)),
        ("/jfs/x --bucket http://h/b --storage=s3", ("bucket http://h/b", "storage=s3")),
        ("/jfs/x -o 'storage=minio,cache-dir=/c'", ("storage=minio",)),
        ("bucket=http://h/b", ("bucket=http://h/b",)),
        ("/jfs/x -o storage-class=STANDARD_IA,cache-dir=/bucket", ()),
    ],
)
def test_overrides_among_mount_options(options: str, found: tuple[str, ...]) -> None:
    assert storage_overrides(options) == found


@dataclass
class Mounts(BareCluster):
    """A cluster of mount pods with the PVs and Secrets of two volumes; a pod without a UUID cannot be asked."""

    found: list[Pod]
    uuids: dict[str, str] = field(default_factory=dict)
    #: What `.config` of a mount holds instead.
    configs: dict[str, str] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    namespace: str = "juicefs"

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        return self.found

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        self.asked.append(pod)
        if pod in self.configs:
            return ExecResult(0, self.configs[pod], "")
        if pod not in self.uuids:
            raise TransientError(f"Could not start sh in pod juicefs/{pod}.")
        if ".stats" in command[2]:
            return ExecResult(0, "juicefs_object_request_errors 3\n", "")
        return ExecResult(0, json.dumps({"Format": {"UUID": self.uuids[pod], "Bucket": OLD.bucket}}), "")

    def secret(self, name: str) -> SecretObject:
        return next(secret for secret in self.secrets() if secret.name == name)

    def secrets(self, label_selector: str = "") -> list[SecretObject]:
        names = {"main": "myjfs", "juicefs-pvc-copied-secret": "myjfs", "juicefs-pvc-9-secret": "another"}
        return [
            SecretObject("juicefs", secret, "1", data={"name": name, "metaurl": METAURL})
            for secret, name in names.items()
        ]

    def persistent_volumes(self) -> list[PersistentVolume]:
        references = {"pvc-1": ("juicefs", "main"), "pvc-copied": ("apps", "own"), "pvc-9": ("juicefs", "other")}
        return [PersistentVolume(f"pv-{handle}", handle, *ref, "apps", handle) for handle, ref in references.items()]


def of(cluster: Mounts) -> VolumePods:
    return VolumePods(Clusters(cluster), setting(), "main")


def names(mounts: Sequence[MountPod]) -> list[str]:
    return [mount.name for mount in mounts]


def pod(name: str, uid: str = "", command: str = "", *, volume_id: str = "pvc-1", **more: Any) -> Pod:
    values = {"ready": True, "restarts": 0} | more
    return Pod(
        namespace="juicefs", name=name, uid=uid or name, node="node-1", problem="", labels={"volume-id": volume_id},
        commands=(command or f"juicefs mount x /jfs/{name}",), claims=(), **values,
    )  # fmt: skip


@pytest.mark.parametrize(
    "broken",
    [
        pod("broken", volume_id="pvc-9"),
        pod("broken", volume_id="pvc-nobody-knows"),
        pod("broken", volume_id=""),
        pod("broken", volume_id="pvc-9", command="exit 1"),
        pod("broken", phase="Failed"),
        pod("broken", phase="Succeeded"),
        pod("broken", terminating=True),
    ],
    ids=lambda pod: f"{pod.labels['volume-id']}-{pod.phase}-{pod.terminating}",
)
def test_a_pod_that_serves_nobody_or_another_volume_need_not_answer(broken: Pod) -> None:
    cluster = Mounts([pod("well"), broken], {"well": UUID})
    assert names(of(cluster).mounts()) == ["well"]


@pytest.mark.parametrize("content", ["", "juicefs", "[1]", "{}", '{"Format": [1]}', '{"Format": {"UUID": 7}}'])
def test_another_pod_may_hold_anything_in_its_config(content: str) -> None:
    cluster = Mounts([pod("well"), pod("odd", volume_id="pvc-9")], {"well": UUID}, configs={"odd": content})
    assert names(of(cluster).mounts()) == ["well"]


@pytest.mark.parametrize(
    "broken",
    [
        pod("broken"),
        pod("broken", volume_id="pvc-copied"),
        pod("broken", volume_id="shared", annotations={"juicefs-uuid": UUID}),
    ],
    ids=["by its PV", "by the driver's Secret", "by its annotation"],
)
def test_a_pod_of_this_volume_must_answer(broken: Pod) -> None:
    with pytest.raises(TransientError, match="pod juicefs/broken"):
        of(Mounts([pod("well"), broken], {"well": UUID})).mounts()


def test_the_uuid_decides_for_a_pod_that_answers_not_its_labels() -> None:
    cluster = Mounts([pod("ours", volume_id="pvc-9"), pod("theirs")], {"ours": UUID, "theirs": "another"})
    assert names(of(cluster).mounts()) == ["ours"]


def test_where_the_pods_are_known_no_other_is_asked() -> None:
    cluster = Mounts([pod("known"), pod("new"), pod("broken")], {"known": UUID, "new": UUID})
    assert names(of(cluster).mounts({"known"})) == ["known"]
    assert set(cluster.asked) == {"known"}


def test_a_pod_that_is_being_deleted_is_no_part_of_the_plan_and_no_stranger() -> None:
    cluster = Mounts([pod("stays"), pod("leaves", terminating=True)], {"stays": UUID, "leaves": UUID})
    assert names(of(cluster).mounts()) == ["stays"]
    assert of(cluster).leaving() == ["/jfs/leaves"]


def test_a_volumes_pvs_are_found_by_their_secrets_and_by_who_serves_them() -> None:
    volume = VolumeInCluster(Mounts([]), setting(), "main")
    assert [pv.name for pv in volume.persistent_volumes] == ["pv-pvc-1", "pv-pvc-copied"]
    found = volume.volumes_of([MOUNT.model_copy(update={"volume_id": "pvc-9"})])
    assert [pv.name for pv in found] == ["pv-pvc-1", "pv-pvc-copied", "pv-pvc-9"]


def test_the_files_of_a_mount_with_prefix_internal_are_read_as_well(tmp_path: Path) -> None:
    for name in ("config", "stats"):
        script = {"config": _READ_CONFIG, "stats": _READ_STATS}[name]
        for prefix in ("", ".jfs"):
            mount = tmp_path / f"{name}{prefix}"
            mount.mkdir()
            (mount / f"{prefix}.{name}").write_text(name)
            done = subprocess.run(["sh", "-c", script, "sh", str(mount)], capture_output=True, text=True, check=True)
            assert done.stdout == name


def test_failed_requests_of_a_client_that_cannot_be_asked_are_left_out() -> None:
    mounts = [MOUNT.model_copy(update={"name": name, "uid": name}) for name in ("well", "broken", "gone")]
    cluster = Mounts([pod("well"), pod("broken")], {"well": UUID})
    assert request_errors(Clusters(cluster), mounts) == {"well": 3}


def test_who_may_write_old_values() -> None:
    old = (
        f"sh -c juicefs format --storage=minio --bucket={OLD.bucket} ${{metaurl}} myjfs\nexec /bin/mount.juicefs /jfs/x"
    )
    quoted = old.replace(OLD.bucket, f"'{OLD.bucket}'")
    pods = [
        pod("known", "1", old),
        pod("restarted", "2", old, restarts=1),
        pod("new", "3", quoted),
        pod("with-new-values", "4", old.replace(OLD.bucket, NEW.bucket)),
        pod("harmless", "5", "juicefs format --no-update ${metaurl} myjfs\nexec /bin/mount.juicefs /jfs/x"),
        pod("another-volume", "6", old.replace(OLD.bucket, "http://old:9000/other"), volume_id="pvc-9"),
        pod("another-pv", "7", old, volume_id="pvc-2"),
        pod("ended", "8", old, phase="Failed"),
        pod("leaving", "9", old, terminating=True),
    ]
    known = [MOUNT, MOUNT.model_copy(update={"uid": "2"})]
    found = stale_mount_pods(Clusters(Mounts(pods)), known, NEW)
    assert [pod.name for pod in found] == ["restarted", "new", "another-pv"]

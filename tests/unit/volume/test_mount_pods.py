"""Which mount pods follow the setting, and which may write old values into it."""

from __future__ import annotations

import pytest

from include.juicefs_storage.ports import Pod
from include.juicefs_storage.volume.mount_pods import stale_mount_pods, storage_overrides
from tests.support.bare import BareCluster
from tests.support.fakes import MOUNT, NEW, OLD


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


class Pods(BareCluster):
    """A cluster with these mount pods."""

    def __init__(self, pods: list[Pod]) -> None:
        self.found = pods

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        return self.found


def pod(name: str, uid: str, command: str, *, restarts: int = 0, ready: bool = True, volume_id: str = "pvc-1") -> Pod:
    return Pod(
        namespace="juicefs", name=name, uid=uid, node="node-1", ready=ready, restarts=restarts, problem="",
        labels={"volume-id": volume_id}, commands=(command,), claims=(),
    )  # fmt: skip


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
    ]
    known = [MOUNT, MOUNT.model_copy(update={"uid": "2"})]
    found = stale_mount_pods(Pods(pods), known, NEW)
    assert [pod.name for pod in found] == ["restarted", "new", "another-pv"]

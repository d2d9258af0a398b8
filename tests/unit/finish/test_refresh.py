"""Replacing a mount pod: what the driver says, what is looked at, and where it stops."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.finish.refresh import Refresh
from include.juicefs_storage.ports import ExecResult, PersistentVolume, Pod
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.csi import CSI_NODE_SELECTOR
from include.juicefs_storage.volume.mount_pods import MOUNT_POD_SELECTOR, VolumePods
from tests.support.fakes import METAURL, MOUNT, NEW, OLD, UUID, FakeCluster, FakeStore, setting

KEY = "myjfs/chunks/0/0/1_0_4096"
PV = PersistentVolume("pvc-1", "pvc-1", "juicefs", "main", "apps", "data")


def command(bucket: str, key: str) -> str:
    words = f"juicefs format --storage=minio --bucket={bucket} --access-key={key} ${{metaurl}} myjfs"
    return f"sh -c {words}\nexec /bin/mount.juicefs ${{metaurl}} {MOUNT.mount_path} -o x"


STALE = Pod(
    "juicefs",
    MOUNT.name,
    MOUNT.uid,
    "node-1",
    True,
    0,
    "",
    {"volume-id": "pvc-1"},
    (command(OLD.bucket, "OLDKEY"),),
    (),
)
FRESH = replace(STALE, name="juicefs-node-1-pvc-1-ghijkl", uid="2", commands=(command(NEW.bucket, "NEWKEY"),))
NODE = Pod("juicefs", "juicefs-csi-node-x", "n", "node-1", True, 0, "", {}, (), ())
APP = Pod("apps", "app-1", "a", "node-1", True, 0, "", {}, (), ("data",))


@dataclass
class Cluster(FakeCluster):
    """A driver that replaces the mount pod when it is asked to, or does what the test says."""

    mounts: list[Pod] = field(default_factory=lambda: [STALE])
    nodes: list[Pod] = field(default_factory=lambda: [NODE])
    apps: list[Pod] = field(default_factory=lambda: [APP])
    becomes: list[Pod] = field(default_factory=lambda: [FRESH])
    apps_become: list[Pod] = field(default_factory=lambda: [APP])
    says: str = f"POD-SUCCESS [{STALE.name}] Upgrade mount pod and recreate one: {FRESH.name} !"
    lost: bool = False
    asked: list[list[str]] = field(default_factory=list)

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        return {MOUNT_POD_SELECTOR: self.mounts, CSI_NODE_SELECTOR: self.nodes}.get(label_selector, self.apps)

    def persistent_volumes(self) -> list[PersistentVolume]:
        return [PV]

    def log_tail(self, pod: str, lines: int = 20, container: str = "", since_s: float | None = None) -> str:
        return ""

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        if command[0] == "juicefs-csi-driver":
            self.asked.append([pod, *command])
            self.mounts, self.apps = self.becomes, self.apps_become
            if self.lost:
                raise TransientError("the connection was lost")
            return ExecResult(0, self.says, "")
        if ".config" in command[2]:
            form = {"UUID": UUID, "Storage": NEW.storage, "Bucket": NEW.bucket, "AccessKey": "NEWKEY"}
            return ExecResult(0, json.dumps({"Format": form, "Meta": {}}), "")
        return ExecResult(0, KEY, "")


def refresh(cluster: Cluster, *, on_store: bool = True, east: Cluster | None = None) -> Refresh:
    for each in filter(None, (cluster, east)):
        each.add("main", name="myjfs", metaurl=METAURL)
    store, time = FakeStore({KEY: 4096} if on_store else {}), [0.0]

    def sleep(seconds: float) -> None:
        time[0] += seconds

    pods = VolumePods(Clusters(cluster, {"east": east} if east else {}), setting(NEW), "main")
    return Refresh(pods, NEW, store, ".storage-switch-x", lambda: time[0], sleep)


def test_a_mount_pod_is_replaced_and_proven() -> None:
    cluster = Cluster()
    done = refresh(cluster).apply(MOUNT, pause_s=30)
    assert done
    assert (done.old, done.new, done.took_s) == (STALE.name, FRESH.name, 30)
    assert cluster.asked == [[NODE.name, "juicefs-csi-driver", "upgrade", STALE.name, "--recreate"]]
    assert refresh(cluster).apply(MOUNT) is None, "done already"
    assert len(cluster.asked) == 1


IN_EAST = MOUNT.model_copy(update={"name": f"east/{MOUNT.name}"})


def test_a_mount_pod_of_another_cluster_is_replaced_by_the_csi_node_there() -> None:
    first, east = Cluster(), Cluster()  # with the same names, on nodes of the same names
    done = refresh(first, east=east).apply(IN_EAST)
    assert done
    assert (done.old, done.new) == (f"east/{STALE.name}", f"east/{FRESH.name}")
    assert (len(first.asked), east.asked) == (
        0,
        [[NODE.name, "juicefs-csi-driver", "upgrade", STALE.name, "--recreate"]],
    )
    assert first.mounts == [STALE]


@pytest.mark.parametrize(
    ("world", "command"),
    [
        ({"nodes": []}, f"kubectl -n juicefs get pods -l {CSI_NODE_SELECTOR} -o wide (in cluster east)"),
        (
            {"says": "POD-FAIL [x] can not upgrade", "becomes": [STALE]},
            f"kubectl -n juicefs delete pod {STALE.name} (in cluster east)",
        ),
    ],
    ids=["no csi-node", "refused"],
)
def test_the_next_command_names_the_cluster(world: dict[str, Any], command: str) -> None:
    with pytest.raises(NeedsHumanError) as error:
        refresh(Cluster(), east=Cluster(**world)).apply(IN_EAST)
    assert command in error.value.next_step


def test_a_lost_answer_is_looked_up() -> None:
    done = refresh(Cluster(lost=True)).apply(MOUNT)
    assert done
    assert done.new == FRESH.name


@pytest.mark.parametrize(
    ("world", "words"),
    [
        ({"says": "POD-FAIL [x] can not upgrade: image does not support it.", "becomes": [STALE]}, "did not replace"),
        ({"nodes": []}, "No csi-node pod is ready"),
        ({"becomes": [STALE]}, "No other mount pod serves"),
        ({"becomes": [replace(FRESH, ready=False)]}, "No other mount pod serves"),
        ({"becomes": [replace(STALE, uid="2")]}, "made with other values too"),
        ({"apps_become": [replace(APP, restarts=1)]}, "Business pods restarted"),
        ({"mounts": [replace(STALE, ready=False)]}, "is not ready"),
    ],
    ids=[
        "refused",
        "no csi-node",
        "nothing happened",
        "never ready",
        "old Secret",
        "an application restarted",
        "broken",
    ],
)
def test_it_stops_where_something_is_not_as_before(world: dict[str, Any], words: str) -> None:
    with pytest.raises(NeedsHumanError, match=words):
        refresh(Cluster(**world)).apply(MOUNT)


def test_a_client_whose_block_is_not_on_the_store_is_not_proven() -> None:
    with pytest.raises(NeedsHumanError, match="is not as before"):
        refresh(Cluster(), on_store=False).apply(MOUNT)

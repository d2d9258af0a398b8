"""Prove that no pod restarted: identities in the plan against those of now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.ports import PersistentVolume, Pod
from include.juicefs_storage.switch.plan import Plan
from include.juicefs_storage.switch.prove_no_restarts import PodChanges, compare_pods
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.mount_pods import MOUNT_POD_SELECTOR, VolumePods
from include.juicefs_storage.volume.users import PodIdentity
from tests.support.fakes import METAURL, MOUNT, FakeCluster, plan, setting

APP = PodIdentity(namespace="apps", name="app-1", uid="2", node="node-1", restarts=3)


def pod(namespace: str, name: str, uid: str, restarts: int, claims: tuple[str, ...] = ()) -> Pod:
    return Pod(
        namespace, name, uid, "node-1", ready=True, restarts=restarts, problem="", labels={}, commands=(), claims=claims
    )


VOLUME = PersistentVolume("pvc-1", "pvc-1", "juicefs", "juicefs-sc-secret", "apps", "data")
MOUNT_NOW = pod("juicefs", MOUNT.name, MOUNT.uid, MOUNT.restarts)
APP_NOW = pod("apps", APP.name, APP.uid, APP.restarts, claims=("data",))


@dataclass
class Pods(FakeCluster):
    """A cluster of pods, and one volume that claim `data` of `apps` uses."""

    mounts: list[Pod] = field(default_factory=lambda: [MOUNT_NOW])
    apps: list[Pod] = field(default_factory=lambda: [APP_NOW])

    def pods(self, label_selector: str = "", namespace: str | None = None) -> Sequence[Pod]:
        return self.mounts if label_selector == MOUNT_POD_SELECTOR else self.apps

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        return [VOLUME]


def compared(cluster: Pods, before: Plan) -> PodChanges:
    cluster.add("juicefs-sc-secret", name="myjfs", metaurl=METAURL)
    return compare_pods(VolumePods(Clusters(cluster), setting(), "juicefs-sc-secret"), before)


@pytest.fixture
def before() -> Plan:
    return plan(mount_pods=(MOUNT,), business_pods=(APP,))


def test_the_same_pods_are_a_proof(before: Plan) -> None:
    assert compared(Pods(), before) == PodChanges([], [])


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (Pods(mounts=[replace(MOUNT_NOW, restarts=1)]), f"mount pod {MOUNT.name}: UID 1 → 1, restarts 0 → 1"),
        (Pods(mounts=[replace(MOUNT_NOW, uid="9")]), f"mount pod {MOUNT.name}: UID 1 → 9, restarts 0 → 0"),
        (Pods(mounts=[]), f"mount pod {MOUNT.name} is gone"),
        (Pods(apps=[replace(APP_NOW, restarts=4)]), "pod apps/app-1: UID 2 → 2, restarts 3 → 4"),
        (Pods(apps=[replace(APP_NOW, uid="9")]), "pod apps/app-1: UID 2 → 9, restarts 3 → 3"),
    ],
    ids=["mount restarted", "mount replaced", "mount gone under its users", "app restarted", "app replaced"],
)
def test_a_pod_that_restarted_is_named(now: Pods, said: str, before: Plan) -> None:
    changes = compared(now, before)
    assert changes.restarted == [said]
    with pytest.raises(NeedsHumanError) as refused:
        changes.require_no_restarts()
    assert said in str(refused.value)


def test_pods_that_left_are_reported_and_refuse_nothing(before: Plan) -> None:
    gone = ["mount pod juicefs-node-1-pvc-1-abcdef is gone", "pod apps/app-1 is gone"]
    changes = compared(Pods(mounts=[], apps=[]), before)
    assert changes == PodChanges(gone, [])
    changes.require_no_restarts()


def test_pods_that_came_meanwhile_are_no_concern(before: Plan) -> None:
    more = Pods(mounts=[MOUNT_NOW, pod("juicefs", "another", "7", 5)], apps=[APP_NOW, pod("apps", "app-2", "8", 9)])
    assert compared(more, before) == PodChanges([], [])

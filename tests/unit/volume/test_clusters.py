"""Several clusters as one: what is in each is told apart, and one that is away stops nothing in the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.ports import ExecResult, PersistentVolume, Pod
from include.juicefs_storage.switch.checks import check_distinct
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.prove_no_restarts import compare_pods
from include.juicefs_storage.volume.clusters import FIRST, Clusters, kubectl
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods, request_errors, stale_mount_pods
from tests.support.fakes import METAURL, MOUNT, NEW, OLD, FakeCluster, plan, setting

EAST, SECRET = "kubernetes_east", "juicefs-sc-secret"


@dataclass
class Site(FakeCluster):
    """A cluster with a mount pod, an application and Secrets; `away`: it does not answer."""

    uid: str = "1"
    restarts: int = 0
    handle: str = MOUNT.volume_id
    command: str = f"juicefs mount x {MOUNT.mount_path}"
    away: bool = False
    ran_in: list[str] = field(default_factory=list)

    def _answer(self) -> None:
        if self.away:
            raise TransientError("The Kubernetes API cannot be reached.", next_step="test the connection")

    def pods(self, label_selector: str = "", namespace: str | None = None) -> Sequence[Pod]:
        self._answer()
        labels = {"volume-id": self.handle}
        if namespace == "apps":
            return [Pod("apps", "app-1", f"app-{self.uid}", "node-1", True, self.restarts, "", {}, (), ("data",))]
        return [Pod("juicefs", MOUNT.name, self.uid, "node-1", True, self.restarts, "", labels, (self.command,), ())]

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        return [PersistentVolume("pv", self.handle, self.namespace, SECRET, "apps", "data")]

    def secret(self, name: str) -> object:  # type: ignore[override]
        self._answer()
        return super().secret(name)

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        self._answer()
        self.ran_in.append(pod)
        return ExecResult(0, f"juicefs_object_request_errors {self.uid}\n", "")


@pytest.fixture
def west() -> Site:
    return with_secret(Site())


@pytest.fixture
def east() -> Site:
    return with_secret(Site(uid="2"))


def with_secret(site: Site) -> Site:
    site.add(SECRET, name="myjfs", metaurl=METAURL, storage="minio", bucket=OLD.bucket, access_key="OLDKEY")
    return site


@pytest.fixture
def both(west: Site, east: Site) -> Clusters:
    return Clusters(west, {EAST: east})


def test_pods_of_the_same_name_are_told_apart_and_reached_where_they_are(
    both: Clusters, west: Site, east: Site
) -> None:
    assert [pod.name for pod in both.pods()] == [MOUNT.name, f"{EAST}/{MOUNT.name}"]
    both.exec(f"{EAST}/{MOUNT.name}", "jfs-mount", ["true"])
    assert (west.ran_in, east.ran_in) == ([], [MOUNT.name])
    east.away = True
    with pytest.raises(TransientError, match=f"Cluster {EAST}: The Kubernetes API"):
        both.exec(f"{EAST}/{MOUNT.name}", "jfs-mount", ["true"])
    with pytest.raises(TransientError, match=f"Cluster {EAST}: The Kubernetes API"):
        both.pods()


def test_a_command_for_a_person_has_the_name_that_kubectl_knows() -> None:
    assert kubectl("juicefs", "logs", "pod") == "kubectl -n juicefs logs pod"
    assert kubectl("juicefs", "logs", f"{EAST}/pod") == f"kubectl -n juicefs logs pod (in cluster {EAST})"


def test_secrets_of_the_same_name_are_patched_in_each_cluster_and_go_back_to_their_own_values(
    both: Clusters, west: Site, east: Site
) -> None:
    east.add(
        SECRET, name="myjfs", metaurl=METAURL, storage="minio", bucket="http://alias:9000/data", access_key="OLDKEY"
    )
    assert PatchSecrets(both, SECRET, "myjfs", NEW).apply() == [f"juicefs/{SECRET}", f"{EAST}/juicefs/{SECRET}"]
    assert west.store[SECRET].data["bucket"] == east.store[SECRET].data["bucket"] == NEW.bucket
    exact = {FIRST: {SECRET: {"bucket": OLD.bucket}}, EAST: {SECRET: {"bucket": "http://alias:9000/data"}}}
    PatchSecrets(both, SECRET, "myjfs", OLD, exact=exact).apply()
    assert west.store[SECRET].data["bucket"] == OLD.bucket
    assert east.store[SECRET].data["bucket"] == "http://alias:9000/data"


@pytest.mark.parametrize("away", ["west", "east"])
def test_a_cluster_that_is_away_stops_no_patch_in_the_other(both: Clusters, west: Site, east: Site, away: str) -> None:
    gone, there = (west, east) if away == "west" else (east, west)
    gone.away = True
    step = PatchSecrets(both, SECRET, "myjfs", NEW)
    with pytest.raises(TransientError, match="cannot be reached") as failed:
        step.apply()
    assert there.store[SECRET].data["bucket"] == NEW.bucket
    assert gone.store[SECRET].data["bucket"] == OLD.bucket
    assert f"done in {EAST if away == 'west' else 'the first'}" in failed.value.state
    patches, silent = step.look()
    assert (patches, list(silent)) == ([], [FIRST if away == "west" else EAST])


def mount(cluster: str, uid: str) -> MountPod:
    return MOUNT.model_copy(update={"name": f"{cluster}/{MOUNT.name}" if cluster else MOUNT.name, "uid": uid})


def test_pods_are_compared_with_those_of_their_own_cluster(both: Clusters, east: Site) -> None:
    pods, mounts = VolumePods(both, setting(), SECRET), (mount(FIRST, "1"), mount(EAST, "2"))
    before = plan(mount_pods=mounts, business_pods=tuple(pods.business_pods(mounts)))
    assert [f"{pod.namespace}/{pod.name}" for pod in before.business_pods] == ["apps/app-1", f"{EAST}/apps/app-1"]
    assert compare_pods(pods, before).restarted == []
    east.restarts = 1
    assert compare_pods(pods, before).restarted == [
        f"mount pod {EAST}/{MOUNT.name}: UID 2 → 2, restarts 0 → 1",
        f"pod {EAST}/apps/app-1: UID app-2 → app-2, restarts 0 → 1",
    ]


def test_another_volume_may_have_the_same_handle_in_another_cluster(both: Clusters, west: Site, east: Site) -> None:
    """Its broken pod is not waited for, and its start with other values is no concern."""
    east.store.clear()
    east.add(SECRET, name="myjfs", metaurl=METAURL)
    east.persistent_volumes = list  # type: ignore[method-assign]
    pods = VolumePods(both, setting(), SECRET)
    assert [pods.belongs(pod) for pod in both.pods()] == [True, False]
    west.command = east.command = f"juicefs format --bucket=http://third/x y; juicefs mount x {MOUNT.mount_path}"
    west.restarts = east.restarts = 1
    assert [pod.name for pod in stale_mount_pods(both, [mount(FIRST, "1")], NEW)] == [MOUNT.name]


def test_failed_requests_are_counted_where_the_clients_can_be_asked(both: Clusters, east: Site) -> None:
    mounts = [mount(FIRST, "1"), mount(EAST, "2")]
    assert request_errors(both, mounts) == {MOUNT.name: 1, f"{EAST}/{MOUNT.name}": 2}
    east.away = True
    assert request_errors(both, mounts) == {MOUNT.name: 1}


def test_one_cluster_by_two_connections_is_refused_by_name(west: Site, east: Site) -> None:
    assert check_distinct(Clusters(west, {EAST: east})) == []
    (finding,) = check_distinct(Clusters(west, {"other": east, EAST: west}))
    assert (finding.level, f"kubernetes_conn_id and {EAST} lead to the same cluster" in finding.message) == (
        "refusal",
        True,
    )


def test_a_permanent_error_stays_one(both: Clusters, east: Site) -> None:
    east.store[SECRET] = east.store[SECRET].__class__("juicefs", SECRET, "1", data={"name": "another"})
    with pytest.raises(PermanentError, match=f"Cluster {EAST}: Secret juicefs/{SECRET}"):
        PatchSecrets(both, SECRET, "myjfs", NEW).plan()

"""A volume whose clients are in two clusters: all are moved and proven; one that goes away stops no way back."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator

import pytest

from lab.environment import Lab
from lab.seaweed import Store
from lab.writer import Writer
from tests.support.faults import BROKEN
from tests.support.harness import Run, Start, Tell
from tests.support.second_cluster import EAST, SecondCluster, second_cluster
from tests.support.world import Sides, assert_all_on, assert_nothing_left_over, assert_nothing_lost, row

SECRET = f"{EAST}/juicefs/juicefs-sc-secret"
pytestmark = pytest.mark.timeout(900)
Both = Callable[..., Run]


@pytest.fixture(scope="module")
def east(fault_lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecondCluster]:
    with second_cluster(fault_lab, Sides.of(fault_lab).source, tmp_path_factory.mktemp("east")) as found:
        yield found


@pytest.fixture
def both(start: Start, east: SecondCluster) -> Iterator[Both]:
    """Make a run over both clusters."""

    def make(*faults: object, **params: object) -> Run:
        run = start(*faults, more_kubernetes_conn_ids=[EAST], **params)
        run.environment |= east.connection
        return run

    yield make
    east.come_back()


def pods_of(east: SecondCluster) -> dict[str, tuple[str, int]]:
    """Name -> UID and restarts of every pod that must not restart."""
    found = json.loads(east.kubectl("get", "pods", "-A", "-o", "json"))["items"]
    return {
        pod["metadata"]["name"]: (pod["metadata"]["uid"], pod["status"]["containerStatuses"][0]["restartCount"])
        for pod in found
        if "csi" not in pod["metadata"]["name"]
    }


def assert_east_on(east: SecondCluster, store: Store) -> None:
    """Assert that Secrets and clients there name a store."""
    for secret in json.loads(east.kubectl("get", "secret", "-n", "juicefs", "-o", "json"))["items"]:
        data = {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
        assert {data[key] for key in ("bucket",) if key in data} <= {store.bucket_url}
        assert {data[key] for key in ("secret-key", "secretkey") if key in data} <= {store.secret_key}
    shown = {json.loads((mount / ".config").read_text())["Format"]["Bucket"] for mount in east.mounts()}
    assert shown == {store.bucket_url}


@pytest.mark.slow
def test_a_volume_moves_with_the_clients_of_both_clusters(
    fault_lab: Lab, sides: Sides, east: SecondCluster, both: Both, writer: Writer
) -> None:
    before, run = pods_of(east), both()
    assert run.go() == "switched", run.errors
    proven = [client["pod"] for client in run.xcom("prove_clients")["clients"]]
    assert sorted(name.startswith(f"{EAST}/juicefs-") for name in proven) == [False, False, True]
    plan, report = run.xcom("plan", "markdown"), run.xcom("finalize", "markdown")
    assert f"`{SECRET}`: " in plan
    assert f"{EAST}/StatefulSet/juicefs-csi-controller" in plan
    assert f"client `{EAST}/juicefs-" in report
    assert "3 mount pods and 3 business pods: same UIDs, 0 restarts" in report
    assert SECRET in run.xcom("patch_secret")["patched"]
    assert f"{EAST}/DaemonSet/juicefs-csi-node" in run.xcom("restart_csi")["restarted"]
    assert pods_of(east) == before
    assert_all_on(fault_lab, sides.target)
    assert_east_on(east, sides.target)
    writer.stop()
    assert_nothing_left_over(fault_lab)
    assert_nothing_lost(fault_lab, writer)


@pytest.mark.slow
def test_a_client_in_the_second_cluster_that_does_not_move_takes_both_back(
    fault_lab: Lab, sides: Sides, east: SecondCluster, both: Both, writer: Writer, tell: Tell
) -> None:
    """It cannot build its new storage, and shows the new bucket."""
    run = both(client_timeout_s=8)
    (pod,) = json.loads(
        east.kubectl("get", "pods", "-n", "juicefs", "-l", "app.kubernetes.io/name=juicefs-mount", "-o", "json")
    )["items"]
    broken = east.kube.state / "pods" / pod["metadata"]["uid"] / "rootfs/root/.aws/config"
    broken.parent.mkdir(exist_ok=True)
    run.before = {
        "write_setting": lambda: broken.write_text("[default]\nretry_mode = broken\n"),
        "collect_diagnostics": broken.unlink,
    }
    outcome = run.go()
    assert outcome == "rolled back", run.errors
    assert "1 of 3 clients" in run.errors["prove_clients"]
    assert f"{EAST}/{pod['metadata']['name']}: it could not use the setting" in run.errors["prove_clients"]
    assert SECRET in run.xcom("restore_secret")["patched"]
    assert_all_on(fault_lab, sides.source)
    assert_east_on(east, sides.source)
    writer.stop()
    assert_nothing_lost(fault_lab, writer)
    tell("prove_clients", "a client in the second cluster is stuck", "-", f"{outcome}, both clusters")


@pytest.mark.slow
def test_a_cluster_that_goes_away_before_the_cut_over_stops_the_run_before_anything_is_touched(
    fault_lab: Lab, sides: Sides, east: SecondCluster, both: Both, tell: Tell
) -> None:
    before, run = row(fault_lab), both()
    run.before = {"write_setting": east.go_away}
    outcome = run.go()
    assert outcome == "failed", run.errors
    assert f"Cluster {EAST}: The Kubernetes API cannot be reached" in run.errors["write_setting"]
    assert run.states["restore_secret"] == "skipped"
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.source)
    assert_east_on(east, sides.source)
    assert f"cluster {EAST} did not answer: the volume's Lease there" in run.xcom("finalize", "markdown")
    east.come_back()
    run.clear("finalize")
    assert run.go() == "failed"
    assert "did not answer" not in run.xcom("finalize", "markdown")
    tell("write_setting", "the second cluster is away", "finalize cleared when it was back", f"{outcome}, all old")


@pytest.mark.slow
def test_a_cluster_that_goes_away_does_not_stop_the_way_back_of_the_other(
    fault_lab: Lab, sides: Sides, east: SecondCluster, both: Both, writer: Writer, tell: Tell
) -> None:
    run = both(BROKEN, client_timeout_s=8)
    run.before = {"collect_diagnostics": east.go_away}
    assert run.go() == "half rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    assert run.states["restore_setting"] == "success"
    for task in ("restore_secret", "prove_clients_on_old"):
        assert EAST in run.errors[task]
    report = run.xcom("finalize", "markdown")
    assert f"what the Secrets hold is not known: Cluster {EAST}: " in report
    # The setting is followed everywhere; the Secrets there wait for the cluster to come back.
    assert {json.loads((mount / ".config").read_text())["Format"]["Bucket"] for mount in east.mounts()} == {
        sides.source.bucket_url
    }
    east.come_back()
    run.before = {}
    run.clear("restore_secret", downstream=True)
    outcome = run.go()
    writer.stop()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    assert_east_on(east, sides.source)
    assert_nothing_lost(fault_lab, writer)
    tell("restore_secret", "the second cluster is away", "restore_secret cleared when it was back", outcome)

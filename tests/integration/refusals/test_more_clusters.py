"""What is refused of a second cluster that has the volume mounted, each by the name of its connection."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

import pytest

from include.juicefs_storage.switch.checks import needed_rights
from lab.environment import Lab
from tests.support.refusals import NS, SECRET, Look, refusals, warnings
from tests.support.second_cluster import EAST, SecondCluster, second_cluster

GIVEN = {"more_kubernetes_conn_ids": [EAST]}


@pytest.fixture(scope="module")
def east_up(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecondCluster]:
    with second_cluster(lab, lab.old_store, tmp_path_factory.mktemp("east"), heartbeat_s=3) as found:
        yield found


@pytest.fixture
def east(east_up: SecondCluster, connections: Callable[..., None]) -> Iterator[SecondCluster]:
    """With a connection that leads there."""
    connections(EAST, conn_type="kubernetes", extra={"kube_config_path": str(east_up.kubeconfig)})
    yield east_up
    east_up.kube.clear_faults()


def test_clients_in_two_clusters_are_no_strangers_to_a_run_that_is_given_both(look: Look, east: SecondCluster) -> None:
    strangers = refusals(look("check_volume"))
    assert len(strangers) == 1
    assert "is no mount pod of the run's clusters" in strangers[0]
    findings = look(dry_run=False, consistency="listing", **GIVEN)
    assert (refusals(findings), warnings(findings)) == ([], [])
    told = [finding.message for finding in findings]
    assert f"Cluster {EAST}: all {len(needed_rights(NS))} rights are granted" in told
    assert any("a block was written through each of 3 mounts" in message for message in told)
    assert any("4 pods that will use it" in message for message in told)


def test_a_right_that_is_missing_there_is_named(look: Look, east: SecondCluster) -> None:
    east.kube.order_fault({"deny": {"verb": "patch", "group": "", "resource": "secrets"}})
    (refused,) = refusals(look("check_rights", **GIVEN))
    assert refused.startswith(f"Cluster {EAST}: The connection's user may not patch secrets in namespace {NS}.")


def test_a_connection_that_leads_nowhere_is_named(look: Look, connections: Callable[..., None]) -> None:
    connections(EAST, conn_type="kubernetes", extra={"kube_config_path": "/no/such/file"})
    (refused,) = refusals(look("check_rights", **GIVEN))
    assert f"Cluster {EAST}: Connection '{EAST}'" in refused
    (refused,) = refusals(look("check_rights", more_kubernetes_conn_ids=["no_such"]))
    assert "Cluster no_such: " in refused


def test_one_cluster_by_two_connections_is_refused(lab: Lab, look: Look, connections: Callable[..., None]) -> None:
    connections(EAST, conn_type="kubernetes", extra={"kube_config_path": str(lab.kube.kubeconfig)})
    (refused,) = refusals(look("check_csi", **GIVEN))
    assert f"Connections kubernetes_conn_id and {EAST} lead to the same cluster" in refused


def test_a_secret_that_leads_to_another_volume_is_refused(look: Look, east: SecondCluster) -> None:
    """It has the name and the volume's name, and its metaurl names another database there."""

    def point(metaurl: str) -> None:
        value = base64.b64encode(metaurl.encode()).decode()
        patch = f'{{"data": {{"metaurl": "{value}"}}}}'
        east.kubectl("patch", "secret", SECRET, "-n", NS, "-p", patch)

    encoded = east.kubectl("get", "secret", SECRET, "-n", NS, "-o", "jsonpath={.data.metaurl}")
    before = base64.b64decode(encoded).decode()
    point(before.replace("/jfs", "/another"))
    try:
        (refused,) = refusals(look("check_volume", **GIVEN))
    finally:
        point(before)
    assert f"Cluster {EAST}: " in refused

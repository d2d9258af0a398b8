"""Connections that are missing or lead nowhere are errors of ours: what judges a run at its end handles no others."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.vault import FileVault
from include.juicefs_storage.errors import PermanentError


@pytest.mark.parametrize(
    "use",
    [
        lambda conn_id: KubernetesCluster.from_connection(conn_id, "juicefs"),
        lambda conn_id: FileVault.from_connection(conn_id, lambda _: None),
        lambda conn_id: S3Store.from_connection(conn_id, "bucket"),
        MySqlMetadata.from_connection,
    ],
    ids=["Kubernetes", "backups", "store", "metadata"],
)
def test_a_connection_that_is_missing(use: Callable[[str], Any]) -> None:
    with pytest.raises(PermanentError, match=r"nowhere(.|\n)*Admin → Connections"):
        use("nowhere")


@pytest.mark.parametrize(
    "connection",
    [
        {"conn_type": "kubernetes", "extra": {"kube_config_path": "/no/such/file"}},
        {"conn_type": "kubernetes", "extra": {"kube_config": "token: s3cr3t: ["}},
        {"conn_type": "kubernetes", "extra": {"kube_config": "{}"}},
        {"conn_type": "kubernetes", "extra": {"kube_config_path": "/x", "in_cluster": True}},
        {"conn_type": "kubernetes", "extra": {"in_cluster": True}},
        {"conn_type": "aws"},
    ],
    ids=["no file", "no YAML", "empty", "two ways", "outside of a cluster", "another type"],
)
def test_a_connection_that_leads_to_no_cluster(
    connection: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_K8S", json.dumps(connection))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(PermanentError, match=r"Connection 'k8s': expected the way to a cluster") as refused:
        KubernetesCluster.from_connection("k8s", "juicefs")
    assert "s3cr3t" not in str(refused.value)

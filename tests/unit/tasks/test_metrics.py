"""Metrics reach a StatsD server under the names that docs, dashboard and alerts use, and fail no step."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.sdk._shared.observability.metrics.statsd_logger import SafeStatsdLogger
from statsd import StatsClient  # type: ignore[import-untyped]

from include.juicefs_storage.tasks.metrics import METRICS, gauge, gauge_outcome

ROOT = Path(__file__).parents[3]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A StatsD server to which this process's metrics go."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(10)
        client = StatsClient("127.0.0.1", receiver.getsockname()[1], prefix="airflow")
        monkeypatch.setattr("airflow.sdk._shared.observability.metrics.stats._backend", SafeStatsdLogger(client))
        yield receiver


def received(server: socket.socket, count: int) -> dict[str, float]:
    lines = [server.recv(1024).decode().partition("|")[0].rpartition(":") for _ in range(count)]
    return {name: float(value) for name, _, value in lines}


def test_a_gauge_is_named_after_what_it_measures_and_the_volume(server: socket.socket) -> None:
    gauge("between_stores", True, "myjfs")
    assert received(server, 1) == {"airflow.juicefs_storage.between_stores.myjfs": 1.0}


@pytest.mark.parametrize(("outcome", "left_open"), [("switched", 0), ("rolled back", 0), ("half rolled back", 1)])
def test_the_end_of_a_run_says_whether_the_volume_is_between_two_stores(
    server: socket.socket, outcome: Any, left_open: int
) -> None:
    results: dict[str, dict[str, Any]] = {
        "copy_ahead": {"copied": 3, "copied_bytes": 300},
        "follow_writes": {"copied": 2, "copied_bytes": 20, "slowest_s": 1.5},
        "prove_clients": {"clients": [{}, {}]},
        "prove_no_restarts": {"failed_requests": 4},
    }
    gauge_outcome(outcome, "myjfs", results, 12.5)
    assert received(server, 8) == {
        f"airflow.juicefs_storage.{name}.myjfs": value
        for name, value in {
            "between_stores": left_open, "needs_a_person": left_open, "blocks_copied": 5, "bytes_copied": 320,
            "window_seconds": 12.5, "clients_proven": 2, "follower_slowest_seconds": 1.5, "failed_requests": 4,
        }.items()
    }  # fmt: skip


def test_an_exporter_that_fails_fails_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise OSError

    monkeypatch.setattr("airflow.sdk.observability.stats.gauge", away)
    gauge("ready", 1, "myjfs")


def test_docs_dashboard_and_alerts_use_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "deploy/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(re.findall(r"juicefs_storage_(\w+)", " ".join(queries))) == set(METRICS)
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    rules = yaml.safe_load((ROOT / "deploy/alerts.yaml").read_text())["groups"][0]["rules"]
    asked = set(re.findall(r"juicefs_storage_(\w+)", " ".join(rule["expr"] for rule in rules)))
    assert asked < set(METRICS)
    assert "between_stores" in asked
    documented = re.findall(r"^\| (`[a-z_`, ]+`) \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(documented))) == set(METRICS)
    [mapping] = yaml.safe_load((ROOT / "deploy/values.yaml").read_text())["statsd"]["extraMappings"]
    assert (mapping["match"], mapping["name"]) == ("airflow.juicefs_storage.*.*", "juicefs_storage_$1")

"""Metrics of a volume, through Airflow's own exporter: StatsD, OpenTelemetry or Datadog, as its configuration says.

A metric is a gauge `juicefs_storage.<what>.<volume>`, with a tag `volume` where the exporter has tags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from airflow.sdk.observability import stats

from include.juicefs_storage.switch.outcome import RunOutcome
from include.juicefs_storage.tasks.context import log

#: docs/metrics.md says what each means.
Metric = Literal[
    "between_stores",
    "needs_a_person",
    "window_seconds",
    "clients_proven",
    "blocks_copied",
    "bytes_copied",
    "follower_slowest_seconds",
    "failed_requests",
    "ready",
    "rehearsed_at_seconds",
]
METRICS: tuple[str, ...] = get_args(Metric)
#: The outcomes after which clients may be on either store, or a person has to look.
_OPEN: frozenset[RunOutcome] = frozenset({"held", "half rolled back", "moved on", "unknown"})
_COPIES = ("copy_ahead", "follow_writes", "catch_up", "catch_up_late", "copy_back", "copy_back_again", "copy_back_late")


def gauge(metric: Metric, value: float, volume: str) -> None:
    """Set a metric of a volume. A monitoring system that is away fails no step."""
    try:
        stats.gauge(f"juicefs_storage.{metric}.{volume}", float(value), tags={"volume": volume})
    except Exception as error:  # noqa: BLE001  an exporter of any kind, with errors of any kind
        log.warning("Metric %s is not exported: %s", metric, type(error).__name__)


def gauge_outcome(
    outcome: RunOutcome, volume: str, results: Mapping[str, Mapping[str, Any]], window_s: float | None
) -> None:
    """Set the metrics of a run that changed something, at its end.

    Args:
        outcome: How it ended.
        volume: The volume's name.
        results: What its tasks returned.
        window_s: From the write of the setting to the proof of the last client, in seconds; None: not both happened.
    """
    gauge("between_stores", outcome in _OPEN, volume)
    gauge("needs_a_person", outcome in _OPEN, volume)
    copies = [results.get(task, {}) for task in _COPIES]
    gauge("blocks_copied", sum(int(copy.get("copied", 0)) for copy in copies), volume)
    gauge("bytes_copied", sum(int(copy.get("copied_bytes", 0)) for copy in copies), volume)
    if window_s is not None:
        gauge("window_seconds", window_s, volume)
    if clients := results.get("prove_clients", {}).get("clients"):
        gauge("clients_proven", len(clients), volume)
    if (slowest_s := results.get("follow_writes", {}).get("slowest_s")) is not None:
        gauge("follower_slowest_seconds", slowest_s, volume)
    if (failed := results.get("prove_no_restarts", {}).get("failed_requests")) is not None:
        gauge("failed_requests", failed, volume)

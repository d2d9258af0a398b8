"""A copy's datasets reach Airflow's collector, as the OpenLineage provider reads it."""

from __future__ import annotations

import pytest
from airflow.sdk.lineage import HookLineageCollector

from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.tasks import lineage


def reported(monkeypatch: pytest.MonkeyPatch, prefix: str) -> tuple[list[str], list[str]]:
    """Return the URIs of inputs and outputs."""
    collector = HookLineageCollector()  # type: ignore[no-untyped-call]
    monkeypatch.setattr(lineage, "get_hook_lineage_collector", lambda: collector)
    params = SyncParams(
        source_conn_id="old", source_bucket="jfs-old", source_prefix=prefix,
        target_conn_id="new", target_bucket="jfs-new", target_prefix=prefix,
    )  # fmt: skip
    lineage.report_datasets(params)
    found = collector.collected_assets
    return [info.asset.uri for info in found.inputs], [info.asset.uri for info in found.outputs]


def test_a_copy_reads_the_old_bucket_and_writes_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reported(monkeypatch, "myjfs") == (["s3://jfs-old/myjfs"], ["s3://jfs-new/myjfs"])


@pytest.mark.parametrize("prefix", ["", "ü ö", "a%2", "a?b#c", "x" * 1000, "s3://"])
def test_no_prefix_stops_the_copy(monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    reported(monkeypatch, prefix)

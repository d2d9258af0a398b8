"""What `juicefs_storage_sync` refuses before it copies, on stores in memory and without a scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from include.juicefs_storage.tasks import context, sync
from include.juicefs_storage.tasks.sync.folder import MANIFESTS_ENV
from tests.support.s3_memory import MemoryStore
from tests.support.sync_run import SyncRun

Start = Callable[..., SyncRun]


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    with MemoryStore("one", "two") as serving:
        for key in ("myjfs/chunks/0", "myjfs/juicefs_uuid", "other/x"):
            serving.put("one", key, key.encode())
        yield serving


@pytest.fixture
def start(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Two connections to one store, under two names."""
    for name, url in (("OLD", store.url), ("NEW", store.url.replace("127.0.0.1", "localhost"))):
        connection = {"conn_type": "aws", "login": "AK", "password": "SK", "extra": {"endpoint_url": url}}
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
    monkeypatch.setenv(MANIFESTS_ENV, tmp_path.as_uri())

    def started(**params: Any) -> SyncRun:
        given = {
            "source_conn_id": "old", "source_bucket": "one", "target_conn_id": "new", "target_bucket": "two",
            "dry_run": False,
        }  # fmt: skip
        run = SyncRun("run", {**given, **params})
        current = {"params": run.params, "run_id": "run", "ti": run, "dag": run}
        for module in (context, sync.plan):
            monkeypatch.setattr(module, "get_current_context", lambda: current)
        return run

    return started


@pytest.mark.parametrize("params", [{"dry_run": True}, {"mode": "verify"}, {"recut_from": "earlier"}])
def test_a_prefix_that_holds_nothing(start: Start, params: dict[str, Any]) -> None:
    with pytest.raises(AirflowFailException, match="did you mean `myjfs/`"):
        start(source_prefix="myjsf", **params).run("check")


def test_a_prefix_that_holds_something(start: Start, store: MemoryStore) -> None:
    assert start(source_prefix="myjfs", target_prefix="myjfs").whole()["objects"] == 2
    assert set(store.buckets["two"]) == {"myjfs/chunks/0", "myjfs/juicefs_uuid"}

"""What `juicefs_storage_sync` refuses before it copies, on stores in memory and without a scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

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
        run.install(monkeypatch)
        return run

    return started


@pytest.mark.parametrize("params", [{"dry_run": True}, {"mode": "verify"}, {"recut_from": "earlier"}])
def test_a_prefix_that_holds_nothing(start: Start, params: dict[str, Any]) -> None:
    with pytest.raises(AirflowFailException, match="did you mean `myjfs/`"):
        start(source_prefix="myjsf", **params).run("check")


def test_a_prefix_that_holds_something(start: Start, store: MemoryStore) -> None:
    assert start(source_prefix="myjfs", target_prefix="myjfs").whole()["objects"] == 2
    assert set(store.buckets["two"]) == {"myjfs/chunks/0", "myjfs/juicefs_uuid"}


@pytest.mark.parametrize(
    ("source_prefix", "target_prefix"), [("", ""), ("myjfs/", "myjfs/"), ("myjfs/", ""), ("", "backup/")]
)
def test_one_store_by_two_names_is_not_copied_into_itself(
    start: Start, store: MemoryStore, source_prefix: str, target_prefix: str
) -> None:
    before = set(store.buckets["one"])
    run = start(target_bucket="one", source_prefix=source_prefix, target_prefix=target_prefix)
    with pytest.raises(AirflowFailException, match="found one by two names"):
        run.run("check")
    assert set(store.buckets["one"]) == before


def test_one_store_by_two_names_with_prefixes_apart(start: Start, store: MemoryStore) -> None:
    start(target_bucket="one", source_prefix="myjfs/", target_prefix="backup/").whole()
    assert {"backup/chunks/0", "backup/juicefs_uuid"} < set(store.buckets["one"])


def test_stores_that_reading_tells_apart_are_not_written_to(start: Start, store: MemoryStore) -> None:
    start().run("check")
    key = "myjfs/chunks/0"
    store.buckets["two"][key] = replace(store.buckets["one"][key], modified_s=0)
    start().run("check")
    start(dry_run=True, target_bucket="one", target_prefix="backup").run("check")
    start(mode="verify", target_bucket="one", target_prefix="backup").run("check")
    assert store.requests["PUT"] == 0


def test_a_copy_with_the_dates_of_the_source_is_another_store(start: Start, store: MemoryStore) -> None:
    store.buckets["two"].update(store.buckets["one"])
    start().run("check")
    assert store.requests["PUT"] == store.requests["DELETE"] == 1
    assert store.buckets["two"] == store.buckets["one"]

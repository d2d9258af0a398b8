"""What `juicefs_storage_sync` refuses before it copies, on stores in memory and without a scheduler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.names import PACE
from include.juicefs_storage.tasks import sync
from include.juicefs_storage.tasks.sync.folder import MANIFESTS_ENV
from include.juicefs_storage.volume.checksum import CHECKSUM_HEADER
from lab.process import wait_for
from tests.support.s3_memory import MemoryStore, Object, _Handler
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


def test_the_listing_for_the_plan_waits_in_a_pause(
    start: Start, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sync.listing, sync.steering):
        monkeypatch.setattr(module, "EVERY_S", 0.05)
    run = start(source_prefix="myjfs")
    run.variables[PACE] = '{"paused": true}'
    with ThreadPoolExecutor(1) as pool:
        checking = pool.submit(run.run, "check")
        wait_for("the pause", lambda: (run.xcoms.get(("check", "progress")) or {}).get("state") == "paused",
                 deadline_s=30)  # fmt: skip
        assert not checking.done()
        run.variables.clear()
        assert checking.result(30) == []
    assert run.xcoms["check", "progress"]["objects"] == 2


class LimitedStore(MemoryStore):
    """A store whose keys may do all below `myjfs/`, and nothing to the bucket as such: no HEAD, no LIST of it."""

    def __init__(self, *buckets: str) -> None:
        super().__init__(*buckets)
        self.RequestHandlerClass = _Limited
        self.refused = 0


class _Limited(_Handler):
    server: LimitedStore

    def _list(self, objects: dict[str, Object]) -> None:
        if not self.query.get("prefix", "").startswith("myjfs/"):
            self.server.refused += 1
            self._refuse(403, "AccessDenied")
            return
        super()._list(objects)

    def _serve(self) -> None:
        if self.command == "HEAD" and "/" not in self.path.strip("/"):
            self.server.refused += 1
            self._refuse(403, "AccessDenied")
        else:
            super()._serve()

    do_HEAD = _serve  # noqa: N815  http.server's name


def test_limited_keys_tell_whether_the_bucket_is_there() -> None:
    with LimitedStore("one") as store:
        there, absent = (S3Bucket(S3Store(store.url, bucket, "", "AK", "SK")) for bucket in ("one", "two"))
        assert (there.is_absent("myjfs/"), absent.is_absent("myjfs/")) == (False, True)


def test_keys_that_are_limited_to_a_prefix_suffice(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with LimitedStore("one") as source, LimitedStore("two") as target:
        for number in range(3):
            source.put("one", f"myjfs/chunks/{number}", b"x")
        for name, url in (("OLD", source.url), ("NEW", target.url)):
            connection = {"conn_type": "aws", "login": "AK", "password": "SK", "extra": {"endpoint_url": url}}
            monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
        assert start(source_prefix="myjfs", target_prefix="myjfs").whole()["outcome"] == "proven"
        assert target.bodies("two") == source.bodies("one")
        assert source.refused
        with pytest.raises(AirflowFailException, match="expected objects below 'myjfs/nothing/'"):
            start(source_prefix="myjfs/nothing", target_prefix="myjfs").run("check")


def test_a_block_that_is_damaged_at_the_source_makes_the_run_red(start: Start, store: MemoryStore) -> None:
    store.put("one", "myjfs/chunks/rotten", b"x", **{CHECKSUM_HEADER: "1"})
    run = start(source_prefix="myjfs", target_prefix="myjfs")
    with pytest.raises(AirflowFailException, match="1 objects are damaged after `copy`"):
        run.whole()
    assert "myjfs/chunks/rotten" not in store.buckets["two"]
    assert "myjfs/chunks/0" in store.buckets["two"]


def test_a_copy_alone_is_not_green_with_a_key_that_the_target_keeps_under_another(
    start: Start, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SeaweedFS and others do that keep objects as files."""
    store.put("one", "myjfs/a//b", b"x")
    put = _Handler._put

    def folding(self: _Handler, objects: dict[str, Object], key: str, body: bytes) -> None:
        put(self, objects, key.replace("//", "/"), body)

    monkeypatch.setattr(_Handler, "_put", folding)
    run = start(source_prefix="myjfs", target_prefix="myjfs", mode="copy")
    run.returned("check", run.run("check"))
    (shard,) = run.returned("plan_partitions", run.run("plan_partitions"))
    with pytest.raises(TransientError, match="1 objects could not be treated"):
        run.run("copy", shard)
    run.returned("list_to_verify", run.run("list_to_verify"))
    report = run.returned("reconcile", run.run("reconcile"))
    assert report["outcome"] == "not proven"

"""The tasks of `juicefs_storage_sync` one after the other on two real stores, without a scheduler."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException
from airflow.sdk.lineage import HookLineageCollector

from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.copy.partitions import task_groups
from include.juicefs_storage.names import PACE
from include.juicefs_storage.objects.model import Copied, Listed
from include.juicefs_storage.tasks import sync
from include.juicefs_storage.tasks.sync.folder import MANIFESTS_ENV
from lab.environment import Lab
from lab.process import wait_for
from lab.seaweed import Store
from tests.support.sync_run import SyncRun

PREFIX = "parts/"
KEYS = [f"{head}/{number:03}" for head in ("a", "b/c", "zz ü+%") for number in range(20)]


@pytest.fixture
def stores(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, Store]]:
    both = lab.old_store, lab.new_store
    for name, store in zip(("OLD", "NEW"), both, strict=True):
        connection = {
            "conn_type": "aws", "login": store.access_key, "password": store.secret_key,
            "extra": {"endpoint_url": store.endpoint_url},
        }  # fmt: skip
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
    monkeypatch.setenv(MANIFESTS_ENV, tmp_path.as_uri())
    for key in KEYS:
        both[0].client().put_object(Bucket=both[0].bucket, Key=PREFIX + key, Body=key.encode() * 10)
    yield both
    for store in both:
        for key in store.objects(PREFIX):
            store.client().delete_object(Bucket=store.bucket, Key=key)


@pytest.fixture
def start(stores: tuple[Store, Store], monkeypatch: pytest.MonkeyPatch) -> Any:
    def started(run_id: str, **params: Any) -> SyncRun:
        source, target = stores
        given = {
            "source_conn_id": "old", "source_bucket": source.bucket, "source_prefix": PREFIX,
            "target_conn_id": "new", "target_bucket": target.bucket, "target_prefix": PREFIX,
        }  # fmt: skip
        airflow = SyncRun(run_id, {**given, **params})
        airflow.install(monkeypatch)
        return airflow

    return started


def test_a_dry_run_counts_and_writes_nothing(stores: tuple[Store, Store], start: Any) -> None:
    written = [store.mutating_requests() for store in stores]
    run = start("dry", dry_run=True, partitions=4, exclude=["b/*"])
    report = run.whole()
    assert (report["outcome"], report["objects"], report["partitions"]) == ("planned", 40, 4)
    assert "| partitions | 4, cut by a listing of the source |" in run.xcoms["plan_partitions", "markdown"]
    assert [store.mutating_requests() for store in stores] == written


def test_a_run_is_cut_as_an_earlier_one_and_tasks_may_have_several_partitions(
    stores: tuple[Store, Store], start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = stores
    for module in ("plan", "work"):
        name = f"include.juicefs_storage.tasks.sync.{module}.task_groups"
        monkeypatch.setattr(name, lambda partitions: task_groups(partitions, most=3))
    lineage = HookLineageCollector()  # type: ignore[no-untyped-call]
    monkeypatch.setattr("include.juicefs_storage.tasks.lineage.get_hook_lineage_collector", lambda: lineage)
    first = start("first", dry_run=False, partitions=6)
    report = first.whole()
    assert (report["outcome"], report["partitions"]) == ("proven", 6)
    assert [len(shard["partitions"]) for shard in first.xcoms["plan_partitions", "return_value"]] == [2, 2, 2]
    assert [phase["totals"] for phase in report["phases"]] == [
        {"copied/etag": [60, sum(len(key.encode()) * 10 for key in KEYS)]},
        {"same/etag": [60, sum(len(key.encode()) * 10 for key in KEYS)]},
    ]
    assert target.objects(PREFIX) == source.objects(PREFIX)
    # Airflow itself tells of the files that the tasks read and write.
    told = lineage.collected_assets
    read, written = (
        {i.asset.uri for i in infos if not i.asset.uri.startswith("file:")} for infos in (told.inputs, told.outputs)
    )
    assert (read, written) == ({f"s3://{source.bucket}/parts"}, {f"s3://{target.bucket}/parts"})

    lists = source.requests()["LIST", "200"]
    again = start("again", dry_run=False, partitions=3, recut_from="first", mode="verify")
    report = again.whole()
    assert (report["outcome"], report["partitions"]) == ("proven", 3)
    assert "| partitions | 3, cut by the manifests of first |" in again.xcoms["plan_partitions", "markdown"]
    # Two for check, one for each partition: none for the plan.
    assert source.requests()["LIST", "200"] - lists == 5


def test_a_source_listed_by_several_tasks_is_cut_as_by_one(
    stores: tuple[Store, Store], start: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def parts(run: SyncRun) -> list[dict[str, Any]]:
        run.run("plan_partitions")
        plan: dict[str, Any] = json.loads((tmp_path / run.run_id / "plan.json").read_text())
        return [{**partition, "where": ""} for partition in plan["partitions"]]

    alone = start("alone", partitions=4)
    assert alone.returned("check", alone.run("check")) == [], "no task more for a source that is small"
    cut = parts(alone)

    several = start("several", partitions=4, planners=3)
    shares = several.returned("check", several.run("check"))
    assert [share["label"] for share in shares] == ["1 of 3", "2 of 3", "3 of 3"]
    listed = [several.run("list_source", share) for share in shares[:2]]
    with pytest.raises(AirflowFailException, match="clear list_source 2 with Downstream"):
        several.run("plan_partitions")
    listed += [several.run("list_source", share) for share in (shares[2], shares[2])][:1]
    assert sum(share["objects"] for share in listed) == len(KEYS)
    assert parts(several) == cut

    monkeypatch.setattr("include.juicefs_storage.tasks.sync.listing.ALONE_CALLS", 1)
    monkeypatch.setattr("include.juicefs_storage.adapters.s3.listing._PAGE_KEYS", 7)
    large = start("large", partitions=4)
    shares = large.returned("check", large.run("check"))
    assert len(shares) > 1, "what is left after some requests is shared out"
    assert 0 < sum(large.run("list_source", share)["objects"] for share in shares) < len(KEYS)
    assert parts(large) == cut


@pytest.mark.parametrize("engine", ["juicefs", "native"])
def test_every_engine_is_proven_in_the_same_way(engine: str, stores: tuple[Store, Store], start: Any) -> None:
    source, target = stores
    report = start(engine, dry_run=False, engine=engine, partitions=2, compare="content").whole()
    assert report["outcome"] == "proven"
    assert report["phases"][1]["totals"].keys() == {"same/content"}
    assert target.objects(PREFIX) == source.objects(PREFIX)
    assert len([note for note in report["notes"] if "juicefs sync" in note]) == (2 if engine == "juicefs" else 0)


def test_what_is_left_out_is_red_and_names_the_partition(
    stores: tuple[Store, Store], start: Any, tmp_path: Path
) -> None:
    run = start("red", dry_run=False, partitions=3, mode="copy")
    run.whole()
    plan_id = run.xcoms["plan_partitions", "summary"]["plan_id"]
    (tmp_path / "red" / plan_id / "copy" / "00001.parquet").unlink()
    report = run.returned("reconcile", run.run("reconcile"))
    assert "1 of 3 partitions have no finished manifest of `copy`: 1. Clear" in report["problems"][0]
    with pytest.raises(AirflowFailException, match="not proven"):
        run.run("finalize")


def test_what_is_deleted_before_it_is_copied_is_red_and_the_next_run_green(
    stores: tuple[Store, Store], start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copy = stores[0], NativeEngine.copy

    def deleting(engine: NativeEngine, objects: Sequence[Listed], **how: Any) -> list[Copied]:
        source.client().delete_object(Bucket=source.bucket, Key=PREFIX + KEYS[0])
        return copy(engine, objects, **how)

    with monkeypatch.context() as during:
        during.setattr(NativeEngine, "copy", deleting)
        with pytest.raises(AirflowFailException, match=r"1 objects left the source.*vanished.csv.*Start a new run"):
            start("deleted", dry_run=False, mode="copy").whole()
    assert start("again", dry_run=False, mode="copy").whole()["outcome"] == "proven"


def test_a_plan_that_was_made_again_is_not_mixed_with_the_earlier_one(stores: tuple[Store, Store], start: Any) -> None:
    run = start("twice", dry_run=False, partitions=2)
    run.returned("check", run.run("check"))
    earlier = run.run("plan_partitions")
    assert run.run("plan_partitions") == earlier, "the same listing gives the same plan"
    stores[0].client().put_object(Bucket=stores[0].bucket, Key=f"{PREFIX}new", Body=b"1")
    run.returned("check", run.run("check"))
    run.run("plan_partitions")
    with pytest.raises(AirflowFailException, match="the plan was made again since"):
        run.run("copy", earlier[0])


@dataclass
class Copy:
    """Task `copy` of one partition, in a thread, and what it says of itself."""

    run: SyncRun
    shard: dict[str, Any]

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=lambda: self.run.run("copy", self.shard), daemon=True)
        self.thread.start()

    @property
    def said(self) -> dict[str, Any]:
        return dict(self.run.xcoms.get(("copy", "progress")) or {"state": "", "objects": 0})

    def wait(self, what: str, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        wait_for(what, lambda: condition(self.said), deadline_s=60, poll_s=0.02)
        return self.said

    def wait_silent(self, stores: tuple[Store, Store]) -> None:
        """Wait until nothing was asked of a store between one and the next of several looks of the task."""
        counts: list[Any] = []

        def silent() -> bool:
            counts.append([store.requests() for store in stores])
            return len(counts) > 5 and counts[-1] == counts[-6]

        wait_for("no request", silent, deadline_s=60, poll_s=0.2)


@pytest.fixture
def copying(stores: tuple[Store, Store], start: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Copy]]:
    """Start a copy of 16 MiB, small and large objects, which looks at the Variable all the time."""
    source, target = stores
    for number in range(24):
        size = 2**19 if number < 20 else 3 * 2**19
        source.client().put_object(Bucket=source.bucket, Key=f"{PREFIX}much/{number:02}", Body=bytes([number]) * size)
    for module in (sync.work, sync.steering):
        monkeypatch.setattr(module, "EVERY_S", 0.05)
    begun: list[Copy] = []

    def copy(run_id: str, pace: str = "") -> Copy:
        for key in target.objects(PREFIX):
            target.client().delete_object(Bucket=target.bucket, Key=key)
        run = start(run_id, dry_run=False, partitions=1, mode="copy")
        run.returned("check", run.run("check"))
        run.variables = {PACE: pace} if pace else {}
        begun.append(Copy(run, run.run("plan_partitions")[0]))
        return begun[-1]

    yield copy
    for each in begun:
        each.run.variables = {}
        each.thread.join(60)


def test_the_bandwidth_is_kept_and_can_be_changed_while_it_runs(copying: Callable[..., Copy]) -> None:
    for run_id in ("warm", "free"):
        free = copying(run_id)
        free.thread.join(60)
    # A quarter of what it does without a limit; on a machine that is busy, no less than some seconds take.
    mib_s = max(4.0, 16 / max(0.5, free.said["elapsed_s"]) / 4)
    held = copying("held", f'{{"bandwidth_mib_s": {mib_s}}}')
    held.thread.join(60)
    # The last object is let go when all before it have moved.
    assert held.said["elapsed_s"] > 0.8 * 16 / mib_s
    if mib_s > 4:
        assert held.said["elapsed_s"] > 3 * free.said["elapsed_s"]

    slow = copying("slow", '{"bandwidth_mib_s": 0.5}')
    found = slow.wait("it moves slowly, and says for how long", lambda said: bool(said.get("eta_s")))
    assert found["eta_s"] > 10
    assert "limited to 0.5 MiB/s by Variable" in found["because"]
    slow.run.variables[PACE] = '{"bandwidth_mib_s": 0}'
    slow.thread.join(60)
    assert slow.said["state"] == "ended"
    assert slow.said["elapsed_s"] < found["elapsed_s"] + found["eta_s"] / 2


def test_a_pause_asks_nothing_of_the_stores_and_what_comes_after_is_whole(
    stores: tuple[Store, Store], copying: Callable[..., Copy], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    copy = copying("paused", '{"paused": true}')
    copy.wait("it is paused from the start", lambda said: said["state"] == "paused")
    before = stores[0].requests()
    copy.wait_silent(stores)
    assert stores[0].requests() == before
    assert copy.said["objects"] == 0
    copy.run.variables[PACE] = '{"bandwidth_mib_s": 4, "concurrency": 2}'
    copy.wait("some are copied", lambda said: said["objects"] > 2)
    copy.run.variables[PACE] = '{"paused": true}'
    copy.wait("it is paused again", lambda said: said["state"] == "paused")
    copy.wait_silent(stores)
    assert 0 < len(stores[1].objects(PREFIX)) < len(stores[0].objects(PREFIX))
    heard = copy.said
    copy.wait("it is alive", lambda said: said["elapsed_s"] > heard["elapsed_s"])
    assert copy.said["eta_s"] is None
    assert f"PAUSED by Variable {PACE}. Whoever may change Variables resumes it" in caplog.text
    copy.run.variables = {}
    copy.thread.join(60)
    assert stores[1].objects(PREFIX) == stores[0].objects(PREFIX)
    assert copy.said["paused_s"] > 0


def test_check_refuses_what_cannot_work(
    stores: tuple[Store, Store], start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for change, said in (
        ({"target_bucket": "no-such-bucket"}, "no-such-bucket"),
        ({"target_conn_id": "nobody"}, "make the connection in Airflow"),
        ({"recut_from": "never"}, "Param `recut_from`"),
    ):
        with pytest.raises(AirflowFailException, match=said):
            start("refused", **change).run("check")
    monkeypatch.delenv(MANIFESTS_ENV)
    with pytest.raises(AirflowFailException, match=MANIFESTS_ENV):
        start("refused").run("check")

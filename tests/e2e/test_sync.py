"""`juicefs_storage_sync` through a real scheduler: a planner and a partition are killed, and run again alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import pytest

from include.juicefs_storage.adapters.manifests import ManifestReader
from include.juicefs_storage.names import COPY_POOL, PACE
from include.juicefs_storage.objects.model import ObjectOutcome
from lab.airflow import POOL_SLOTS, Airflow
from lab.environment import Lab
from lab.keys import random_part
from lab.process import Server, wait_for

DAG_ID = "juicefs_storage_sync"
RUN_S = 300
OBJECTS, BYTES = 240, 128 * 2**10
PREFIX = "e2e/sync/"


@pytest.fixture(scope="module")
def lab(lab: Lab) -> Iterator[Lab]:
    client = lab.old_store.client()
    for number in range(OBJECTS):
        body = number.to_bytes(4, "big") * (BYTES // 4)
        client.put_object(Bucket=lab.old_store.bucket, Key=f"{PREFIX}{number:04} ü+%.bin", Body=body)
    yield lab
    for store in (lab.old_store, lab.new_store):
        for key in store.objects(PREFIX):
            store.client().delete_object(Bucket=store.bucket, Key=key)


def start(lab: Lab, airflow: Airflow, **params: object) -> str:
    given = {
        "source_conn_id": "minio_old",
        "source_bucket": lab.old_store.bucket,
        "source_prefix": PREFIX,
        "target_conn_id": "minio_new",
        "target_bucket": lab.new_store.bucket,
        "target_prefix": PREFIX,
        "partitions": 3,
    }
    return airflow.trigger(DAG_ID, given | params)


def finish(airflow: Airflow, run_id: str) -> tuple[str, dict[str, Any]]:
    state = airflow.wait_run(DAG_ID, run_id, timeout_s=RUN_S)
    errors = [airflow.task_error(DAG_ID, run_id, t) for t in airflow.task_states(DAG_ID, run_id) if t.state == "failed"]
    report = airflow.xcom(DAG_ID, run_id, "finalize", "report")
    assert report, errors
    return state, report


def task_path(run_id: str, task_id: str, index: int) -> str:
    return f"/dags/{DAG_ID}/dagRuns/{run_id}/taskInstances/{task_id}/{index}"


def kill(lab: Lab, airflow: Airflow, path: str) -> None:
    """SIGKILL the process of a task; only ever one of this lab's scheduler."""
    scheduler = Server.load(lab.state, "airflow-scheduler")
    assert scheduler
    process = psutil.Process(airflow.api("GET", path)["pid"])
    assert scheduler.pid in {parent.pid for parent in process.parents()}
    process.kill()


def kill_planner(lab: Lab, airflow: Airflow, run_id: str, index: int) -> None:
    """Kill a task that lists the source, which does not answer; return when all have listed, and none copies."""
    path, source = task_path(run_id, "list_source", index), lab.old_store.server()
    assert source
    try:
        wait_for(
            "the check has ended",
            lambda: {t.state for t in airflow.task_states(DAG_ID, run_id) if t.task_id == "check"} == {"success"},
            deadline_s=RUN_S,
        )
        os.kill(source.pid, signal.SIGSTOP)
        slots(airflow, POOL_SLOTS)
        planner = ("list_source", index, "running")  # it is not there before the check has been mapped over
        wait_for(
            "a planner is at work",
            lambda: planner in {(t.task_id, t.map_index, t.state) for t in airflow.task_states(DAG_ID, run_id)},
            deadline_s=RUN_S,
        )
        kill(lab, airflow, path)
    finally:
        os.kill(source.pid, signal.SIGCONT)

    def listed() -> bool:
        tasks = [t for t in airflow.task_states(DAG_ID, run_id) if t.task_id == "list_source"]
        return {t.state for t in tasks} == {"success"}

    wait_for("the source is listed", listed, deadline_s=RUN_S, poll_s=0.2)
    slots(airflow, 0)  # the plan is cut before a copy begins


def slots(airflow: Airflow, count: int) -> None:
    """Let so many tasks of copies run at once."""
    # Airflow wants every field of the pool, whatever the mask says.
    pool = {"pool": COPY_POOL, "slots": count, "include_deferred": False}
    airflow.api("PATCH", f"/pools/{COPY_POOL}", json=pool, params={"update_mask": "slots"})


def kill_copy(lab: Lab, airflow: Airflow, run_id: str, index: int) -> None:
    """Kill the task of one partition once it has copied something."""
    path = task_path(run_id, "copy", index)
    third = range(index * OBJECTS // 3 + 1, (index + 1) * OBJECTS // 3 - 1)

    def at_work() -> bool:
        there = {int(key.removeprefix(PREFIX)[:4]) for key in lab.new_store.objects(PREFIX)}
        return bool(there & set(third)) and airflow.api("GET", path)["state"] == "running"

    wait_for(f"copy {index} is at work", at_work, deadline_s=RUN_S, poll_s=0.2)
    kill(lab, airflow, path)


def states(airflow: Airflow, run_id: str) -> list[str]:
    """Of the tasks that copy or compare, in which each says how far it is, as the pages read it."""
    answer = airflow.page(f"runs/{DAG_ID}/{quote(run_id, safe='')}/progress")
    return [task["state"] for task in answer.json()["tasks"] if task["task_id"] in {"copy", "verify"}]


@contextmanager
def paused(airflow: Airflow) -> Iterator[None]:
    """Pause every copy while the block lasts."""
    airflow.api("POST", "/variables", json={"key": PACE, "value": '{"paused": true}'})
    try:
        yield
    finally:
        airflow.api("DELETE", f"/variables/{PACE}")


def puts(requests: dict[tuple[str, str], int]) -> int:
    return sum(count for (kind, status), count in requests.items() if kind == "PUT" and status == "200")


def test_a_killed_planner_and_partition_run_again_alone_and_nothing_is_copied_twice(lab: Lab, airflow: Airflow) -> None:
    written, before = lab.old_store.mutating_requests(), puts(lab.new_store.requests())
    slots(airflow, 0)
    run_id = start(lab, airflow, dry_run=False, bandwidth_mib_s=4, planners=2)
    kill_planner(lab, airflow, run_id, 1)
    with paused(airflow):
        slots(airflow, POOL_SLOTS)
        wait_for("all are paused", lambda: states(airflow, run_id) == ["paused"] * 3, deadline_s=120, poll_s=0.5)
        assert lab.new_store.objects(PREFIX) == {}
    kill_copy(lab, airflow, run_id, 1)
    state, report = finish(airflow, run_id)
    assert states(airflow, run_id) == ["ended"] * 6
    assert report["phases"][0]["paused_s"] > 0

    assert (state, report["outcome"], report["problems"]) == ("success", "proven", [])
    tries = {(t.task_id, t.map_index): t.try_number for t in airflow.task_states(DAG_ID, run_id) if t.map_index >= 0}
    again = {("list_source", 1), ("copy", 1)}
    assert {task for task, number in tries.items() if number > 1} == again
    assert report["partitions"] == 3
    copied, verified = report["phases"]
    assert sum(count for count, _ in copied["totals"].values()) == OBJECTS
    assert copied["totals"]["same/etag"][0] >= 1, "what the killed try had copied was found in place"
    assert verified["totals"] == {"same/etag": [OBJECTS, OBJECTS * BYTES]}
    assert puts(lab.new_store.requests()) - before == OBJECTS
    assert lab.old_store.mutating_requests() == written
    assert lab.new_store.objects(PREFIX) == lab.old_store.objects(PREFIX)
    names = airflow.api("GET", f"/dags/{DAG_ID}/dagRuns/{run_id}/taskInstances/copy/listMapped")["task_instances"]
    assert {task["rendered_map_index"][:4] for task in names} == {"000 ", "001 ", "002 "}
    manifests = sorted((lab.state / "manifests").glob("*/*/verify/*.parquet"))[-3:]
    keys = [row.key for file in manifests for row in ManifestReader(file).rows(tuple(ObjectOutcome))]
    assert keys == sorted(key.removeprefix(PREFIX) for key in lab.old_store.objects(PREFIX))
    secrets = [lab.old_store.secret_key, lab.new_store.secret_key]
    logs = [airflow.task_log(DAG_ID, run_id, "copy", map_index=index) for index in range(3)]
    assert [secret for secret in secrets for text in (*logs, str(report)) if random_part(secret) in text] == []


def test_a_difference_ends_the_run_red_and_clearing_the_partition_makes_it_green(lab: Lab, airflow: Airflow) -> None:
    client, bucket = lab.new_store.client(), lab.new_store.bucket
    changed, lost = f"{PREFIX}0200 ü+%.bin", f"{PREFIX}0010 ü+%.bin"
    body = client.get_object(Bucket=bucket, Key=changed)["Body"].read()
    client.put_object(Bucket=bucket, Key=changed, Body=bytes(BYTES))
    client.delete_object(Bucket=bucket, Key=lost)
    run_id = start(lab, airflow, dry_run=False, mode="verify", partitions=1)
    state, report = finish(airflow, run_id)
    assert (state, report["outcome"]) == ("failed", "not proven")
    assert [problem.partition(" after")[0] for problem in report["problems"]] == [
        "1 objects are missing",
        "1 objects are different",
    ]
    files = {Path(name).name: Path(name.removeprefix("file://")).read_text() for name in report["files"]}
    assert set(files) == {"missing.csv", "different.csv"}
    assert "0200 ü+%.bin" in files["different.csv"]
    assert client.get_object(Bucket=bucket, Key=changed)["Body"].read() == bytes(BYTES)

    client.put_object(Bucket=bucket, Key=changed, Body=body)
    client.put_object(Bucket=bucket, Key=lost, Body=(10).to_bytes(4, "big") * (BYTES // 4))
    airflow.api(
        "POST", f"/dags/{DAG_ID}/clearTaskInstances",
        json={
            "dry_run": False, "dag_run_id": run_id, "task_ids": [["verify", 0]], "only_failed": False,
            "include_downstream": True, "reset_dag_runs": True,
        },
    )  # fmt: skip
    state, report = finish(airflow, run_id)
    assert (state, report["outcome"]) == ("success", "proven")


def test_a_volume_is_copied_and_proven_by_its_metadata(lab: Lab, airflow: Airflow) -> None:
    """The registry names the Secret, the Secret the metadata; of the copy a block is missing."""
    prefix, client = f"{lab.volume.name}/", lab.new_store.client()
    lost = max(key for key in lab.new_store.objects(f"{prefix}chunks/"))
    client.delete_object(Bucket=lab.new_store.bucket, Key=lost)
    written = lab.old_store.objects(prefix)
    run_id = start(
        lab, airflow, dry_run=False, source_prefix=prefix, target_prefix=prefix, exclude=["testing/*", "meta/*"],
        plan="metadata", volume=lab.volume.name, partitions=2,
    )  # fmt: skip
    state, report = finish(airflow, run_id)
    assert (state, report["outcome"], report["problems"]) == ("success", "proven", [])
    assert report["objects"] >= 30
    assert report["phases"][0]["totals"]["copied/etag"][0] == 1
    assert lab.new_store.objects(lost).keys() == {lost}
    assert written.items() <= lab.old_store.objects(prefix).items()
    logs = [airflow.task_log(DAG_ID, run_id, "copy", map_index=index) for index in range(2)]
    logs.append(airflow.task_log(DAG_ID, run_id, "plan_partitions"))
    assert [text for text in (*logs, str(report)) if random_part(lab.mariadb.password) in text] == []

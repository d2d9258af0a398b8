"""`juicefs_storage_fleet` through a real scheduler: three volumes, one of them in use, a canary and a wave of two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any
from urllib.parse import quote

import pytest

from lab.airflow import Airflow
from lab.environment import Lab
from lab.fleet import add_volume, mount_of
from lab.keys import random_part
from lab.process import wait_for
from lab.volume import copy_volume
from lab.writer import Writer, seed_files
from tests.support.labs import up

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FLEET, SWITCH = "juicefs_storage_fleet", "juicefs_storage_switch"
RUN_S = 600


@pytest.fixture(scope="module")
def airflow_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab of its own: two more volumes are in it, and all end on the new store."""
    yield from up(tmp_path_factory.mktemp("fleet"), airflow=True)


@pytest.fixture(scope="module")
def volumes(airflow_lab: Lab) -> dict[str, Lab]:
    """Three volumes on the old store, each with files that were copied."""
    labs = {"myjfs": airflow_lab} | {name: add_volume(airflow_lab, name) for name in ("home", "work")}
    airflow_lab.seed(10)
    for name, own in labs.items():
        if name != "myjfs":
            seed_files(mount_of(own, name) / "seed", own.state / f"seed-{name}.jsonl", 10)
        copy_volume(name, own.old_store, own.new_store)
    return labs


@pytest.fixture(scope="module")
def airflow(airflow_lab: Lab) -> Airflow:
    assert airflow_lab.airflow is not None
    return airflow_lab.airflow


def failures(airflow: Airflow, run_id: str) -> list[tuple[str, str]]:
    """The tasks that failed, each with its error."""
    failed = [task for task in airflow.task_states(FLEET, run_id) if task.state == "failed"]
    return [(task.task_id, airflow.task_error(FLEET, run_id, task)) for task in failed]


def answer(airflow: Airflow, run_id: str, task_id: str) -> dict[str, Any]:
    """Approve, as a person does in the UI; what was shown to them."""
    task = f"/dags/{FLEET}/dagRuns/{run_id}/taskInstances/{task_id}"
    ended = {"success", "failed", "upstream_failed", "skipped"}
    wait_for(
        f"{task_id} asks", lambda: airflow.api("GET", task)["state"] in {"awaiting_input", *ended}, deadline_s=RUN_S
    )
    assert failures(airflow, run_id) == []
    detail: dict[str, Any] = airflow.api("GET", f"{task}/-1/hitlDetails")
    airflow.answer(FLEET, run_id, task_id, "Approve")
    return detail


def switches(airflow: Airflow) -> dict[str, dict[str, Any]]:
    """Every run of the switch, by its id."""
    found = airflow.api("GET", f"/dags/{SWITCH}/dagRuns", params={"limit": 100})["dag_runs"]
    return {run["dag_run_id"]: run for run in found}


def moment(run: dict[str, Any], which: str) -> datetime:
    return datetime.fromisoformat(run[which])


def test_a_fleet_moves_a_canary_then_a_wave_and_every_volume_keeps_its_files(
    volumes: dict[str, Lab], airflow: Airflow
) -> None:
    lab = volumes["myjfs"]
    before = lab.mount_processes()
    writer = Writer.start(lab.state, mount_of(lab, "work") / "app", name="app")
    wait_for("the writer writes", lambda: writer.summary().written > 5, deadline_s=60)
    try:
        run_id = airflow.trigger(
            FLEET,
            {
                "source_endpoint": lab.old_store.endpoint_url, "target_conn_id": "minio_new",
                "target_bucket": lab.new_store.bucket, "dry_run": False, "wave_size": 2, "soak_s": 10,
                "settle_s": 10, "client_timeout_s": 30, "late_commit_s": 3,
            },
        )  # fmt: skip
        shown = answer(airflow, run_id, "approve")
        # Those with one client first, by their names; myjfs has two.
        planned = airflow.xcom(FLEET, run_id, "plan")
        assert planned["waves"] == [["home"], ["work", "myjfs"]]
        assert shown["subject"] == f"Move 3 volumes from {lab.old_store.endpoint_url}, in waves?"
        assert "| canary | `home` |" in shown["body"]
        rehearsals = switches(airflow)
        assert {run_id + suffix for suffix in (".home.plan", ".myjfs.plan", ".work.plan")} == set(rehearsals)
        assert {own.mariadb.setting()["Bucket"] for own in volumes.values()} == {lab.old_store.bucket_url}

        rest = answer(airflow, run_id, "approve_rest")
        assert "1 clients proven" in rest["body"]
        assert volumes["home"].mariadb.setting()["Bucket"] == lab.new_store.bucket_url
        assert volumes["work"].mariadb.setting()["Bucket"] == lab.old_store.bucket_url
        live = airflow.page(f"fleets/{quote(run_id, safe='')}")
        assert live.status_code == 200
        assert "switched, volume <code>home</code>" in live.text
        assert "not started" in live.text
        state = airflow.wait_run(FLEET, run_id, timeout_s=RUN_S)
    finally:
        summary = writer.stop()

    report = airflow.xcom(FLEET, run_id, "finalize", "report")
    assert (state, failures(airflow, run_id)) == ("success", [])
    assert report == {"outcome": "moved", "volumes": dict.fromkeys(volumes, "moved")}
    runs = switches(airflow)
    moves = {name: runs[f"{run_id}.{name}"] for name in volumes}
    assert set(runs) - set(rehearsals) == {run["dag_run_id"] for run in moves.values()}
    assert max(moment(run, "end_date") for run in rehearsals.values()) < moment(moves["home"], "start_date")
    wave = [moves["myjfs"], moves["work"]]
    assert moment(moves["home"], "end_date") < min(moment(run, "start_date") for run in wave)
    assert max(moment(run, "start_date") for run in wave) < min(moment(run, "end_date") for run in wave)
    assert [run["conf"]["restart_csi"] for run in moves.values()] == [False, True, False]
    template = json.loads(lab.kubectl("-n", "juicefs", "get", "daemonset", "juicefs-csi-node", "-o", "json"))
    assert run_id in template["spec"]["template"]["metadata"]["annotations"].values()
    mapped = airflow.api("GET", f"/dags/{FLEET}/dagRuns/{run_id}/taskInstances/watch/listMapped")
    assert {task["rendered_map_index"] for task in mapped["task_instances"]} == {"myjfs", "work"}
    note = airflow.api("GET", f"/dags/{FLEET}/dagRuns/{run_id}")["note"]
    assert "moved: 3 of 3 volumes on the new store." in note
    assert lab.mount_processes() == before

    # Whatever is cleared, no second run is started, and the end is the same.
    again = [
        "find_volumes",
        "start_dry_run",
        "wait_for_dry_run",
        "plan",
        "start_canary",
        "watch_canary",
        "start",
        "watch",
        "finalize",
    ]
    airflow.clear(FLEET, run_id, again)
    state = airflow.wait_run(FLEET, run_id, timeout_s=RUN_S)
    assert (state, failures(airflow, run_id)) == ("success", [])
    assert airflow.xcom(FLEET, run_id, "finalize", "report")["outcome"] == "moved"
    assert set(switches(airflow)) == set(runs)

    secrets = [lab.old_store.secret_key, lab.new_store.secret_key, lab.mariadb.password]
    kept = [airflow.xcom(FLEET, run_id, "plan"), airflow.xcom(FLEET, run_id, "find_volumes", "members")]
    assert [secret for secret in secrets if random_part(secret) in json.dumps(kept)] == []
    lab.old_store.stop()
    assert summary.written > 5
    with volumes["work"].fresh_mount() as mount:
        checks = [lab.check(writer.manifest, mount, "app"), lab.check(lab.state / "seed-work.jsonl", mount, "seed")]
    with volumes["home"].fresh_mount() as mount:
        checks.append(lab.check(lab.state / "seed-home.jsonl", mount, "seed"))
    assert all(check.files for check in checks)
    assert [lost for check in checks for lost in check.missing + check.corrupt] == []

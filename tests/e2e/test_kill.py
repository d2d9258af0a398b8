"""A task's process is killed under a real scheduler: Airflow retries it; a run that cannot continue is rolled back.

Every kill point is in tests/faults; this holds that Airflow sees a killed process as they assume. In `make test` the
killed planner and partition of test_sync.py hold that. The volume is on the old store before and after.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from lab.airflow import Airflow
from lab.environment import Lab
from lab.keys import random_part
from lab.process import Server, wait_for
from tests.support.live_runs import RUN_S, SWITCH, buckets, finish, start_switch
from tests.support.world import assert_nothing_lost, writing

PROJECT = Path(__file__).resolve().parents[2]


def kill(lab: Lab, airflow: Airflow, run_id: str, task_id: str, try_number: int) -> None:
    """SIGKILL the process of a task as soon as this try of it runs; only ever one of this lab's scheduler."""
    path = f"/dags/{SWITCH}/dagRuns/{run_id}/taskInstances/{task_id}"

    def running() -> bool:
        found = airflow.api("GET", path)
        return bool(found["state"] == "running" and found["try_number"] == try_number and found["pid"])

    wait_for(f"try {try_number} of {task_id} runs", running, deadline_s=RUN_S, poll_s=0.2)
    scheduler = Server.load(lab.state, "airflow-scheduler")
    assert scheduler
    process = psutil.Process(airflow.api("GET", path)["pid"])
    assert scheduler.pid in {parent.pid for parent in process.parents()}
    process.kill()


@pytest.mark.slow
def test_a_task_that_is_killed_is_tried_again_and_killed_again_is_rolled_back(lab: Lab, airflow: Airflow) -> None:
    before, row = buckets(lab), lab.mariadb.query("SELECT value FROM jfs_setting")
    processes = lab.mount_processes()
    with writing(lab, "killed") as writer:
        run_id = start_switch(lab, airflow, dry_run=False)
        kill(lab, airflow, run_id, "settle", 1)
        kill(lab, airflow, run_id, "settle", 2)
        state, report = finish(airflow, SWITCH, run_id)

    assert (state, report["outcome"]) == ("failed", "rolled back"), report["states"]
    assert report["states"]["settle"] == "failed"
    assert buckets(lab) == before == {lab.old_store.bucket_url}
    assert lab.mariadb.query("SELECT value FROM jfs_setting") == row
    assert lab.mount_processes() == processes
    assert_nothing_lost(lab, writer)

    # Only what failed: no way to a green run, nor to a volume that moved without anybody judging it.
    airflow.clear(SWITCH, run_id, ["settle", "finalize"])
    assert airflow.wait_run(SWITCH, run_id, timeout_s=RUN_S) == "failed"
    assert airflow.xcom(SWITCH, run_id, "finalize", "report")["outcome"] == "rolled back"
    assert buckets(lab) == before

    # The diagnostics are read where Airflow's own commands run, with the connection of its database.
    name = report["results"]["collect_diagnostics"]["diagnostics_id"]
    module = "include.juicefs_storage.tasks.show_diagnostics"
    shown = subprocess.run(
        [sys.executable, "-m", module, name],
        cwd=PROJECT, env={**os.environ, **airflow.environment}, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert "juicefs-csi-controller" in shown
    assert [
        key
        for key in (lab.new_store.secret_key, lab.old_store.secret_key, lab.mariadb.password)
        if random_part(key) in shown
    ] == []

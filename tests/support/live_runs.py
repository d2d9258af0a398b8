"""Runs through a real scheduler and REST: start a switch, wait for its end, ask where the volume is."""

from __future__ import annotations

import base64
import json
from typing import Any

from lab.airflow import Airflow
from lab.environment import Lab

SWITCH = "juicefs_storage_switch"
#: How long a run may take, in seconds.
RUN_S = 600
#: The lab's clients look for a new setting every three seconds: three heartbeats are ten.
SHORT = {"settle_s": 10, "client_timeout_s": 30, "late_commit_s": 3, "require_approval": False}


def start_switch(lab: Lab, airflow: Airflow, **params: object) -> str:
    """Trigger a switch to the lab's new store; returns the run's id."""
    target = {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket}
    return airflow.trigger(SWITCH, target | SHORT | params)


def finish(airflow: Airflow, dag_id: str, run_id: str) -> tuple[str, dict[str, Any]]:
    """Wait for a run's end; returns its state and its report: every run ends with one."""
    state = airflow.wait_run(dag_id, run_id, timeout_s=RUN_S)
    report = airflow.xcom(dag_id, run_id, "finalize", "report")
    assert report, {task.task_id: task.state for task in airflow.task_states(dag_id, run_id)}
    return state, report


def note_of(airflow: Airflow, run_id: str) -> str:
    """Return the note of a switch's run."""
    return str(airflow.api("GET", f"/dags/{SWITCH}/dagRuns/{run_id}")["note"])


def buckets(lab: Lab) -> set[str]:
    """Return where the setting, the Secret and every mount point to."""
    secret = json.loads(lab.kubectl("get", "secret", "juicefs-sc-secret", "-n", "juicefs", "-o", "json"))
    mounts = {json.loads((mount / ".config").read_text())["Format"]["Bucket"] for mount in lab.mounts()}
    return {lab.mariadb.setting()["Bucket"], base64.b64decode(secret["data"]["bucket"]).decode()} | mounts

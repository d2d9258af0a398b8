"""A lab with Airflow that the tests share: its volume has files, both stores hold them, and both serve."""

from __future__ import annotations

from typing import Any

import pytest

from lab.airflow import Airflow
from lab.environment import Lab

RUN_S = 600
#: The lab's clients look for a new setting every three seconds: three heartbeats are ten.
SHORT = {"settle_s": 10, "client_timeout_s": 30, "late_commit_s": 3, "require_approval": False}


@pytest.fixture(scope="module")
def lab(airflow_lab: Lab) -> Lab:
    """The volume is where the tests before left it."""
    for store in (airflow_lab.old_store, airflow_lab.new_store):
        server = store.server()
        if not server or not server.alive():
            store.start()
    if airflow_lab.mariadb.setting()["Bucket"] == airflow_lab.old_store.bucket_url:
        airflow_lab.seed(30)
        airflow_lab.copy_to_new_store()
    return airflow_lab


@pytest.fixture(scope="module")
def airflow(lab: Lab) -> Airflow:
    assert lab.airflow is not None
    return lab.airflow


def finish(airflow: Airflow, dag_id: str, run_id: str) -> tuple[str, dict[str, Any]]:
    """The run's state and its report; every run ends with one."""
    state = airflow.wait_run(dag_id, run_id, timeout_s=RUN_S)
    report = airflow.xcom(dag_id, run_id, "finalize", "report")
    assert report, {task.task_id: task.state for task in airflow.task_states(dag_id, run_id)}
    return state, report

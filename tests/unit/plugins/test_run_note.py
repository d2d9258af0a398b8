"""What the listener writes into a run's note, from the rows that Airflow has when the run begins or ends.

Airflow runs in a process of its own here, with its tables in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
PLAN = {"volume": "home", "before": {"bucket": "http://old/data"}, "after": {"bucket": "http://new/data"}}
BROKEN = {"problem": "Pod home-1 did not follow.", "state": "moved", "next_step": "see the pod's log"}
CASES: dict[str, dict[str, Any]] = {
    "rolled back": {
        "states": {"plan": "success", "prove_clients": "failed", "catch_up": "upstream_failed", "finalize": "failed"},
        "xcoms": [["prove_clients", "error", BROKEN], ["finalize", "note", "rolled back, volume `home`."]],
        "note": "CHG-1",
    },
    "marked failed": {
        "states": {"plan": "success", "write_setting": "success", "settle": "failed", "finalize": "skipped"},
        # The report of an earlier end, which a clear has made stale.
        "xcoms": [["plan", "return_value", PLAN], ["finalize", "note", "switched, volume `home`."]],
        "note": "**[check](x) failed**: old. **Next**: old.\n\n**[Outcome](y)**: old.",
    },
    "marked success": {
        "how": "success",
        "states": {"plan": "success", "write_setting": "success", "finalize": "skipped"},
        "xcoms": [["plan", "return_value", PLAN]],
    },
    "killed while it reported": {"states": {"plan": "failed", "finalize": "failed"}, "xcoms": []},
    "switched": {
        "how": "success",
        "states": {"finalize": "success"},
        "xcoms": [["finalize", "note", "switched, volume `home`."]],
    },
    "long": {
        "states": {"check": "failed", "finalize": "failed"},
        "xcoms": [["check", "error", {"problem": "x" * 2000}], ["finalize", "note", "refused."]],
    },
    "running": {"how": "running", "states": {"plan": "running"}, "xcoms": [], "note": "CHG-1"},
    "foreign": {"dag": "another_dag", "states": {"finalize": "failed"}, "xcoms": [], "note": "-"},
}  # fmt: skip

END_RUNS = """
import json, runpy, sys
from datetime import UTC, datetime, timedelta
from airflow.models import import_all_models
import_all_models()
from airflow.models.base import Base
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

plugin = runpy.run_path(sys.argv[1])
engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
notes = {}
with Session(engine) as session:
    for number, (name, case) in enumerate(json.loads(sys.argv[2]).items()):
        now, dag, run_id = datetime.now(UTC), case.get("dag", "juicefs_storage_switch"), f"run+{number}"
        run = DagRun(dag_id=dag, run_id=run_id, run_type="manual", run_after=now, state="failed")
        session.add(run)
        session.flush()
        if "note" in case:
            run.note = case["note"]
        for order, (task, state) in enumerate(case["states"].items()):
            ended = now + timedelta(seconds=order)
            row = {"task_id": task, "dag_id": dag, "run_id": run_id, "pool": "x", "state": state, "end_date": ended}
            session.execute(TaskInstance.__table__.insert().values(map_index=-1, **row))
        for task, key, value in case["xcoms"]:
            row = {"dag_run_id": run.id, "task_id": task, "key": key, "dag_id": dag, "run_id": run_id}
            stored = XComModel.serialize_value(value)
            session.execute(XComModel.__table__.insert().values(map_index=-1, value=stored, **row))
        listener = plugin["RunNote"]()
        getattr(listener, f"on_dag_run_{case.get('how', 'failed')}")(run)
        session.flush()
        notes[name] = run.note
print(json.dumps(notes))
"""


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The note of each case's run after its state has changed."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    environment = kept | {"AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", END_RUNS, str(ROOT / "plugins/juicefs_storage_plugin.py"), json.dumps(CASES)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return written


def test_the_cause_comes_before_the_outcome(notes: dict[str, str]) -> None:
    by_kim, failure, outcome = notes["rolled back"].split("\n\n")
    assert by_kim == "CHG-1"
    link = "[prove_clients](dags/juicefs_storage_switch/runs/run%2B0/tasks/prove_clients)"
    assert failure == f"**{link} failed**: Pod home-1 did not follow. **Next**: see the pod's log."
    report = "juicefs-storage/runs/juicefs_storage_switch/run%2B0/report"
    assert outcome == f"**[Outcome]({report})**: rolled back, volume `home`."


def test_a_run_marked_failed_in_mid_move_says_where_the_volume_is(notes: dict[str, str]) -> None:
    failure, outcome = notes["marked failed"].split("\n\n")
    assert failure.startswith("**[settle](dags/")
    assert (
        "Volume `home` was moved from `http://old/data` to `http://new/data`. Still held: this volume's Lease"
        in outcome
    )
    assert "clear `decide` with Downstream" in outcome
    assert "switched" not in outcome


def test_a_run_marked_success_is_not_called_switched(notes: dict[str, str]) -> None:
    assert "marked success" in notes["marked success"]
    assert "nothing is proven" in notes["marked success"]


def test_a_report_that_was_killed_counts_as_none(notes: dict[str, str]) -> None:
    assert "**[plan](" in notes["killed while it reported"]
    assert "there is no report" in notes["killed while it reported"]


def test_a_green_run_says_how_it_ended_and_no_more(notes: dict[str, str]) -> None:
    outcome = "**[Outcome](juicefs-storage/runs/juicefs_storage_switch/run%2B4/report)**: switched, volume `home`."
    assert notes["switched"] == outcome


def test_a_long_error_is_cut_and_the_outcome_is_not(notes: dict[str, str]) -> None:
    assert len(notes["long"]) <= 1000
    assert notes["long"].startswith("**[check](dags/juicefs_storage_switch/runs/run%2B5/tasks/check) failed**: xxx")
    assert notes["long"].endswith("**: refused.")


def test_a_run_that_works_says_where_to_look_at_it(notes: dict[str, str]) -> None:
    by_kim, now = notes["running"].split("\n\n")
    assert by_kim == "CHG-1"
    assert now.startswith("**[Now](juicefs-storage/runs/juicefs_storage_switch/run%2B6/run)**: ")


def test_runs_of_other_dags_are_left_alone(notes: dict[str, str]) -> None:
    assert notes["foreign"] == "-"

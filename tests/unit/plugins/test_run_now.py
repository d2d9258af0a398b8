"""What the page of a run is told, from the rows that Airflow has: the document, its queries, its cost.

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
PARTITIONS = 1000

LOOK = """
import json, runpy, sys, time
from datetime import UTC, datetime, timedelta
from airflow.models import import_all_models
import_all_models()
from airflow.models.base import Base
from airflow.models.dagrun import DagRun
from airflow.models.taskinstance import TaskInstance
from airflow.models.xcom import XComModel
from sqlalchemy import create_engine, event
from sqlalchemy.orm import Session

run_now = runpy.run_path(sys.argv[1])["run_now"]
partitions = int(sys.argv[2])
engine = create_engine("sqlite://")
Base.metadata.create_all(engine)
now = datetime.now(UTC)
progress = {
    "label": "partition", "state": "ended", "doing": "copying", "because": "", "objects": 7, "objects_expected": 7,
    "bytes": 70, "bytes_expected": 70, "percent": 100.0, "objects_s": 0.0, "bytes_s": 0.0, "elapsed_s": 1.0,
    "paused_s": 0.0, "eta_s": None, "estimated_s": 1.0, "bandwidth_bytes_s": None, "at": now.isoformat(),
}
error = {"problem": "Broken <b>.", "state": "as it was", "next_step": "repair it"}
with Session(engine) as session:

    def add(dag, state, tasks, xcoms):
        run = DagRun(dag_id=dag, run_id="r+1", run_type="manual", run_after=now, state=state)
        session.add(run)
        session.flush()
        common = {"dag_id": dag, "run_id": "r+1"}
        rows = [
            {"task_id": task, "map_index": index, "state": state, "try_number": int(state is not None), "pool": "x",
             "start_date": now if state else None, "end_date": now if state == "success" else None, **common}
            for task, index, state in tasks
        ]
        session.execute(TaskInstance.__table__.insert(), rows)
        values = [
            {"dag_run_id": run.id, "task_id": task, "map_index": index, "key": key,
             "value": value, **common}
            for task, index, key, value in xcoms
        ]
        if values:
            session.execute(XComModel.__table__.insert(), values)

    copies = [("copy", index, "failed" if index == 3 else "success") for index in range(partitions)]
    add(
        "juicefs_storage_sync", "running", [("check", -1, "success"), *copies, ("finalize", -1, None)],
        [*(("copy", index, "progress", progress) for index in range(partitions)), ("copy", 3, "error", error),
         ("copy", 4, "error", {"problem": "another"})],
    )
    add(
        "juicefs_storage_switch", "failed", [("backup", -1, "failed"), ("finalize", -1, "failed")],
        [("finalize", -1, "note", "failed, volume `home`."), ("resolve_params", -1, "return_value", {"dry_run": False}),
         ("backup", -1, "clients", [{"name": "a", "proven": True}])]
    )
    add("another_dag", "running", [("finalize", -1, "running")], [])
    session.commit()

    queries = []
    event.listen(engine, "before_cursor_execute", lambda *about: queries.append(about[2]))
    took = []
    for _ in range(5):
        session.expire_all()
        queries.clear()
        start = time.process_time()
        document = json.dumps(run_now(session, "juicefs_storage_sync", "r+1"))
        took.append(time.process_time() - start)
    print(json.dumps({
        "sync": json.loads(document), "size": len(document), "queries": len(queries), "cpu_s": min(took),
        "switch": run_now(session, "juicefs_storage_switch", "r+1"),
        "foreign": run_now(session, "another_dag", "r+1"),
        "absent": run_now(session, "juicefs_storage_switch", "r+2"),
    }))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page is told of each run, and what that cost for a sync of a thousand partitions."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")}
    environment = kept | {"AIRFLOW_HOME": str(tmp_path_factory.mktemp("airflow")), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOOK, str(ROOT / "plugins/juicefs_storage_plugin.py"), str(PARTITIONS)]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_thousand_partitions_are_one_step_and_one_line_of_progress(seen: dict[str, Any]) -> None:
    sync = seen["sync"]
    assert [step["task"] for step in sync["steps"]] == ["check", "copy", "finalize"]
    assert sync["steps"][1]["counts"] == "1,000 instances: 1 failed, 999 success"
    assert [(each["task"], each["objects"], each["percent"]) for each in sync["progress"]] == [("copy", 7000, 100.0)]
    assert sync["failure"]["problem"] == "Broken <b>."
    assert sync["failure"]["url"].endswith("/tasks/copy/mapped/3")


def test_they_cost_four_queries_and_a_small_document(seen: dict[str, Any]) -> None:
    print(f"1,000 partitions: {seen['cpu_s'] * 1000:.1f} ms of CPU, {seen['size']:,} bytes")
    assert seen["queries"] == 4
    assert seen["size"] < 10_000
    # Measured: 38 ms on two cores that were busy otherwise; this much room for worse days.
    assert seen["cpu_s"] < 0.2


def test_a_red_run_says_how_it_ended_and_what_failed_first(seen: dict[str, Any]) -> None:
    assert seen["switch"]["sentence"] == "Failed, volume home."
    assert seen["switch"]["failure"]["task"] == "backup"
    assert seen["switch"]["clients"] == [{"name": "a", "proven": True}]
    assert seen["switch"]["progress"] == []


def test_there_is_nothing_to_say_of_other_runs(seen: dict[str, Any]) -> None:
    assert seen["foreign"] is None
    assert seen["absent"] is None

"""Runs of `juicefs_storage_sync` without a scheduler: one task after the other, in the test's own process."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from include.juicefs_storage.tasks import context, sync


class SyncRun:
    """What a task sees of Airflow, for one run: params, XComs in memory, and the states of tasks that failed."""

    dag_id = "juicefs_storage_sync"
    task_ids = ("check", "list_source", "plan_partitions", "copy", "list_to_verify", "verify", "reconcile", "finalize")

    def __init__(self, run_id: str, params: dict[str, Any]) -> None:
        self.run_id, self.params = run_id, params
        self.xcoms: dict[tuple[str, str], Any] = {}
        self.task = ""
        self.failed: dict[str, str] = {}
        self.variables: dict[str, str] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcoms[self.task, key] = json.loads(json.dumps(value))

    def xcom_pull(self, task_ids: str, key: str, map_indexes: int = -1) -> Any:
        return self.xcoms.get((task_ids, key))

    def get_task_states(self, *, run_ids: list[str], **_: object) -> dict[str, dict[str, str]]:
        return {run_ids[0]: self.failed}

    def get_ti_count(self, *, task_ids: list[str], states: list[str], **_: object) -> int:
        return int(task_ids == [self.task] and states == ["running"])

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Be what the tasks see of Airflow; Variables are those in `variables`."""
        current = {"params": self.params, "run_id": self.run_id, "ti": self, "dag": self}
        for module in (context, sync.plan, sync.steering):
            monkeypatch.setattr(module, "get_current_context", lambda: current)
        keys = SimpleNamespace(
            keys=lambda prefix: [key for key in self.variables if key.startswith(prefix)],
            get=lambda key: self.variables[key],
        )
        monkeypatch.setattr(sync.steering, "Variable", keys)

    def run(self, task: str, *arguments: Any) -> Any:
        """Run one task's function; returns what it returned."""
        self.task = task
        return getattr(sync, task).function(*arguments)

    def returned(self, task: str, value: Any) -> Any:
        """Keep a value as the one that a task returned."""
        self.task = task
        self.xcom_push("return_value", value)
        return value

    def whole(self) -> dict[str, Any]:
        """Run every task of the DAG, in order; returns the report."""
        for share in self.returned("check", self.run("check")):
            self.run("list_source", share)
        for phase, planner in (("copy", "plan_partitions"), ("verify", "list_to_verify")):
            shards = self.returned(planner, self.run(planner))
            results = [self.run(phase, shard) for shard in shards]
            # As Airflow hands them over: one alone is no list.
            self.returned(phase, results[0] if len(results) == 1 else results)
        report: dict[str, Any] = self.returned("reconcile", self.run("reconcile"))
        self.run("finalize")
        return report

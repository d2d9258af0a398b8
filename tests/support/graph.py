"""The graph of a DAG as Airflow walks it: trigger rules, branches, clearing and marking, in short."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from functools import cache
from typing import Any

from include.juicefs_storage.tasks.context import ENDED


@cache
def find_dag(dag_id: str) -> Any:
    """Return the DAG of a file in dags/."""
    return getattr(importlib.import_module(f"dags.{dag_id}"), dag_id)()


class GraphRun(ABC):
    """The states of one run's tasks, and which task may start next.

    Attributes:
        dag_id: Of the DAG, whose graph is the real one.
        states: Task -> state, as the UI would show it; absent where it has none yet.
        tries: Task -> how often it was tried since it was cleared.
        errors: Task -> the error of its last try.
    """

    dag_id: str
    states: dict[str, str]
    tries: dict[str, int]
    errors: dict[str, str]

    @abstractmethod
    def xcom(self, task_id: str, key: str = "return_value") -> Any:
        """Read an XCom; None where there is none."""

    def clear(self, *task_ids: str, downstream: bool = False, only_failed: bool = False) -> None:
        """Clear tasks as the UI does."""
        chosen = set(task_ids) or set(self.states)
        if downstream:
            for task_id in task_ids:
                chosen |= find_dag(self.dag_id).get_task(task_id).get_flat_relative_ids(upstream=False)
        for task_id in chosen:
            if not only_failed or self.states.get(task_id) in {"failed", "upstream_failed"}:
                self.states.pop(task_id, None)
                self.tries.pop(task_id, None)
                self.errors.pop(task_id, None)

    def mark(self, task_id: str, state: str) -> None:
        """Do what the UI's Mark Success and Mark Failed do: the state is set, the XComs stay."""
        self.states[task_id] = state

    def failed(self) -> set[str]:
        """Return the tasks that failed, `finalize` left out: a run that did not do what it was for ends red."""
        return {task for task, state in self.states.items() if state == "failed"} - {"finalize"}

    def may_start(self, task: Any) -> bool:
        """Return whether a task may run now; where its trigger rule says that it never will, its state is set."""
        found = [self.states.get(up) for up in task.upstream_task_ids]
        if not ENDED.issuperset(found):
            return False
        if any(task.task_id not in self.kept(up) for up in task.upstream_task_ids):
            self.states[task.task_id] = "skipped"  # as it was by the branch, also when it is cleared alone
            return False
        bad, skipped = {"failed", "upstream_failed"} & set(found), found.count("skipped")
        match task.trigger_rule.value:
            case "all_done":
                ends = ""
            case "none_skipped":
                ends = "skipped" if skipped else ""
            case "none_failed_min_one_success":
                ends = "upstream_failed" if bad else "skipped" if skipped == len(found) and found else ""
            case "all_success":
                ends = "upstream_failed" if bad else "skipped" if skipped else ""
            case other:
                raise NotImplementedError(other)
        if ends:
            self.states[task.task_id] = ends
        return not ends

    def kept(self, task_id: str) -> set[str]:
        """List the tasks below this one that it has not skipped: all, unless it is a branch that has chosen."""
        task = find_dag(self.dag_id).get_task(task_id)
        if not hasattr(task, "choose_branch") or self.states.get(task_id) != "success":
            return set(task.downstream_task_ids)
        chosen = self.xcom(task_id)
        below: set[str] = find_dag(self.dag_id).get_task(chosen).get_flat_relative_ids(upstream=False)
        return {chosen} | below

"""The task that failed first, which every report and note of a run that is not green begins with.

Tasks leave it in XCom; the plugin reads it for runs whose last task never ran. Imports nothing heavy for that reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.markdown import one_line
from include.juicefs_storage.names import FINISH, FLEET, REHEARSAL, REVERT, SWITCH, task_url

#: The XCom of a task that failed: `problem`, `state`, `next_step`.
ERROR = "error"
#: The task that writes the report of a run. It fails whenever another one did.
LAST = "finalize"
#: The states of a task that were not reached by the task itself.
_NOT_RUN = {"none", "skipped", "upstream_failed", "removed", "scheduled", "queued"}
#: What is shown of a failure that left no error, and no next command.
NO_ERROR, SEE_LOG = "No error was recorded: it was killed, marked as failed, or timed out.", "see its log"
_LEASE = "this volume's Lease, which expires within an hour of the last task's end"


def error_record(error: StorageSwitchError) -> dict[str, str]:
    """Return what a task leaves in XCom `error`."""
    return {"problem": error.problem, "state": error.state, "next_step": error.next_step}


@dataclass(frozen=True)
class Failure:
    """A task instance that failed.

    Attributes:
        task: Its id.
        map_index: -1 where the task is not mapped.
        page: The task in Airflow, relative to the root of the UI.
        problem: What was expected and what was found; empty where no error was recorded, as after a kill.
        state: What state things were in.
        next_step: What to do next.
    """

    task: str
    map_index: int = -1
    page: str = ""
    problem: str = ""
    state: str = ""
    next_step: str = ""

    @classmethod
    def of(cls, dag_id: str, run_id: str, task: str, map_index: int, error: Mapping[str, str]) -> Failure:
        """Build a failure with a link to its task.

        Args:
            dag_id: The DAG.
            run_id: The run.
            task: The task's id.
            map_index: -1 where the task is not mapped.
            error: Its XCom `error`; empty where it left none.
        """
        return cls(task, map_index, task_url(dag_id, run_id, task, map_index), **error)

    def to_text(self) -> list[str]:
        """Render for a log: the task, its error, its state, the next command; a line each."""
        lines = [f"First failed: {self.task}. {self.problem or NO_ERROR}"]
        lines += [f"State at that time: {self.state}"] if self.state else []
        return [*lines, f"Next: {self.next_step or SEE_LOG}"]

    def to_markdown(self) -> str:
        """Render for a page or a note: the task with a link to it, its error and its next command, on one line."""
        problem, next_step = one_line(self.problem or NO_ERROR), one_line(self.next_step or SEE_LOG)
        return f"**[{self.task}]({self.page}) failed**: {problem} **Next**: {next_step}."


def first_failure(failures: Iterable[Failure], order: Iterable[str]) -> Failure | None:
    """Find the failure that caused the others: the first in the graph; the last task only where no other failed."""
    rank = {task_id: number for number, task_id in enumerate(task for task in order if task != LAST)}
    found = sorted(failures, key=lambda failure: (rank.get(failure.task, len(rank)), failure.map_index))
    return found[0] if found else None


def unreported_end(
    dag_id: str, how: str, states: Mapping[str, str], results: Mapping[str, Any], params: Mapping[str, Any]
) -> str:
    """Say how a run ended whose last task did not run: a person marked it, or its timeout ended it.

    Args:
        dag_id: The DAG.
        how: `failed` or `success`, as Airflow has it.
        states: Task id -> state.
        results: Task id -> return value; what is left of them.
        params: Of the run, as resolve_params validated them.

    Returns:
        A line for the run's note: where things are, what is still held, and what to clear.
    """
    ended = f"marked {how}, or timed out: nothing is proven and there is no report."
    if dag_id in {SWITCH, REVERT}:
        return " ".join([ended, *_volume_now(states, results, params)])
    if dag_id == FLEET:
        return f"{ended} Runs of volumes that were started continue. Clear the tasks that did not end, with Downstream."
    if dag_id == REHEARSAL:
        return f"{ended} Nothing was changed. Trigger it again."
    if dag_id == FINISH:
        off = " What the rehearsal denied ends by itself." if params.get("rehearse_off_s") else ""
        stays = f"Mount pods that were replaced stay as they are.{off}"
        return f"{ended} {stays} It may still hold {_LEASE}. Trigger it again."
    return f"{ended} What was copied stays. Clear the tasks that did not end, with Downstream."


def _volume_now(states: Mapping[str, str], results: Mapping[str, Any], params: Mapping[str, Any]) -> list[str]:
    plan = results.get("plan") or {}
    volume = f"Volume `{plan['volume']}`" if plan.get("volume") else "The volume"
    if _did_not_run(states, "write_setting"):
        held = f" Still held: {_LEASE}." if not _did_not_run(states, "backup") else ""
        return [f"{volume} is where it was.{held} Trigger a new run."]
    old, new = (f"`{(plan.get(side) or {}).get('bucket', '?')}`" for side in ("before", "after"))
    where = f"{volume} was moved from {old} to {new}."
    if states["write_setting"] != "success":
        where = f"{volume} was being moved from {old} to {new}: the setting may name either."
    if states.get("restore_setting") == "success":
        where = f"{volume} was moved from {old} to {new} and its setting is back; its clients may be on either."
    elif not _did_not_run(states, "restore_setting"):
        where = f"{volume} was being moved back from {new} to {old}: the setting may name either."
    fence = " and the write fence on the store that it left" if params.get("fence_conn_id") else ""
    judge = "clear `decide` with Downstream: it rolls back where `on_failure` says so, else it says what is there."
    return [f"{where} Still held: {_LEASE}{fence}.", f"**Next**: {judge}"]


def _did_not_run(states: Mapping[str, str], task_id: str) -> bool:
    return states.get(task_id, "none") in _NOT_RUN

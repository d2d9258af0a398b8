"""A run as Airflow's database has it: its tasks' states, and what they left. Imports nothing heavy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from include.juicefs_storage.names import REVERT, SWITCH
from include.juicefs_storage.run_steps import ROLLBACK, STEPS

#: The states of a task in which something goes on, what shows first before what shows last.
ACTIVE = (
    "running", "restarting", "awaiting_input", "deferred", "up_for_reschedule", "up_for_retry", "queued", "scheduled",
)  # fmt: skip
#: Of several instances of a task the first of these states is the task's.
ORDER = (*ACTIVE, "none", "failed", "upstream_failed", "success", "skipped", "removed")
#: It waits for a worker.
QUEUED = {"queued", "scheduled"}


class Row(NamedTuple):
    """The instances of a task that are in one state, as the database groups them.

    Attributes:
        task_id: The task.
        state: Their state; `none` before it has one.
        instances: How many there are.
        tries: The most tries that one of them had, counted when it is scheduled.
        started: When the first one started.
        ended: When the last one ended.
        first: The lowest map index; -1 where the task is not mapped.
    """

    task_id: str
    state: str
    instances: int
    tries: int
    started: datetime | None
    ended: datetime | None
    first: int


@dataclass(frozen=True)
class Step:
    """A task of the run.

    Attributes:
        task_id: The task.
        states: State -> how many instances are in it.
        begun: Whether an instance has begun, now or before it was cleared: what it changes may be changed.
        started: When the first one started.
        ended: When the last one ended; None while one has not.
        first: State -> the lowest map index.
    """

    task_id: str
    states: Mapping[str, int] = field(default_factory=dict)
    begun: bool = False
    started: datetime | None = None
    ended: datetime | None = None
    first: Mapping[str, int] = field(default_factory=dict)

    @property
    def state(self) -> str:
        """The state of the task as a whole."""
        found = next((state for state in ORDER if state in self.states), "none")
        # Of a mapped task some instances may have ended while others have not begun.
        return "running" if found == "none" and len(self.states) > 1 else found

    @property
    def active(self) -> bool:
        """Whether something goes on."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class Run:
    """A run as the database has it.

    Attributes:
        dag_id: The DAG.
        run_id: The run.
        state: As Airflow has it.
        steps: Task id -> its step, in the runbook's order.
        results: Task id -> return value, of `plan` and the task that validates the params.
        note: What the last task said of the end; empty before.
        errors: (Task id, map index) -> XCom `error`.
        progress: Task id -> the `Progress` of each instance, as XCom `progress` has it.
        clients: Task id -> a row for each client, as XCom `clients` has it.
        started: When it left the queue.
        finished: When it ended.
    """

    dag_id: str
    run_id: str
    state: str
    steps: Mapping[str, Step] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    errors: Mapping[tuple[str, int], Mapping[str, str]] = field(default_factory=dict)
    progress: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    clients: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    started: datetime | None = None
    finished: datetime | None = None

    @property
    def ended(self) -> bool:
        """Whether Airflow has ended it."""
        return self.state in {"success", "failed"}

    @property
    def params(self) -> Mapping[str, Any]:
        """Its params, once they are validated."""
        found = self.results.get("resolve_params")
        return found if isinstance(found, dict) else {}

    @property
    def moves_a_volume(self) -> bool:
        """Whether it has a point of no return and a way back."""
        return self.dag_id in {SWITCH, REVERT}

    def step(self, task_id: str) -> Step:
        """Return a step; an empty one where the run does not have it."""
        return self.steps.get(task_id, Step(task_id))

    @property
    def goes_back(self) -> bool:
        """Whether a rollback has begun."""
        return any(self.step(task_id).begun for task_id in ROLLBACK)


def steps_of(dag_id: str, rows: Iterable[Row]) -> dict[str, Step]:
    """Put the rows of a run together, in the order of the runbook; tasks that it does not name come last.

    Args:
        dag_id: The DAG.
        rows: Of the run, in any order.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.task_id, []).append(row)
    known = STEPS.get(dag_id, {})
    order = [*(task_id for task_id in known if task_id in found), *(task for task in found if task not in known)]
    return {task_id: _step(task_id, found[task_id]) for task_id in order}


def _step(task_id: str, rows: Sequence[Row]) -> Step:
    states = Counter[str]()
    for row in rows:
        states[row.state] += row.instances
    ran = [row for row in rows if row.state not in {"skipped", "upstream_failed", "removed"}]
    goes_on = any(row.state in {*ACTIVE, "none"} for row in rows)
    return Step(
        task_id,
        dict(states),
        any(map(_has_begun, rows)),
        min((row.started for row in ran if row.started), default=None),
        None if goes_on else max((row.ended for row in ran if row.ended), default=None),
        {row.state: row.first for row in rows},
    )


def _has_begun(row: Row) -> bool:
    # A try is counted when it is scheduled, and a cleared task keeps the number of those that it had. A sensor that
    # waits for its next look keeps its start.
    waits = row.state in QUEUED
    return row.tries > waits or (waits and row.started is not None)

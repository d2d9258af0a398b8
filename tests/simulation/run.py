"""A run of a DAG in a simulated world: Airflow's scheduler and workers, and the tasks themselves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

from airflow.sdk import PokeReturnValue
from airflow.sdk.exceptions import AirflowFailException, AirflowRescheduleException

from tests.simulation.patches import HERE
from tests.simulation.scheduler import Process
from tests.simulation.world import World
from tests.support.graph import GraphRun, find_dag

DAG_ID, FIRST = "juicefs_storage_switch", "run-1"
#: How long Airflow takes to find out that a task's process is dead, in seconds: at most, see
#: `task_instance_heartbeat_timeout`.
_NOTICED_S = 300.0
_SCHEDULER_S = 0.5


@dataclass
class SimulatedRun(GraphRun):
    """One run.

    Attributes:
        world: Where it happens.
        run_id: Its id.
        params: As they were given.
        on_end: Called when `finalize` has ended.
        slots: How many tasks run at once.
        running: Task -> the process of its try.
    """

    world: World
    run_id: str
    params: dict[str, Any]
    on_end: Callable[[SimulatedRun], None]
    slots: int = 4
    dag_id: str = DAG_ID
    states: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    running: dict[str, Process] = field(default_factory=dict)
    put_off_since: dict[str, datetime] = field(default_factory=dict)
    _xcoms: dict[tuple[str, str], str] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)
    _scheduled: bool = False

    def __post_init__(self) -> None:
        self.triggered_at = self._now()
        self.tasks = find_dag(self.dag_id).topological_sort()
        self.params = {**find_dag(self.dag_id).params.dump(), **self.params}

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self.world.scheduler.now, UTC)

    def xcom(self, task_id: str, key: str = "return_value") -> Any:
        found = self._xcoms.get((task_id, key))
        return None if found is None else json.loads(found)

    def push(self, task_id: str, key: str, value: Any) -> None:
        """Set an XCom."""
        self._xcoms[task_id, key] = json.dumps(value, default=str)

    def clear(self, *task_ids: str, downstream: bool = False, only_failed: bool = False) -> None:
        before = dict(self.states)
        super().clear(*task_ids, downstream=downstream, only_failed=only_failed)
        for task_id in before.keys() - self.states.keys():
            self._stop(task_id)

    def mark(self, task_id: str, state: str) -> None:
        super().mark(task_id, state)
        self._stop(task_id)

    def _stop(self, task_id: str) -> None:
        self.put_off_since.pop(task_id, None)
        self._due.pop(task_id, None)
        if process := self.running.pop(task_id, None):
            self.world.scheduler.kill(process)

    @property
    def ended(self) -> bool:
        """Nothing runs any more, and nothing will by itself."""
        return self.states.get("finalize") in {"success", "failed"} and not self.running and not self._due

    @property
    def outcome(self) -> str:
        """What `finalize` reported."""
        return str((self.xcom("finalize", "report") or {}).get("outcome"))

    def schedule(self) -> None:
        """Start what may run, as Airflow's scheduler does, half a second from now."""
        if not self._scheduled:
            self._scheduled = True
            self.world.scheduler.after(self.world.random.uniform(0.1, _SCHEDULER_S), self._start_what_may)

    def _start_what_may(self) -> None:
        self._scheduled = False
        for task in self.tasks:
            task_id = task.task_id
            if self._due.get(task_id, self.world.scheduler.now) > self.world.scheduler.now:
                continue
            waits = self.states.get(task_id) in {None, "up_for_retry", "up_for_reschedule"}
            if not waits or len(self.running) >= self.slots:
                continue
            if task_id not in self.states and not self.may_start(task):
                continue
            self._due.pop(task_id, None)
            self._start(task)

    def _start(self, task: Any) -> None:
        task_id = task.task_id
        if self.states.get(task_id) != "up_for_reschedule":
            self.tries[task_id] = self.tries.get(task_id, 0) + 1
            self.put_off_since.pop(task_id, None)
        self.states[task_id] = "running"
        for key in [key for key in self._xcoms if key[0] == task_id]:
            del self._xcoms[key]
        name = task_id if self.run_id == FIRST else f"{self.run_id} {task_id}"
        process = self.world.scheduler.spawn(name, lambda: self._execute(task))
        self.running[task_id] = process
        HERE.contexts[process] = {
            "ti": _TaskInstance(self, task_id), "task": task, "dag": find_dag(self.dag_id), "run_id": self.run_id,
            "params": self.params, "dag_run": SimpleNamespace(run_after=self.triggered_at),
        }  # fmt: skip

    def _execute(self, task: Any) -> None:
        task_id, final, error, state = task.task_id, False, "", "success"
        try:
            value = task.python_callable()
            if isinstance(value, PokeReturnValue):
                state, value = ("success" if value.is_done else "up_for_reschedule"), value.xcom_value
                if state != "success":
                    self._wait(task_id, task.poke_interval)
            if value is not None:
                self.push(task_id, "return_value", value)
        except AirflowRescheduleException as later:
            state = "up_for_reschedule"
            self._wait(task_id, later.reschedule_date.timestamp() - self.world.scheduler.now)
        except AirflowFailException as problem:
            state, final, error = "failed", True, str(problem)
        except Exception as problem:  # noqa: BLE001  as Airflow does: whatever it is, the task failed
            state, error = "failed", f"{type(problem).__name__}: {problem}"
        self._ended(task, state, error, final=final)

    def _ended(self, task: Any, state: str, error: str, *, final: bool = False) -> None:
        task_id = task.task_id
        self.running.pop(task_id, None)
        if state == "failed" and not final and self.tries[task_id] <= task.retries:
            state = "up_for_retry"
            delay: timedelta = task.retry_delay
            self._wait(task_id, delay.total_seconds())
        if state == "up_for_reschedule":
            self.put_off_since.setdefault(task_id, self._now())
        self.states[task_id], self.errors[task_id] = state, error
        self.world.note(f"{self.run_id} {task_id} {state} {error.splitlines()[0][:150] if error else ''}")
        if task_id == "finalize":
            self.on_end(self)
        if state == "success":
            self.states |= dict.fromkeys(task.downstream_task_ids - self.kept(task_id), "skipped")
        self.schedule()

    def _wait(self, task_id: str, seconds: float) -> None:
        self._due[task_id] = self.world.scheduler.now + seconds
        self.world.scheduler.after(seconds, self.schedule)

    def kill(self, task_id: str) -> None:
        """Kill a task's process; Airflow finds out some time later."""
        process = self.running[task_id]
        self.world.note(f"{task_id} is killed")

        def noticed() -> None:
            if self.running.get(task_id) is process:
                self._ended(find_dag(self.dag_id).get_task(task_id), "failed", "killed")

        self.world.scheduler.after(self.world.random.uniform(1, _NOTICED_S), noticed)
        self.world.scheduler.kill(process)


class _TaskInstance:
    """The part of Airflow's task instance that the tasks use."""

    def __init__(self, run: SimulatedRun, task_id: str) -> None:
        self._run, self.task_id, self.dag_id, self.run_id = run, task_id, run.dag_id, run.run_id
        self.try_number = run.tries[task_id]

    def xcom_pull(self, task_ids: str, key: str = "return_value", map_indexes: int = -1) -> Any:
        return self._run.xcom(task_ids, key)

    def xcom_push(self, key: str, value: Any) -> None:
        self._run.push(self.task_id, key, value)

    def get_first_reschedule_date(self, _: Any) -> datetime | None:
        return self._run.put_off_since.get(self.task_id)

    def get_task_states(self, *, task_ids: list[str], run_ids: list[str], **_: str) -> dict[str, dict[str, str]]:
        return {run_ids[0]: {task: state for task, state in self._run.states.items() if task in task_ids}}

"""A run of a DAG in a simulated world: Airflow's scheduler and workers, and the tasks themselves."""

from __future__ import annotations

import json
import marshal
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from types import SimpleNamespace
from typing import Any

from airflow.sdk import PokeReturnValue
from airflow.sdk.exceptions import AirflowFailException, AirflowRescheduleException

from include.juicefs_storage.switch.backup import Backup
from tests.simulation.patches import HERE
from tests.simulation.scheduler import Process
from tests.simulation.world import World
from tests.support.graph import GraphRun, find_dag

SWITCH, REVERT, FIRST = "juicefs_storage_switch", "juicefs_storage_revert", "run-1"
#: How long Airflow takes to find out that a task's process is dead, in seconds: at most, see
#: `task_instance_heartbeat_timeout`.
_NOTICED_S = 300.0
_SCHEDULER_S = 0.5
#: How long a task that Airflow has given up runs at most before it is ended, in seconds.
_HEARTBEAT_S = 30.0
#: The states from which a task starts.
_STARTS_FROM = frozenset({None, "up_for_retry", "up_for_reschedule"})


@cache
def tasks_of(dag_id: str) -> dict[str, Any]:
    """Return task id -> task, each after those that it waits for."""
    return {task.task_id: task for task in find_dag(dag_id).topological_sort()}


@dataclass
class SimulatedRun(GraphRun):
    """One run.

    Attributes:
        world: Where it happens.
        run_id: Its id.
        params: As they were given.
        on_end: Called when `finalize` has ended.
        slots: How many tasks run at once.
        deleted: A person has deleted it.
        running: Task -> the process of its try.
    """

    world: World
    run_id: str
    params: dict[str, Any]
    on_end: Callable[[SimulatedRun], None]
    dag_id: str = SWITCH
    slots: int = 4
    deleted: bool = False
    states: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    tries: dict[str, int] = field(default_factory=dict)
    running: dict[str, Process] = field(default_factory=dict)
    put_off_since: dict[str, datetime] = field(default_factory=dict)
    _xcoms: dict[tuple[str, str], bytes] = field(default_factory=dict)
    _due: dict[str, float] = field(default_factory=dict)
    _instances: dict[str, _TaskInstance] = field(default_factory=dict)
    _scheduled: bool = False

    def __post_init__(self) -> None:
        self.triggered_at = self._now()
        self.tasks = tasks_of(self.dag_id)
        self.params = {**find_dag(self.dag_id).params.dump(), **self.params}

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self.world.scheduler.now, UTC)

    def xcom(self, task_id: str, key: str = "return_value") -> Any:
        found = self._xcoms.get((task_id, key))
        return None if found is None else marshal.loads(found)  # noqa: S302  our own

    def push(self, task_id: str, key: str, value: Any) -> None:
        """Set an XCom."""
        # What JSON makes of it; each reader gets a copy, which `marshal` makes faster.
        self._xcoms[task_id, key] = marshal.dumps(json.loads(json.dumps(value, default=str)))

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
        if self.running or self._due:
            return False
        return self.deleted or self.states.get("finalize") in {"success", "failed"}

    @property
    def outcome(self) -> str:
        """What `finalize` reported; `deleted` where it cannot any more."""
        if self.deleted:
            return "deleted"
        return str((self.xcom("finalize", "report") or {}).get("outcome"))

    @property
    def backup(self) -> Backup | None:
        """The backup that it has made."""
        name = f"revert-{self.run_id}" if self.dag_id == REVERT else self.run_id
        content = self.world.vault.get(f"myjfs.{name}")
        return Backup.from_bytes(content) if content else None

    def schedule(self) -> None:
        """Start what may run, as Airflow's scheduler does, half a second from now."""
        if not self._scheduled:
            self._scheduled = True
            self.world.scheduler.after(self.world.random.uniform(0.1, _SCHEDULER_S), self._start_what_may)

    def _start_what_may(self) -> None:
        self._scheduled = False
        if self.deleted:
            return
        for task_id, task in self.tasks.items():
            if self.states.get(task_id) not in _STARTS_FROM or len(self.running) >= self.slots:
                continue
            if self._due.get(task_id, 0.0) > self.world.scheduler.now:
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
        self._instances[task_id] = _TaskInstance(self, task_id)
        HERE.contexts[process] = {
            "ti": self._instances[task_id], "task": task, "dag": find_dag(self.dag_id), "run_id": self.run_id,
            "params": self.params, "dag_run": SimpleNamespace(run_after=self.triggered_at),
            "skew_s": self.world.random.choice((-1, 0, 1)) * self.world.setup.skew_s,
        }  # fmt: skip

    def _execute(self, task: Any) -> None:
        task_id, final, error, state = task.task_id, False, "", "success"
        try:
            value = self._carry_out(task)
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
        if HERE.contexts[self.world.scheduler.current]["ti"] is not self._instances.get(task_id):
            return  # Airflow has given this try up
        self._ended(task, state, error, final=final)

    def _carry_out(self, task: Any) -> Any:
        if task.task_id == "choose_backup":
            return {"chosen_options": [self.params["backup_id"]]}
        return task.python_callable()

    def _ended(self, task: Any, state: str, error: str, *, final: bool = False) -> None:
        task_id = task.task_id
        self.running.pop(task_id, None)
        self._instances.pop(task_id, None)
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
        self.world.note(f"{task_id} is killed")
        self._give_up(task_id, self.world.random.uniform(1, _NOTICED_S))
        self.world.scheduler.kill(self.running[task_id])

    def pause(self, task_id: str, for_s: float) -> None:
        """Stop a task's process for so long; Airflow takes it for dead, and ends it once it hears of it again."""
        process, scheduler = self.running[task_id], self.world.scheduler
        scheduler.pause(process, for_s)
        if for_s > _NOTICED_S:
            self._give_up(task_id, _NOTICED_S)
            scheduler.after(for_s + scheduler.random.uniform(0, _HEARTBEAT_S), lambda: scheduler.kill(process))

    def _give_up(self, task_id: str, after_s: float) -> None:
        process = self.running[task_id]

        def noticed() -> None:
            if self.running.get(task_id) is process:
                self._ended(self.tasks[task_id], "failed", "its process is not heard of any more")

        self.world.scheduler.after(after_s, noticed)

    def delete(self) -> None:
        """Delete the run, as the UI does: its tasks are ended, its XComs go."""
        self.deleted = True
        for task_id in list(self.running):
            self._stop(task_id)
        self.states.clear()
        self._xcoms.clear()
        self._due.clear()


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

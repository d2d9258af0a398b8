"""What the tasks of a copy ask Airflow while they work: the Variable that changes their pace, and how many they are."""

from __future__ import annotations

from typing import Any

from airflow.sdk import Variable, get_current_context

from include.juicefs_storage.copy.pace import Steering
from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.names import PACE
from include.juicefs_storage.objects.flow import Flow
from include.juicefs_storage.objects.progress import EVERY_S
from include.juicefs_storage.tasks.context import log
from include.juicefs_storage.tasks.sync.runtime import TASKS


def steer(params: SyncParams, phase: str, tasks: int) -> Steering:
    """Make what limits and pauses a task, as the params and the Variable say now.

    Args:
        params: Of the run.
        phase: The id of the task.
        tasks: How many instances it has.
    """
    at_once = min(tasks, TASKS)
    steering = Steering(
        params, Flow(), read_pace, lambda: running_tasks(phase), at_once, log.info, every_s=look_every_s(at_once)
    )
    steering.look()
    return steering


def look_every_s(at_once: int) -> float:
    """Return how often a task asks Airflow, in seconds: less often, the more tasks of the run work at once.

    Each time costs three or four small requests: at most some sixteen a second for all tasks of a run.
    """
    return max(EVERY_S, at_once / 4)


def read_pace() -> str | None:
    """Read the Variable as it is now; None where there is none.

    Tasks have no cache of Variables (the cache of `[secrets] use_cache` is that of the DAG processor).

    Raises:
        AirflowRuntimeError: Airflow does not answer.
    """
    # `get` takes a server that does not answer for a Variable that is not there: a pause would end by that.
    if PACE not in list(Variable.keys(prefix=PACE)):
        return None
    return str(Variable.get(PACE))


def running_tasks(task_id: str) -> int:
    """Count the instances of a mapped task of this run that are running."""
    context: Any = get_current_context()
    ti = context["ti"]
    return int(ti.get_ti_count(dag_id=ti.dag_id, task_ids=[task_id], run_ids=[context["run_id"]], states=["running"]))

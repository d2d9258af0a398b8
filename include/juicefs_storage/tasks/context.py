"""The run and the task that are running, as Airflow knows them: XComs, states, masked values."""

from __future__ import annotations

import base64
import logging
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from airflow.sdk import get_current_context

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.failures import ERROR, Failure, first_failure
from include.juicefs_storage.volume.setting import StorageConfig

#: The states in which a task has ended.
ENDED = frozenset({"success", "failed", "upstream_failed", "skipped", "removed"})
#: For how long others need no retry after a task has exhausted its budget for the metadata database or a cluster.
_AWAY_FOR = timedelta(minutes=3)
#: What the metadata database is called in `note_away`.
METADATA = "metadata"

log = logging.getLogger(__name__)


def pull(task_id: str, key: str = "return_value") -> Any:
    """Return an XCom of this run; None where there is none."""
    return get_current_context()["ti"].xcom_pull(task_ids=task_id, key=key)


def push(key: str, value: Any) -> None:
    """Set an XCom of the task that is running; it stays when the task fails afterwards."""
    get_current_context()["ti"].xcom_push(key=key, value=value)


def run_id() -> str:
    """Return the id of this run."""
    return str(get_current_context()["run_id"])


def triggered_at() -> datetime | None:
    """Return when this run was triggered, the same after a clear; None where Airflow does not say."""
    dag_run = get_current_context().get("dag_run")
    return getattr(dag_run, "run_after", None)


def task_states(*task_ids: str) -> dict[str, str]:
    """Return the states of this run's tasks; `none` where a task has none yet."""
    context = get_current_context()
    states = context["ti"].get_task_states(dag_id=context["dag"].dag_id, task_ids=list(task_ids), run_ids=[run_id()])
    found = states.get(run_id(), {})
    return {task_id: str(found.get(task_id) or "none") for task_id in task_ids}


def failure_of(task_id: str, map_index: int = -1) -> Failure:
    """Return a task of this run that failed, with the error that it left."""
    context: Any = get_current_context()
    error = context["ti"].xcom_pull(task_ids=task_id, key=ERROR, map_indexes=map_index) or {}
    return Failure.of(context["dag"].dag_id, run_id(), task_id, map_index, error)


def why_it_failed() -> list[str]:
    """Return the task of this run that failed first, with its error and next command: one line of Markdown, or none."""
    context: Any = get_current_context()
    ti, dag = context["ti"], context["dag"]
    found = ti.get_task_states(dag_id=dag.dag_id, task_ids=list(dag.task_ids), run_ids=[run_id()]).get(run_id(), {})
    failures = []
    for name, state in found.items():
        if str(state) != "failed":
            continue
        # Airflow names the instances of a mapped task `<task id>_<index>`.
        task_id, _, index = (name, "", "-1") if name in dag.task_ids else name.rpartition("_")
        failures.append(failure_of(task_id, int(index)))
    first = first_failure(failures, dag.task_ids)
    return [first.to_markdown(), ""] if first else []


def validated_params() -> dict[str, Any]:
    """Return the params of this run as its first task validated them.

    Raises:
        PermanentError: It has not.
    """
    params: dict[str, Any] | None = pull("resolve_params")
    if not params:
        raise PermanentError(
            "The params of this run were not validated.", next_step="clear resolve_params with Downstream"
        )
    return params


def mask_keys(config: StorageConfig) -> None:
    """Keep a storage's keys and token out of the logs."""
    mask(*config.secrets)


def mask(*values: str) -> None:
    """Keep values out of the logs, in the forms that they take elsewhere too: base64 (Secrets) and quoted (URLs)."""
    from airflow.sdk.log import mask_secret

    for value in filter(None, values):
        mask_secret(value)
        mask_secret(base64.b64encode(value.encode()).decode())
        if (quoted := quote(value, safe="")) != value:
            mask_secret(quoted)


def note_away(what: str) -> None:
    """Record that this task waited for the metadata, or for a cluster, until its retry budget was exhausted."""
    push(f"{what}_away", datetime.now(UTC).isoformat())


def is_away(what: str) -> bool:
    """Return whether another task of this run has just exhausted its retry budget for the metadata, or for a cluster.

    Otherwise every task repeats the full wait, and a run without a database takes a quarter of an hour to say so.
    """
    since = datetime.now(UTC) - _AWAY_FOR
    found = (pull(task_id, f"{what}_away") for task_id in get_current_context()["dag"].task_ids)
    return any(isinstance(at, str) and datetime.fromisoformat(at) > since for at in found)

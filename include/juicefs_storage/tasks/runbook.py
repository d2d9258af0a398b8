"""The tasks of the runbook: what they have in common, and how our errors become Airflow's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, overload

from airflow.sdk import PokeReturnValue, task
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.errors import StillAwayError, StorageSwitchError, TransientError
from include.juicefs_storage.failures import ERROR, error_record
from include.juicefs_storage.switch.evidence import looks_back_at
from include.juicefs_storage.tasks.context import METADATA, log, note_away, pull, push

#: Of every task, where the task does not say otherwise.
TASK_DEFAULTS: dict[str, Any] = {
    "owner": "storage-sre",
    "retries": 1,
    "retry_delay": timedelta(seconds=5),
    "execution_timeout": timedelta(hours=8),
}
#: The XCom of task `plan` that identifies the plan.
IDENTITY = "identity"


@overload
def runbook_task(function: Callable[..., Any], /) -> Any: ...
@overload
def runbook_task(**options: Any) -> Callable[[Callable[..., Any]], Any]: ...
def runbook_task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """Decorate a step of the runbook, as `@task` does.

    The docstring becomes `doc_md`. XCom `timing` is the evidence that the task ran to its end: `began_at` and
    `applied_at` (UTC), `took_s` (seconds), `plan`, which identifies the plan that it carried out, and `seen`: the
    `applied_at` of the tasks that it must run after, as it found them when it began.
    A permanent error of ours fails the task at once; Airflow retries the others. XCom `error` says why it failed.
    """
    if function is None:
        return functools.partial(runbook_task, **options)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        start, began_at, seen = monotonic(), datetime.now(UTC), _ends_seen(function.__name__)
        with errors_for_airflow():
            result = function(*args, **kwargs)
        if isinstance(result, PokeReturnValue) and not result.is_done:
            return result
        timing = {"began_at": began_at.isoformat(), "applied_at": datetime.now(UTC).isoformat()}
        took_s = round(monotonic() - start, 1)
        push("timing", {**timing, "took_s": took_s, "plan": pull("plan", IDENTITY), "seen": seen})
        log.info("Done: %s", result.xcom_value if isinstance(result, PokeReturnValue) else result)
        return result

    kind = options.pop("kind", None)
    decorator = getattr(task, kind) if kind else task
    return decorator(doc_md=inspect.getdoc(function), **options)(run)


def _ends_seen(task_id: str) -> dict[str, str]:
    return {other: (pull(other, "timing") or {}).get("applied_at", "") for other in looks_back_at(task_id)}


@contextmanager
def errors_for_airflow() -> Iterator[None]:
    """Turn our errors into Airflow's: a permanent one fails the task at once; Airflow retries the others."""
    try:
        with _failure_recorded(), missing_connections_explained():
            yield
    except StillAwayError as error:
        note_away(METADATA)
        raise AirflowFailException(str(error)) from error
    except TransientError:
        raise
    except StorageSwitchError as error:
        raise AirflowFailException(str(error)) from error


@contextmanager
def _failure_recorded() -> Iterator[None]:
    """Push why the task failed. Our own errors hold no secret; of others only the kind is kept."""
    try:
        yield
    except StorageSwitchError as error:
        push(ERROR, error_record(error))
        raise
    except AirflowException:
        raise
    except Exception as error:
        push(ERROR, {"problem": f"{type(error).__name__}, see the log", "state": "", "next_step": ""})
        raise

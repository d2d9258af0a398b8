"""The tasks of the runbook: what they have in common, and how our errors become Airflow's."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Any, overload

from airflow.sdk import task
from airflow.sdk.exceptions import AirflowFailException, AirflowNotFoundException

from include.juicefs_storage.errors import PermanentError, StillAwayError, StorageSwitchError, TransientError
from include.juicefs_storage.failures import ERROR, error_record
from include.juicefs_storage.tasks.context import log, note_metadata_away, push

#: Of every task, where the task does not say otherwise.
TASK_DEFAULTS: dict[str, Any] = {
    "owner": "storage-sre",
    "retries": 1,
    "retry_delay": timedelta(seconds=5),
    "execution_timeout": timedelta(hours=8),
}


@overload
def runbook_task(function: Callable[..., Any], /) -> Any: ...
@overload
def runbook_task(**options: Any) -> Callable[[Callable[..., Any]], Any]: ...
def runbook_task(function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
    """`@task` for a step of the runbook.

    The docstring becomes `doc_md`. XCom `timing` gets `applied_at` (UTC) and `took_s` (seconds).
    A permanent error of ours fails the task at once; Airflow retries the others.
    """
    if function is None:
        return functools.partial(runbook_task, **options)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        start = monotonic()
        with errors_for_airflow():
            result = function(*args, **kwargs)
        push("timing", {"applied_at": datetime.now(UTC).isoformat(), "took_s": round(monotonic() - start, 1)})
        log.info("Done: %s", result)
        return result

    kind = options.pop("kind", None)
    decorator = getattr(task, kind) if kind else task
    return decorator(doc_md=inspect.getdoc(function), **options)(run)


@contextmanager
def errors_for_airflow() -> Iterator[None]:
    """A permanent error of ours fails the task at once; Airflow retries the others. XCom `error` gets what it says."""
    try:
        with missing_connections_explained():
            yield
    except StorageSwitchError as error:
        push(ERROR, error_record(error))
        if isinstance(error, StillAwayError):
            note_metadata_away()
        elif isinstance(error, TransientError):
            raise
        raise AirflowFailException(str(error)) from error


@contextmanager
def missing_connections_explained() -> Iterator[None]:
    """Turn Airflow's answer for a connection that does not exist into an error of ours."""
    try:
        yield
    except AirflowNotFoundException as error:
        raise PermanentError(
            f"{error}", next_step="make the connection in Airflow (Admin → Connections), or correct the param"
        ) from None

"""The folder of a run: its plan, its manifests, its report."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from include.juicefs_storage.copy.plan import SyncPlan
from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.tasks.context import run_id

if TYPE_CHECKING:
    from airflow.sdk import ObjectStoragePath


#: The folder for manifests: an URL such as `s3://<connection id>@<bucket>/<prefix>`, for the workers' environment.
MANIFESTS_ENV = "JUICEFS_STORAGE_MANIFESTS"


def manifests_folder(run: str) -> ObjectStoragePath:
    """Return the folder of a run's manifests.

    Raises:
        PermanentError: The environment names none.
    """
    from airflow.sdk import ObjectStoragePath

    root = os.environ.get(MANIFESTS_ENV)
    if not root:
        raise PermanentError(
            f"Expected the folder for manifests in the workers' environment, found no {MANIFESTS_ENV}.",
            next_step="set it to an URL such as s3://<connection id>@<bucket>/<prefix>, or file:///… on one machine",
        )
    return ObjectStoragePath(root) / re.sub(r"[^A-Za-z0-9._-]", "_", run)


def plan_of_run() -> SyncPlan:
    """Read the plan of this run, as plan_partitions wrote it down."""
    return read_plan(run_id())


def read_plan(run: str) -> SyncPlan:
    """Read the plan of a run.

    Raises:
        PermanentError: The run left none.
    """
    file = manifests_folder(run) / "plan.json"
    if not file.exists():
        raise PermanentError(
            f"Expected the plan of run {run} in {file}, found none.",
            next_step="clear plan_partitions with Downstream; all workers need the same folder for manifests",
        )
    return SyncPlan.model_validate_json(file.read_text())


def earlier_plan(run: str) -> SyncPlan:
    """Read the plan of an earlier run, for `recut_from`.

    Raises:
        PermanentError: The run left none.
    """
    try:
        return read_plan(run)
    except StorageSwitchError:
        raise PermanentError(
            f"Param `recut_from`: run {run!r} left no plan in the folder for manifests.",
            next_step="give the id of an earlier run of this DAG, or leave `recut_from` empty",
        ) from None

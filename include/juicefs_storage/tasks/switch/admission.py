"""Which task of a run may change something: not after another run moved the volume, not after a rollback began."""

from __future__ import annotations

from include.juicefs_storage.code_version import code_version
from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.switch.plan import StorageView
from include.juicefs_storage.tasks.context import log, note_away, task_states
from include.juicefs_storage.tasks.switch.run import SwitchRun


def forward(*, take_lease: bool = True) -> SwitchRun:
    """Admit a task on the way to the new location.

    Args:
        take_lease: Take the volume's Lease. Without, only refuse where another run holds it: for a task that adds
            blocks and changes none, and may be cleared alone, long after the run gave the Lease back.

    Raises:
        NeedsHumanError: This run was rolled back, or its rollback has begun; another run holds the volume, or has
            moved it since; no later task would judge what this one does; or other code than this made the plan.
    """
    run = SwitchRun.current(forward=True)
    run.refuse_after_rollback()
    _refuse_if_superseded(run)
    _refuse_if_upgraded(run)
    if not take_lease:
        run.lease.refuse_if_held()
        return run
    if task_states("decide")["decide"] == "success":
        raise NeedsHumanError(
            "Task decide has judged this run already, and would not see what this step does.",
            state="this task changed nothing",
            next_step="clear this task with Downstream",
        )
    run.lease.acquire()
    return run


def back() -> SwitchRun:
    """Admit a task on the way back to the old location; take the volume's Lease.

    Raises:
        NeedsHumanError: Another run holds the volume, or has moved it since.
    """
    run = SwitchRun.current()
    _refuse_if_superseded(run)
    run.lease.acquire()
    for cluster in run.lease.silent:
        note_away(cluster)
    return run


def _refuse_if_superseded(run: SwitchRun) -> None:
    if other := run.record.superseded().backup_id:
        raise NeedsHumanError(
            f"Another run moved volume {run.plan.volume} after this one had begun; its backup is {other}.",
            state="this task changed nothing",
            next_step="start a new run: this one does not know where the volume is now",
        )


def _refuse_if_upgraded(run: SwitchRun) -> None:
    """Refuse to carry out what other code planned, while the volume is where it was.

    Once the setting is written, going on is safer than leaving clients between two stores.

    Raises:
        NeedsHumanError: The code is another one, and the volume has not moved yet.
    """
    planned_by, here = run.plan.code, code_version()
    if planned_by in {"", here}:
        return
    if StorageView.of(run.runtime.setting().config) != run.plan.before:
        log.warning("The plan was made by code %s, and this is %s: going on, since the volume moves.", planned_by, here)
        return
    raise NeedsHumanError(
        f"The plan of this run was made by version {planned_by} of this project; this worker runs version {here}.",
        state="the setting names the old store; this task changed nothing",
        next_step="start a new run, so that the plan is made, and approved, with this version; "
        "where only some workers were upgraded, upgrade the others first",
    )

"""The DAG `juicefs_storage_revert`."""

from __future__ import annotations

from airflow.sdk import dag

from include.juicefs_storage.switch.params import RevertForm
from include.juicefs_storage.tasks import revert
from include.juicefs_storage.tasks.form import form
from include.juicefs_storage.tasks.runbook import TASK_DEFAULTS
from include.juicefs_storage.tasks.switch.graph import move_volume

DOC = """
### Use this when
A switch ended well, or was held, and you want to move the volume back to where it was: now, or weeks later. Any backup
that a run made can be gone back to, also one that this DAG made.

### Which backup
Leave `backup_id` empty: the task `choose_backup` offers those that are there, the newest first. Every report names its own.

### Dry run first
`dry_run` is on by default: the run makes every check and ends with the plan. Nothing is changed.

### What it changes
The same as a switch, towards the store in the backup: blocks that only the current store has are copied there before and
after; the setting goes back by one UPDATE that compares and sets; the Secrets get the values of the backup; the CSI
workloads are restarted. Before that it makes a backup of its own. If a step fails after the setting was written, the run
puts everything back as it found it, and ends red. Nothing is deleted on either store. See `docs/revert.md`.
"""


@dag(
    dag_display_name="JuiceFS: go back to a backup",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    doc_md=DOC,
    tags=["juicefs", "storage", "runbook"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_revert() -> None:
    """Choose a backup, then check, plan, approve, back up, move, verify; roll back on failure."""
    move_volume(revert.choose_and_resolve)


juicefs_storage_revert().params.update(form(RevertForm))

"""The DAG `juicefs_storage_rehearsal`."""

from __future__ import annotations

import os
from datetime import UTC, datetime

from airflow.sdk import dag

from include.juicefs_storage.switch.params import RehearsalParams
from include.juicefs_storage.tasks import rehearsal
from include.juicefs_storage.tasks.form import form
from include.juicefs_storage.tasks.runbook import TASK_DEFAULTS

DOC = """
### Use this when
You want to know every morning, not on the day of the move, whether each registered volume could be switched. It runs by
itself, daily; trigger it after you have repaired something.

### What it does
For each volume of `include/volumes.yaml` that names a target: every check and the plan of a dry run of
`juicefs_storage_switch`; the newest backup is decrypted and restored into a scratch place in memory. A volume that is not
ready makes the run red, with what blocks it; it hides no other volume.

### What it changes
Nothing. Each volume gets an event of the asset `juicefs_storage_readiness`: ready or not, what blocks it, since when. The
page *Volumes* shows the last one of each. See `docs/rehearsal.md`.
"""

#: A cron expression or preset for the DAG processor's environment; `none` for runs by hand only.
SCHEDULE = os.environ.get("JUICEFS_STORAGE_REHEARSAL_SCHEDULE") or "@daily"


@dag(
    dag_display_name="JuiceFS: rehearse the switch",
    schedule=None if SCHEDULE == "none" else SCHEDULE,
    start_date=datetime(2026, 1, 1, tzinfo=UTC),
    catchup=False,
    max_active_runs=1,
    doc_md=DOC,
    tags=["juicefs", "storage", "rehearsal"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_rehearsal() -> None:
    """Rehearse every registered volume, then report."""
    volumes = rehearsal.list_volumes()
    rehearsal.finalize(volumes, rehearsal.rehearse.expand(volume=volumes))


juicefs_storage_rehearsal().params.update(form(RehearsalParams))

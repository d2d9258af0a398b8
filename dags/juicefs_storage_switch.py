"""The DAG `juicefs_storage_switch`."""

from __future__ import annotations

from airflow.sdk import dag

from include.juicefs_storage.names import SIDE_BY_SIDE
from include.juicefs_storage.switch.params import SwitchParams
from include.juicefs_storage.tasks.form import form
from include.juicefs_storage.tasks.runbook import TASK_DEFAULTS
from include.juicefs_storage.tasks.switch import check
from include.juicefs_storage.tasks.switch.graph import move_volume

DOC = """
### Use this when
MinIO (or another S3 store) behind a live JuiceFS volume moves or is upgraded: endpoint, bucket, access key and secret
key change, the data is kept. No business pod and no mount pod restarts.

### Dry run first
`dry_run` is on by default: the run makes every check and ends with the plan. Nothing is changed.

### What it changes
The setting in `jfs_setting`, the volume's Secrets, and an annotation of the CSI workloads, in this order, after a backup.
The old store is never changed by a switch. If a step fails after the setting was written, the run puts everything back,
proves every client on the old store, and ends red.

### Which change is yours?
The run finds out, and names it in the plan's first line. See `docs/changes.md`.
- **Another store**: copy the data first. Both stores serve until the clients have moved.
- **Other keys**, same bucket: a connection with the new keys, the same bucket. Nothing is copied.
- **Another address** of one store: nothing is copied.
- **The store moved as a whole**, the old address serves no more: proven by the metadata; there is no way back.

### Before you start
Copy the volume's data to the new bucket, if it is another store, and make an Airflow connection of type Amazon Web Services for it (login = access
key, password = secret key, extra `endpoint_url`). Backups need the connection `juicefs_backup`. See `docs/switch.md`.
"""


@dag(
    dag_display_name="JuiceFS: switch storage",
    schedule=None,
    catchup=False,
    # As many as a wave of a fleet: a Lease per volume keeps two runs on one volume apart.
    max_active_runs=SIDE_BY_SIDE,
    doc_md=DOC,
    tags=["juicefs", "storage", "runbook"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_switch() -> None:
    """Check, plan, approve, back up, switch, verify; roll back on failure."""
    move_volume(check.resolve_params)


juicefs_storage_switch().params.update(form(SwitchParams))

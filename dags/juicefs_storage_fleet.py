"""The DAG `juicefs_storage_fleet`."""

from __future__ import annotations

from airflow.sdk import dag

from include.juicefs_storage.fleet.params import FleetParams
from include.juicefs_storage.tasks.approval import approve
from include.juicefs_storage.tasks.fleet import plan, waves
from include.juicefs_storage.tasks.form import form
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.runbook import TASK_DEFAULTS

DOC = """
### Use this when
A MinIO (or another S3 store) moves, and with it every JuiceFS volume that is on it.

### Dry run first
`dry_run` is on by default: a dry run of `juicefs_storage_switch` for each volume, then one plan for all: who moves from
where to where, in which wave, and what blocks whom. Nothing is changed.

### What it changes
Each volume is moved by an ordinary run of `juicefs_storage_switch`, which backs up, proves and rolls back by itself: a
canary first, then waves of `wave_size`. After its run each volume is watched for `soak_s` before the next wave begins.
After a failure no other volume is started (`on_failure`); those that are moved stay moved. See `docs/fleet.md`.
"""


@dag(
    dag_display_name="JuiceFS: switch a fleet of volumes",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    doc_md=DOC,
    tags=["juicefs", "storage", "runbook"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_fleet() -> None:
    """Find, rehearse, plan, approve; move the canary, watch it, approve; then wave by wave."""
    found, planned, path, approval = plan.find_volumes(), plan.plan(), plan.choose_path(), approve()
    plan.resolve_params() >> found
    plan.dry_runs.expand(volume=found) >> planned >> path >> approval

    watched, later = waves.watch_canary(), waves.later_volumes()
    [path, approval] >> waves.start_canary() >> watched >> waves.approve_rest() >> later

    notify = Notify("ended")
    finalize = waves.finalize.override(on_success_callback=notify, on_failure_callback=notify)()
    moved = waves.waves.expand(volume=later)
    # Not by way of others alone: whatever becomes of these, and whatever is cleared, every volume has ended by then.
    moved >> [restart := waves.restart_csi(), finalize]
    restart >> waves.wait_for_rollouts() >> finalize
    [planned, path, watched] >> finalize


juicefs_storage_fleet().params.update(form(FleetParams))

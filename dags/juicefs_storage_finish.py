"""The DAG `juicefs_storage_finish`."""

from __future__ import annotations

from airflow.sdk import dag

from include.juicefs_storage.finish.params import FinishParams
from include.juicefs_storage.names import SIDE_BY_SIDE
from include.juicefs_storage.tasks.approval import approve
from include.juicefs_storage.tasks.finish import certify, finalize, plan, steps
from include.juicefs_storage.tasks.form import form
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.runbook import TASK_DEFAULTS

DOC = """
### Use this when
A switch ended well, and you want that nothing brings the old store's values back, so that the old store can be switched
off one day. Until then a mount pod from before the switch, restarted, may write them into the setting.

### Dry run first
`dry_run` is on by default: the run names everything that still carries other values, and what that means, and stops.

### What it changes
With `refresh_mount_pods` it replaces the mount pods that carry them, one after the other, by the CSI driver's smooth
upgrade. Applications go on. Each new pod is proven by a block that it writes; business pods' UIDs and restarts are
compared. The run stops at the first pod that is not as before. It replaces one pod unless `most_pods` says more.

With `close_door` it proves that the old store refuses the old key's writes; with `fence_conn_id` it has it do so.
With `rehearse_off_s` that store denies the old key everything for some seconds, as if it were off.

With `watch` it waits until nothing was found for `idle_s`: nothing that comes to the old store, no client that is no
mount pod, no request that fails. What came to the old store alone is copied to the volume's store.

With `certify` it proves that the move is finished: no other values, the old key withdrawn, every block on the new store,
and nothing new on the old one for `idle_s`. The evidence is signed with the key of connection `juicefs_certificate`.

### What it does not do
It switches nothing off and withdraws no key. It deletes nothing, ever. See `docs/finish.md`.
"""


@dag(
    dag_display_name="JuiceFS: finish a switch",
    schedule=None,
    catchup=False,
    max_active_runs=SIDE_BY_SIDE,
    doc_md=DOC,
    tags=["juicefs", "storage", "runbook"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_finish() -> None:
    """Find what carries other values, plan, approve, replace mount pods, close the door, watch, certify, report."""
    planned, path, approval = plan.plan(), plan.choose_path(), approve()
    refreshed, closed, rehearsed = steps.refresh_mount_pods(), steps.close_door(), steps.rehearse_off()
    watched, certified = steps.watch(), certify.certify()
    notify = Notify("ended")  # the end of every run is the news
    finalized = finalize.finalize.override(on_success_callback=notify, on_failure_callback=notify)()
    (
        plan.resolve_params()
        >> planned
        >> path
        >> approval
        >> refreshed
        >> closed
        >> rehearsed
        >> watched
        >> certified
        >> finalized
    )
    path >> [refreshed, certified, finalized]


juicefs_storage_finish().params.update(form(FinishParams))

"""The DAG `juicefs_storage_sync`."""

from __future__ import annotations

from airflow.sdk import chain, dag

from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.tasks import sync
from include.juicefs_storage.tasks.form import form
from include.juicefs_storage.tasks.runbook import TASK_DEFAULTS

DOC = """
### Use this when
Objects are to be copied from one S3 store to another, or two stores are to be compared: before a switch of a JuiceFS
volume, or for any other bucket or prefix.

### Dry run first
`dry_run` is on by default: the run counts objects and bytes for each partition and ends with the plan. Nothing is changed.

### What it changes
The target: what it lacks is added. An object that is there already is never replaced unless `overwrite` is on, and nothing
is ever deleted. The source is only read. With `plan=metadata`, blocks of a volume that no file refers to are left alone.

### How it ends
Green only where every partition is accounted for and no object is missing or different. Otherwise red, with the
differences as files. A partition can be cleared alone: it does only what is missing. See `docs/sync.md`.
"""


@dag(
    dag_display_name="JuiceFS: copy and compare stores",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    doc_md=DOC,
    tags=["juicefs", "storage", "copy"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_sync() -> None:
    """Check, list, cut into partitions, copy, verify, reconcile."""
    shares = sync.check()
    listing = sync.list_source.expand(share=shares)
    planned = sync.plan_partitions()
    copied = sync.copy.expand(shard=planned)
    listed = sync.list_to_verify()
    verified = sync.verify.expand(shard=listed)
    chain(shares, listing, planned, copied, listed, verified, sync.reconcile(), sync.finalize())


juicefs_storage_sync().params.update(form(SyncParams))

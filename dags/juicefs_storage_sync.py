"""The DAG `juicefs_storage_sync`."""

from __future__ import annotations

from airflow.sdk import Param, chain, dag

from include.juicefs_storage.tasks import sync
from include.juicefs_storage.tasks.form import flag, number, text, texts
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

PARAMS = {
    "source_conn_id": Param(type="string", title="Source's connection", description_md="Type `aws`: login = access key, password = secret key, extra `endpoint_url`.", section="Source", minLength=1, examples=["minio_old"]),
    "source_bucket": Param(type="string", title="Source bucket", description_md="The bucket's name alone.", section="Source", minLength=3, examples=["juicefs-data"]),
    "source_prefix": text("", "Source prefix", "Copy what is below it; for a volume `<name>/`.", "Source"),
    "target_conn_id": Param(type="string", title="Target's connection", description_md="As for the source.", section="Target", minLength=1, examples=["minio_new"]),
    "target_bucket": Param(type="string", title="Target bucket", description_md="It must exist.", section="Target", minLength=3, examples=["juicefs-data"]),
    "target_prefix": text("", "Target prefix", "Where the keys go: it takes the place of the source's prefix.", "Target"),
    "plan": text("listing", "Plan by", "A listing of the source; or a JuiceFS volume's metadata: the blocks that files refer to, each proven to be there.", "What", enum=["listing", "metadata"]),
    "volume": text(None, "Volume", "With `plan=metadata`: its name in `include/volumes.yaml`.", "What"),
    "meta_conn_id": text(None, "Metadata's connection", "With `plan=metadata`: type `mysql`; empty: what the registry says of the volume, else its Secret's `metaurl`.", "What"),
    "since_id": number(0, "From slice id", "With `plan=metadata`: only blocks of slices from this id on; every report names the next.", "What", 0, 9_000_000_000_000_000),
    "mode": text("copy+verify", "What to do", "Copy, compare the two sides, or both.", "What", enum=["copy", "verify", "copy+verify"]),
    "compare": text("etag", "Compare by", "Size; size and ETag, from the listings; or contents, both sides read in full.", "What", enum=["size", "etag", "content"]),
    "include": texts("Include", "Patterns such as `chunks/*`, one a line; empty: every key.", "What"),
    "exclude": texts("Exclude", "Patterns of keys that are left out.", "What"),
    "after": text(None, "After key", "Only keys behind this one.", "What"),
    "until": text(None, "Until key", "Only keys up to this one.", "What"),
    "dry_run": flag(True, "Dry run", "Stop after the plan. Nothing is changed.", "Safety"),
    "overwrite": flag(False, "Overwrite", "Replace objects of the target that differ from the source's.", "Safety"),
    "engine": text("native", "Engine", "What moves the objects: this project's own engine, `juicefs sync`, or `mc mirror`.", "Advanced", enum=["native", "juicefs", "mc"]),
    "partitions": number(None, "Partitions", "Empty: of about 250,000 objects or 256 GiB each.", "Advanced", 1, 100_000),
    "recut_from": text(None, "Cut as in run", "The id of an earlier run: its manifests tell where to cut, and the source is not listed for that.", "Advanced"),
    "concurrency": number(32, "Concurrency", "Objects at once in each task.", "Advanced", 1, 512),
    "bandwidth_mib_s": number(None, "Bandwidth (MiB/s)", "Of all tasks together; empty: no limit.", "Advanced", 1, 1_000_000),
}  # fmt: skip


@dag(
    dag_display_name="JuiceFS: copy and compare stores",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    params=PARAMS,
    doc_md=DOC,
    tags=["juicefs", "storage", "copy"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_sync() -> None:
    """Check, cut into partitions, copy, verify, reconcile."""
    checked = sync.check()
    planned = sync.plan_partitions()
    copied = sync.copy.expand(shard=planned)
    listed = sync.list_to_verify()
    verified = sync.verify.expand(shard=listed)
    chain(checked, planned, copied, listed, verified, sync.reconcile(), sync.finalize())


juicefs_storage_sync()

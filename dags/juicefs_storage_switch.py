"""The DAG `juicefs_storage_switch`."""

from __future__ import annotations

from airflow.sdk import Param, dag

from include.juicefs_storage.fleet.plan import SIDE_BY_SIDE
from include.juicefs_storage.tasks.form import flag, seconds, text
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

### Before you start
Copy the volume's data to the new bucket, and make an Airflow connection of type Amazon Web Services for it (login = access
key, password = secret key, extra `endpoint_url`). Backups need the connection `juicefs_backup`. See `docs/switch.md`.
"""

PARAMS = {
    "volume": text(None, "Registered volume", "A name in `include/volumes.yaml` that fills in what is left at its default.", "Volume"),
    "kubernetes_conn_id": text("kubernetes_default", "Kubernetes connection", "The cluster of the CSI driver.", "Volume"),
    "namespace": text("juicefs", "Namespace", "Where the CSI driver and its Secret are.", "Volume"),
    "secret_name": text("juicefs-sc-secret", "Secret", "The Secret that the CSI driver uses for the volume.", "Volume"),
    "meta_conn_id": text(None, "Metadata connection", "Type MySQL. Empty: from the Secret's `metaurl`.", "Volume"),
    "target_conn_id": Param(type="string", title="New store's connection", description_md="Type `aws`: login = access key, password = secret key, extra `endpoint_url`.", section="New storage", minLength=1, examples=["minio_new"]),
    "target_bucket": Param(type="string", title="New bucket", description_md="The bucket's name alone.", section="New storage", minLength=3, examples=["juicefs-data"]),
    "target_endpoint": text(None, "Endpoint for the clients", "As the JuiceFS clients reach it, where that differs from the connection's.", "New storage"),
    "source_conn_id": text(None, "Old store's connection", "Empty: the endpoint and keys in the setting.", "New storage"),
    "dry_run": flag(True, "Dry run", "Stop after the plan. Nothing is changed.", "Safety"),
    "require_approval": flag(True, "Require approval", "Wait for a human who has read the plan.", "Safety"),
    "consistency": text("listing", "Compare the stores", "How the new store is compared with the old one before the switch: not at all, some blocks by content, all by key and size, both with the blocks that files refer to, all by content.", "Safety", enum=["off", "sample", "listing", "metadata", "content"]),
    "catch_up": flag(True, "Catch up", "Copy what clients write to the old store until they have moved.", "Safety"),
    "restart_csi": flag(True, "Restart CSI", "Restart the CSI controller and node components.", "Safety"),
    "on_failure": text("rollback", "On failure", "Roll back, or hold for a human.", "Safety", enum=["rollback", "hold"]),
    "juicefs_runner": text("controller", "Where juicefs runs", "In the CSI controller pod, or on the Airflow worker.", "Advanced", enum=["controller", "worker"]),
    "client_timeout_s": seconds(60, "Client timeout (s)", "How long the clients may take to follow.", 5, 3600),
    "rollout_timeout_s": seconds(300, "Rollout timeout (s)", "How long the CSI restarts may take.", 10, 7200),
    "settle_s": seconds(40, "Settle (s)", "How long the setting is guarded; at least three heartbeats.", 0, 3600),
    "late_commit_s": seconds(360, "Late commits (s)", "How long after the last client moved a slice may still be committed; then it is copied and proven once more. 0: not at all.", 0, 1800),
    "fence_conn_id": text(None, "Write fence's connection", "Type `aws`, for MinIO alone: an administrator of the old store. From right before the setting is written its clients' key may not write there. Empty: no fence.", "Advanced"),
}  # fmt: skip


@dag(
    dag_display_name="JuiceFS: switch storage",
    schedule=None,
    catchup=False,
    # As many as a wave of a fleet: a Lease per volume keeps two runs on one volume apart.
    max_active_runs=SIDE_BY_SIDE,
    params=PARAMS,
    doc_md=DOC,
    tags=["juicefs", "storage", "runbook"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_switch() -> None:
    """Check, plan, approve, back up, switch, verify; roll back on failure."""
    move_volume(check.resolve_params)


juicefs_storage_switch()

"""The DAG `juicefs_storage_revert`."""

from __future__ import annotations

from airflow.sdk import dag

from include.juicefs_storage.tasks import revert
from include.juicefs_storage.tasks.form import flag, seconds, text
from include.juicefs_storage.tasks.runbook import TASK_DEFAULTS
from include.juicefs_storage.tasks.switch.graph import move_volume

DOC = """
### Use this when
A switch ended well, or was held, and the volume shall go back to where it was: now, or weeks later. Any backup that a
run made can be gone back to, also one that this DAG made.

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
_SAME = "Empty: as the run that made the backup."

PARAMS = {
    "backup_id": text(None, "Backup", "Empty: choose among those that are there, in the task `choose_backup`.", "Backup"),
    "dry_run": flag(True, "Dry run", "Stop after the plan. Nothing is changed.", "Safety"),
    "require_approval": flag(True, "Require approval", "Wait for a human who has read the plan.", "Safety"),
    "consistency": text("listing", "Compare the stores", "How the store of the backup is compared with the current one before the revert.", "Safety", enum=["off", "sample", "listing", "metadata", "content"]),
    "catch_up": flag(True, "Catch up", "Copy back what clients wrote since.", "Safety"),
    "restart_csi": flag(True, "Restart CSI", "Restart the CSI controller and node components.", "Safety"),
    "on_failure": text("rollback", "On failure", "Roll back to the current store, or hold for a human.", "Safety", enum=["rollback", "hold"]),
    "kubernetes_conn_id": text(None, "Kubernetes connection", _SAME, "Advanced"),
    "namespace": text(None, "Namespace", _SAME, "Advanced"),
    "secret_name": text(None, "Secret", _SAME, "Advanced"),
    "meta_conn_id": text(None, "Metadata connection", f"Type MySQL. {_SAME}", "Advanced"),
    "source_conn_id": text(None, "Current store's connection", "Type `aws`. Empty: as that run reached its new store, where the volume still is there; else the endpoint and keys in the setting.", "Advanced"),
    "target_conn_id": text(None, "Backup's store's connection", "Type `aws`: how Airflow reaches it. The clients get the keys of the backup. Empty: as that run reached its old store.", "Advanced"),
    "juicefs_runner": text(None, "Where juicefs runs", f"In the CSI controller pod, or on the Airflow worker. {_SAME}", "Advanced", enum=["controller", "worker", None]),
    "client_timeout_s": seconds(None, "Client timeout (s)", f"How long the clients may take to follow. {_SAME}", 5, 3600),
    "rollout_timeout_s": seconds(None, "Rollout timeout (s)", f"How long the CSI restarts may take. {_SAME}", 10, 7200),
    "settle_s": seconds(None, "Settle (s)", f"How long the setting is guarded; at least three heartbeats. {_SAME}", 0, 3600),
    "late_commit_s": seconds(None, "Late commits (s)", f"How long after the last client moved a slice may still be committed; then it is copied and proven once more. 0: not at all. {_SAME}", 0, 1800),
    "fence_conn_id": text(None, "Write fence's connection", "Type `aws`, for MinIO alone: an administrator of the current store. From right before the setting is written its clients' key may not write there. Empty: no fence.", "Advanced"),
}  # fmt: skip


@dag(
    dag_display_name="JuiceFS: go back to a backup",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    params=PARAMS,
    doc_md=DOC,
    tags=["juicefs", "storage", "runbook"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_revert() -> None:
    """Choose a backup, then check, plan, approve, back up, move, verify; roll back on failure."""
    move_volume(revert.choose_and_resolve)


juicefs_storage_revert()

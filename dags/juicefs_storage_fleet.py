"""The DAG `juicefs_storage_fleet`."""

from __future__ import annotations

from airflow.sdk import Param, dag

from include.juicefs_storage.tasks.fleet import plan as fleet_plan
from include.juicefs_storage.tasks.fleet import waves as fleet
from include.juicefs_storage.tasks.form import flag, seconds, text
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.runbook import TASK_DEFAULTS
from include.juicefs_storage.tasks.switch import check

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

PARAMS = {
    "source_endpoint": text(None, "Old endpoint", "`http(s)://host[:port]`: every volume whose setting names it. Or give the volumes below.", "Volumes", examples=["http://minio.old.example:9000"]),
    "volumes": Param([], type="array", items={"type": "string"}, title="Registered volumes", description_md="Names in `include/volumes.yaml`, one a line, instead of the old endpoint.", section="Volumes"),
    "exclude": Param([], type="array", items={"type": "string"}, title="Leave out", description_md="Names of volumes, one a line.", section="Volumes"),
    "kubernetes_conn_id": text("kubernetes_default", "Kubernetes connection", "The cluster of the CSI driver.", "Volumes"),
    "namespace": text("juicefs", "Namespace", "Where the CSI driver and the Secrets are.", "Volumes"),
    "target_conn_id": text(None, "New store's connection", "Type `aws`. Empty: by the registry.", "New storage", examples=["minio_new"]),
    "target_bucket": text(None, "New bucket", "Empty: by the registry, else the name of each volume's old bucket.", "New storage"),
    "target_endpoint": text(None, "Endpoint for the clients", "As the JuiceFS clients reach it, where that differs from the connection's.", "New storage"),
    "source_conn_id": text(None, "Old store's connection", "Empty: the endpoint and keys in each setting.", "New storage"),
    "canary": text(None, "Canary", "The volume that goes first. Empty: the one with the fewest clients.", "Waves"),
    "approve_after_canary": flag(True, "Approve after the canary", "Wait for a human before the others.", "Waves"),
    "wave_size": Param(3, type="integer", minimum=1, maximum=8, title="Wave size", description_md="How many volumes move side by side after the canary.", section="Waves"),
    "soak_s": Param(600, type="integer", minimum=0, maximum=604800, title="Soak (s)", description_md="How long each volume is watched after its move, before the next wave.", section="Waves"),
    "on_failure": text("stop", "On failure", "Start no other volume, or go on with the next wave. The volume itself is rolled back by its own run.", "Waves", enum=["stop", "continue"]),
    "dry_run": flag(True, "Dry run", "Stop after the plan. Nothing is changed.", "Safety"),
    "require_approval": flag(True, "Require approval", "Wait for a human who has read the plan.", "Safety"),
    "consistency": text("listing", "Compare the stores", "As in a switch, for each volume.", "Safety", enum=["off", "sample", "listing", "metadata", "content"]),
    "catch_up": flag(True, "Catch up", "Copy what clients write to the old store until they have moved.", "Safety"),
    "restart_csi": flag(True, "Restart CSI", "Restart the CSI components with the canary, and once at the end.", "Safety"),
    "juicefs_runner": text("controller", "Where juicefs runs", "In the CSI controller pod, or on the Airflow worker.", "Advanced", enum=["controller", "worker"]),
    "client_timeout_s": seconds(60, "Client timeout (s)", "How long the clients may take to follow.", 5, 3600),
    "rollout_timeout_s": seconds(300, "Rollout timeout (s)", "How long the CSI restarts may take.", 10, 7200),
    "settle_s": seconds(40, "Settle (s)", "How long each setting is guarded; at least three heartbeats.", 0, 3600),
    "late_commit_s": seconds(360, "Late commits (s)", "How long after the last client moved a slice may still be committed; then it is copied and proven once more. 0: not at all.", 0, 1800),
    "fence_conn_id": text(None, "Write fence's connection", "Type `aws`, for MinIO alone: an administrator of the old store. As in a switch, for each volume. Empty: no fence.", "Advanced"),
}  # fmt: skip


@dag(
    dag_display_name="JuiceFS: switch a fleet of volumes",
    schedule=None,
    catchup=False,
    max_active_runs=1,
    params=PARAMS,
    doc_md=DOC,
    tags=["juicefs", "storage", "runbook"],
    default_args=TASK_DEFAULTS,
)
def juicefs_storage_fleet() -> None:
    """Find, rehearse, plan, approve; move the canary, watch it, approve; then wave by wave."""
    found, planned, path, approval = (
        fleet_plan.find_volumes(),
        fleet_plan.plan(),
        fleet_plan.choose_path(),
        check.approve(),
    )
    fleet_plan.resolve_params() >> found
    fleet_plan.dry_runs.expand(volume=found) >> planned >> path >> approval

    watched, later = fleet.watch_canary(), fleet.later_volumes()
    [path, approval] >> fleet.start_canary() >> watched >> fleet.approve_rest() >> later

    told = Notify("ended")
    finalize = fleet.finalize.override(on_success_callback=told, on_failure_callback=told)()
    moved = fleet.waves.expand(volume=later)
    # Not by way of others alone: whatever becomes of these, and whatever is cleared, every volume has ended by then.
    moved >> [restart := fleet.restart_csi(), finalize]
    restart >> fleet.wait_for_rollouts() >> finalize
    [planned, path, watched] >> finalize


juicefs_storage_fleet()

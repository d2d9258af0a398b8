"""Apply and verify: back up, write the setting, patch the Secrets, restart the CSI components, prove everything."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from airflow.sdk import PokeReturnValue, TriggerRule

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.objects.one_store import new_probe_key
from include.juicefs_storage.ports import Cluster
from include.juicefs_storage.switch import checks
from include.juicefs_storage.switch.backup import FORMAT, Backup, ClusterBackup, deviation
from include.juicefs_storage.switch.marks import moved_by
from include.juicefs_storage.switch.plan import StorageView, has_fingerprint
from include.juicefs_storage.switch.prove_fresh_mount import prove_status, use_fresh_mount
from include.juicefs_storage.switch.prove_no_restarts import compare_pods
from include.juicefs_storage.tasks.context import run_id, task_states, triggered_at
from include.juicefs_storage.tasks.metrics import gauge
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch import admission, copies, guard, proofs, write_fence
from include.juicefs_storage.tasks.switch.check import check_endpoints
from include.juicefs_storage.tasks.switch.rollouts import rollouts_done
from include.juicefs_storage.tasks.switch.run import CONFIG_TIMEOUT_S, SwitchRun
from include.juicefs_storage.volume.difference import files_of
from include.juicefs_storage.volume.secret import volume_secrets
from include.juicefs_storage.volume.setting import Setting, StorageConfig

APPLY = (
    "backup", "copy_ahead", "follow_writes", "write_setting", "patch_secret", "settle", "restart_csi",
    "wait_for_rollouts", "prove_clients", "catch_up", "prove_blocks", "prove_fresh_mount", "prove_no_restarts",
    "catch_up_late",
)  # fmt: skip
#: Tasks during which clients may be on either store.
_MOVING = ("write_setting", "patch_secret", "settle", "restart_csi", "wait_for_rollouts", "prove_clients")
_COPY_AHEAD_TIMEOUT_S = 6 * 3600


def approved_target(run: SwitchRun) -> StorageConfig:
    """Return the storage that the connection describes, for the backup to record.

    Raises:
        PermanentError: The connection is no longer what the plan showed and a human approved.
    """
    config = run.runtime.target(run.runtime.setting())
    if not has_fingerprint(config, run.plan.target_fingerprint, run.runtime.vault.keys):
        raise PermanentError(
            f"Connection {run.runtime.params.target_conn_id!r} changed since the plan was made for "
            f"{run.plan.after.bucket}.",
            state="nothing was changed",
            next_step="start a new run, so that the plan shows what will be done",
        )
    return config


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
def backup() -> dict[str, Any]:
    """Record the state before the switch, encrypted; read it back and decrypt it before anything else happens.

    From here to its end the run holds the volume's Lease; another run on the volume is refused.
    Before that it makes the new bucket, where the plan says so (`create_bucket`).
    **Changes** nothing in the volume; writes the Lease, and one file to the folder of connection `juicefs_backup`.
    **Safe to clear**: yes; a backup that this run made before is kept.
    """
    run = admission.forward()
    runtime, name = run.runtime, run.backup_id
    setting = runtime.setting()
    if kept := run.record.existing():
        if other := deviation(kept, run.plan, runtime.vault.keys):
            raise NeedsHumanError(
                f"This run's backup {name} was made for another plan: {other}.",
                state="this task changed nothing",
                next_step="start a new run: what was approved is not what this one would carry out",
            )
        if not setting.uses(kept.setting.config) and not setting.uses(kept.new):
            raise NeedsHumanError(
                f"This run's backup {name} names bucket {kept.setting.bucket}, the setting now {setting.bucket}.",
                state="this task changed nothing",
                next_step="find out who changed the setting, then start a new run",
            )
        return {"backup_id": name, "written": False}
    target = approved_target(run)
    if setting.uses(target):
        raise PermanentError(
            f"The setting names {setting.bucket} already and this run has no backup of what was before.",
            state="the volume is on the new store",
            next_step="nothing to switch",
        )
    if StorageView.of(setting.config) != run.plan.before:
        raise NeedsHumanError(
            f"The plan was made for a volume on {run.plan.before.bucket}; the setting now names {setting.bucket} "
            "or has other keys.",
            state="nothing was changed",
            next_step="start a new run, so that the plan shows what will be done",
        )
    created = _create_bucket(run, setting, target) if run.plan.creates_bucket else False
    first, *others = runtime.clusters.ask_all(lambda name, cluster: [(name, _recorded(runtime, cluster, setting))])
    record = Backup(
        format=FORMAT,
        backup_id=name,
        run_id=run_id(),
        created_at=datetime.now(UTC),
        setting_hex=setting.raw.hex(),
        secrets=first[1].secrets,
        namespace=runtime.cluster.namespace,
        triggered_at=triggered_at(),
        templates=first[1].templates,
        more_clusters=dict(others),
        target=Backup.target_of(target),
        plan=run.plan,
        params=runtime.params.model_dump(mode="json"),
        moved_before=tuple(moved_by(runtime.vault, setting.name)),
    )
    runtime.vault.save(name, record.to_bytes())
    return {"backup_id": name, "written": True, "bucket_created": created}


def _recorded(runtime: Runtime, cluster: Cluster, setting: Setting) -> ClusterBackup:
    """Read what a backup records of a cluster."""
    secrets = volume_secrets(cluster, runtime.params.secret_name, setting.name)
    return ClusterBackup(
        secrets={secret.name: dict(secret.data) for secret in secrets}, templates=dict(cluster.templates())
    )


def _create_bucket(run: SwitchRun, setting: Setting, target: StorageConfig) -> bool:
    """Make the new bucket, and make the checks that need it. Idempotent.

    Raises:
        PermanentError: It cannot be made, or cannot be used.
    """
    runtime, store = run.runtime, run.runtime.target_store
    store.create()
    probe = new_probe_key(f"{setting.name}/")
    findings = checks.check_target(store, setting, target, probe_key=probe)
    findings += checks.check_use(runtime.juicefs, target, store.store.origin)
    findings += check_endpoints(runtime, target, probe)
    if refused := [finding for finding in findings if finding.level == "refusal"]:
        raise PermanentError(
            " ".join(finding.message for finding in refused),
            state=f"bucket {target.bucket} was made, or was there; nothing else was changed",
            next_step="; ".join(finding.remedy for finding in refused),
        )
    return True


@runbook_task
def copy_ahead() -> dict[str, Any]:
    """Copy what the new store still lacks, so that as little as possible is left for the moment of the switch.

    **Changes** the new store: adds blocks, overwrites and deletes none. **Safe to clear**: yes.
    """
    run = admission.forward(take_lease=False)
    if not run.catches_up:
        return {"copied": 0}
    return copies.copy(run, run.old, run.new, timeout_s=_COPY_AHEAD_TIMEOUT_S, before_follower=True)


@runbook_task
def follow_writes() -> dict[str, Any]:
    """Copy what clients still write to the old store, within two seconds, until every one is proven on the new store.

    It begins before the setting is written, and looks once a second at the slices that were committed since.
    **Changes** the new store: adds blocks, overwrites and deletes none. **Safe to clear**: yes; it ends with
    prove_clients. To have the window followed again, clear copy_ahead with Downstream.
    """
    run = admission.forward(take_lease=False)
    if not run.catches_up:
        return {"copied": 0}
    result = copies.follow(
        run, run.old, run.new, moving=_MOVING, compared_by="copy_ahead", on_poll=write_fence.watch(run)
    )
    if task_states(_MOVING[-1])[_MOVING[-1]] != "success":
        # Some client may not have moved, and from here on nobody takes the fence down in time.
        write_fence.take_down(run)
    return result


@runbook_task
def write_setting() -> dict[str, Any]:
    """Run `juicefs config`: point the setting at the new store. This is the cut-over; clients follow in a heartbeat.

    Waits `wait_for_quiet_s` at most until no client uploads. Where `fence_conn_id` is given, the old store refuses the
    clients' writes from right before.
    **Changes** the row `format` of `jfs_setting`. **Safe to clear**: yes; "already written" is an answer.
    **Undo**: restore_setting.
    """
    run = admission.forward()
    # One that a killed try left behind may write later than this one, even when the volume is elsewhere again.
    run.runtime.juicefs.await_config(timeout_s=CONFIG_TIMEOUT_S)
    step = run.write_setting
    there = step.observe().uses(step.target)
    followed = run.catches_up and copies.await_follower("follow_writes", required=not there)
    fenced, quiet = False, {}
    if not there:
        run.patch_secret.plan()  # while nothing is changed: every cluster must answer
        quiet = proofs.await_quiet(run)
        proofs.count_failed_requests(run)
        if not run.runtime.recorded:
            # `juicefs config` would make a bucket that has gone since it was checked, and clients would find it empty.
            run.new.store.check(f"{run.before.name}/")
        fenced = followed and write_fence.put_up(run)
    gauge("between_stores", 1, run.before.name)
    try:
        written = step.apply()
        at = proofs.written_now() if written.written else {}
    except StorageSwitchError:
        if fenced and not run.runtime.setting().uses(step.target):
            write_fence.take_down(run)
        raise
    return {**asdict(written), "bucket": step.target.bucket, "followed": followed, "fenced": fenced, **quiet, **at}


@runbook_task
def patch_secret() -> dict[str, Any]:
    """Make the volume's Secrets, per-volume copies included, agree with the setting.

    **Changes** the Secrets listed in the plan; the resourceVersion is tested. **Safe to clear**: yes.
    **Undo**: restore_secret.
    """
    return {"patched": admission.forward().patch_secret.apply()}


@runbook_task
def settle() -> dict[str, Any]:
    """Guard setting and Secrets for `settle_s` seconds: a pod that started with old values may write them back.

    Where that happened, clients may have followed it for a moment: they are proven, and caught up with, again.
    **Changes** the setting and the Secrets only where they moved back. **Safe to clear**: yes.
    """
    run = admission.forward()
    return guard.settle(run, run.write_setting, run.patch_secret, source=run.old, target=run.new)


@runbook_task
def restart_csi() -> dict[str, Any]:
    """Restart the CSI controller StatefulSet and node DaemonSet, stamped with this run.

    **Changes** the pod templates' annotation. The mounts live in mount pods and do not notice.
    **Safe to clear**: yes; a workload that carries this run's stamp is not restarted again.
    """
    step = admission.forward().restart_csi(run_id())
    return {"restarted": step.apply() if step else []}


@runbook_task(kind="sensor", mode="reschedule", poke_interval=3, timeout=7300)
def wait_for_rollouts() -> PokeReturnValue:
    """Wait until both rollouts are done, as `kubectl rollout status` decides it; holds no worker slot.

    **Changes** nothing. **Safe to clear**: yes.
    """
    run = admission.forward(take_lease=False)
    run.lease.renew()
    return rollouts_done(run.restarted, "restart_csi", run.runtime.params.rollout_timeout_s)


@runbook_task
def prove_clients() -> dict[str, Any]:
    """Prove every mount pod on the new store: its `.config`, then a block written through its very mount.

    One that is mounted read-only reads a block that another client writes.
    **Changes** nothing; a small file is written through each mount and removed. Where a client shows the new bucket and
    does not use it, the secret key in the setting is encrypted again, once: every client then tries again. Where only
    the keys change and `fence_conn_id` is given, the store refuses the old key for a few seconds meanwhile.
    **Safe to clear**: yes.
    """
    run = admission.forward(take_lease=False)
    proven = {**proofs.prove_clients(run, run.new), **proofs.deny_old_key(run)}
    gauge("between_stores", 0, run.before.name)
    return proven


@runbook_task
def catch_up() -> dict[str, Any]:
    """Copy what clients wrote to the old store between the setting's write and their own move.

    **Changes** the new store: adds blocks, overwrites and deletes none. **Safe to clear**: yes.
    """
    run = admission.forward(take_lease=False)
    if not run.catches_up:
        return {"copied": 0}
    return copies.copy(run, run.old, run.new, timeout_s=copies.CATCH_UP_TIMEOUT_S)


@runbook_task
def prove_blocks() -> dict[str, Any]:
    """Prove by the metadata (`jfs_chunk_ref`) that every block that some file refers to is on the new store.

    **Changes** nothing. **Safe to clear**: yes.
    """
    run = admission.forward(take_lease=False)
    return proofs.prove_blocks(run, run.new)


@runbook_task
def prove_fresh_mount() -> dict[str, Any]:
    """Run `juicefs status`, then a fresh mount with an empty cache: write, read, list, unmount.

    **Changes** nothing; one small file is written and removed. **Safe to clear**: yes.
    """
    run = admission.forward(take_lease=False)
    juicefs, new = run.runtime.juicefs, run.new
    prove_status(juicefs, run.before, new.config)
    lost_files = files_of(run.lost_before, run.runtime.metadata) if run.lost_before else []
    return {"objects": use_fresh_mount(juicefs, new.store, new.config, run.canary, lost_files)}


@runbook_task
def prove_no_restarts() -> dict[str, Any]:
    """Compare UIDs and restart counts of mount pods and business pods with those in the plan.

    The run restarts and deletes no pod. Where one restarted for another reason, every client and every block is proven
    once more, and the report names the pod. Counts the object requests that failed in each client since the setting
    was written. **Changes** nothing; a small file may be written through each mount and removed.
    **Safe to clear**: yes.
    """
    run = admission.forward(take_lease=False)
    # The plan that was carried out: another one, made since, would not know the pods that were there before.
    plan = run.carried_out
    changes = compare_pods(run.runtime.volume_pods(run.before), plan)
    again = {**proofs.prove_clients(run, run.new), **proofs.prove_blocks(run, run.new)} if changes.restarted else {}
    return {
        "mount_pods": len(plan.mount_pods),
        "business_pods": len(plan.business_pods),
        "gone": changes.gone,
        "restarts": len(changes.restarted),
        "restarted": changes.restarted,
        **again,
        **proofs.failed_requests_since(run, "write_setting"),
    }


@runbook_task(kind="sensor", mode="reschedule", timeout=7200)
def catch_up_late() -> PokeReturnValue:
    """Copy and prove once more when `late_commit_s` have passed since the last client moved; holds no slot till then.

    A slice of several blocks is committed with its last block; the first may have gone to the old store minutes before.
    **Changes** the new store: adds blocks, overwrites and deletes none. **Safe to clear**: yes.
    """
    run = admission.forward(take_lease=False)
    return copies.catch_up_late(run, run.old, run.new, moved_by=("prove_clients", "settle"), copies=run.catches_up)

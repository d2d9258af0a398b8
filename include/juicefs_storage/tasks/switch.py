"""The tasks of `juicefs_storage_switch`. Each observes the world first; it may be killed and run again at any point."""

from __future__ import annotations

import functools
import hashlib
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import PokeReturnValue, TriggerRule, get_current_context

from include.juicefs_storage.core import checks
from include.juicefs_storage.core.backup import Backup, backup_id
from include.juicefs_storage.core.clients import business_pods, find_mount_pods, read_request_errors
from include.juicefs_storage.core.copying import Difference, missing_blocks
from include.juicefs_storage.core.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.core.params import resolve_params as validate_params
from include.juicefs_storage.core.plan import Finding, Plan, SecretChange, StorageView, fingerprint
from include.juicefs_storage.core.proofs import (
    catch_up as copy_until_none_missing,
)
from include.juicefs_storage.core.proofs import (
    prove_clients as wait_for_clients,
)
from include.juicefs_storage.core.proofs import (
    prove_fresh_mount as use_fresh_mount,
)
from include.juicefs_storage.core.proofs import (
    prove_no_restarts as compare_pods,
)
from include.juicefs_storage.core.proofs import (
    prove_status,
    require_all_blocks,
)
from include.juicefs_storage.core.report import MEANING, Outcome, Report, proof_lines
from include.juicefs_storage.core.secrets import storage_values, volume_secrets
from include.juicefs_storage.core.setting import Setting, StorageConfig
from include.juicefs_storage.core.steps import CSI_WORKLOADS, PatchSecrets, RestartCsi, WriteSetting
from include.juicefs_storage.core.steps import settle as guard_setting
from include.juicefs_storage.tasks.runtime import (
    COPY_POOL,
    REGISTRY,
    Runtime,
    log,
    missing_connections_explained,
    pull,
    push,
    run_id,
    runbook_task,
)

CHECKS = ("resolve_params", "check_rights", "check_csi", "check_volume", "check_target_bucket", "check_consistency")
APPLY = (
    "backup", "copy_ahead", "write_setting", "patch_secret", "settle", "restart_csi", "wait_for_rollouts",
    "prove_clients", "catch_up", "prove_blocks", "prove_fresh_mount", "prove_no_restarts",
)  # fmt: skip
ROLLBACK = (
    "copy_back", "restore_setting", "restore_secret", "restart_csi_again", "wait_for_rollouts_again",
    "prove_clients_on_old", "copy_back_again", "prove_blocks_on_old",
)  # fmt: skip
_COPY_AHEAD_TIMEOUT_S = 6 * 3600
#: Clients wait for these copies: what they wrote elsewhere in some seconds is copied in minutes, or something is wrong.
_CATCH_UP_TIMEOUT_S = 600


# --- check ------------------------------------------------------------------------------------------------------------


@runbook_task
def resolve_params() -> dict[str, Any]:
    """Validate the params and fill in what the registry knows about the volume.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    import yaml

    given = dict(get_current_context()["params"])
    registry = yaml.safe_load(REGISTRY.read_text()) or {}
    try:
        return validate_params(given, registry).model_dump()
    except PermanentError as error:
        push("findings", [checks.refusal("resolve_params", error.problem, error.next_step).model_dump()])
        raise


def check_task(function: Callable[[Runtime], list[Finding]]) -> Any:
    """A task that makes one check: leaves the findings for the plan, then fails where something is refused.

    A check that could not be made is a refusal too.
    """

    @functools.wraps(function)
    def run() -> list[dict[str, Any]]:
        try:
            with missing_connections_explained():
                findings = function(Runtime.of_run())
        except StorageSwitchError as error:
            push("findings", [checks.refusal(function.__name__, error.problem, error.next_step).model_dump()])
            raise
        rows = [finding.model_dump() for finding in findings]
        push("findings", rows)
        if refused := [finding for finding in findings if finding.level == "refusal"]:
            lines = "\n".join(f"{finding.message} Remedy: {finding.remedy}" for finding in refused)
            raise PermanentError(lines, state="nothing was changed")
        return rows

    # The signature that Airflow sees: no argument is left to be filled in.
    del run.__wrapped__
    return runbook_task(run)


@check_task
def check_rights(runtime: Runtime) -> list[Finding]:
    """Ask the Kubernetes API for every right that the run will use.

    **Changes** nothing. **Safe to clear**: yes, with Downstream. Remedy for a refusal: `deploy/rbac.yaml`.
    """
    return checks.check_rights(runtime.cluster)


@check_task
def check_csi(runtime: Runtime) -> list[Finding]:
    """The CSI driver runs in mount-pod mode, and its controller and node components are healthy.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    return checks.check_csi(runtime.cluster)


@check_task
def check_volume(runtime: Runtime) -> list[Finding]:
    """Every client of the volume can follow a change of the setting, and can be proven.

    Reads the setting, the sessions, and `.config` of every mount pod.
    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    setting = runtime.setting()
    secret = volume_secrets(runtime.cluster, runtime.params.secret_name, setting.name)[0]
    held = (secret.data.get("storage"), secret.data.get("bucket"))
    mounts = find_mount_pods(runtime.cluster, setting)
    return checks.check_volume(setting, held, mounts, runtime.metadata, runtime.params.client_timeout_s)


@check_task
def check_target_bucket(runtime: Runtime) -> list[Finding]:
    """The new bucket exists, its keys work, and it holds this volume's data (`juicefs_uuid`).

    **Changes** nothing in a dry run; else one probe object is written to the new bucket and deleted again.
    The bucket is looked up with HEAD and never created. **Safe to clear**: yes, with Downstream.
    """
    setting = runtime.setting()
    probe = None if runtime.params.dry_run else f"{setting.name}/storage-switch-probe-{uuid.uuid4().hex}"
    return checks.check_target(runtime.target_store, setting, runtime.target(setting), probe_key=probe)


@check_task
def check_consistency(runtime: Runtime) -> list[Finding]:
    """Compare both stores' listings: every block of the old store is on the new one, with the same size.

    **Changes** nothing. **Safe to clear**: yes, with Downstream. `consistency=off` leaves it out, with a warning.
    """
    if runtime.params.consistency == "off":
        return [checks.warning("consistency", "The stores were not compared.", "set consistency=listing")]
    setting = runtime.setting()
    if setting.uses(runtime.target(setting)):
        return [checks.ok("consistency", "the volume is on this store already")]
    source = runtime.source_store(runtime.source(setting))
    findings, difference = checks.check_consistency(
        source, runtime.target_store, setting, catch_up=runtime.params.catch_up
    )
    push("missing_objects", difference.missing)
    return findings


# --- plan and approval ------------------------------------------------------------------------------------------------


def _task_states(*task_ids: str) -> dict[str, str]:
    context = get_current_context()
    states = context["ti"].get_task_states(dag_id=context["dag"].dag_id, task_ids=list(task_ids), run_ids=[run_id()])
    found = states.get(run_id(), {})
    return {task_id: str(found.get(task_id) or "none") for task_id in task_ids}


def _all_findings() -> list[Finding]:
    states = _task_states(*CHECKS)
    findings: list[Finding] = []
    for task_id in CHECKS:
        if states[task_id] == "upstream_failed":
            continue
        rows = pull(task_id, "findings") or []
        findings += [Finding.model_validate(row) for row in rows]
        if states[task_id] != "success" and not rows:
            message = f"{task_id} could not be made (state {states[task_id]})."
            findings.append(checks.refusal(task_id, message, "see its log"))
    return findings


@runbook_task(trigger_rule=TriggerRule.ALL_DONE)
def plan() -> dict[str, Any]:
    """Collect the checks; refuse, or write down exactly what will be changed.

    **Changes** nothing. **Safe to clear**: yes, with Downstream, as long as the setting has not been written.
    All refusals are reported here together, each with its remedy. The plan stands in XCom `markdown`.
    """
    findings = _all_findings()
    if refused := [finding for finding in findings if finding.level == "refusal"]:
        lines = "\n".join(f"- {finding.check}: {finding.message} Remedy: {finding.remedy}" for finding in refused)
        push("markdown", f"## Refused\n{lines}")
        raise PermanentError(f"{len(refused)} refusals:\n{lines}", state="nothing was changed")
    runtime = Runtime.of_run()
    params, setting = runtime.params, runtime.setting()
    before, after = runtime.source(setting), runtime.target(setting)
    patches = PatchSecrets(runtime.cluster, params.secret_name, setting.name, after).plan()
    workloads = [f"{kind}/{name}" for kind, name in CSI_WORKLOADS] if params.restart_csi else []
    secrets = [
        SecretChange(namespace=secret.namespace, name=secret.name, keys=tuple(values)) for secret, values in patches
    ]
    planned = Plan(
        volume=setting.name,
        uuid=setting.uuid,
        before=StorageView.of(before),
        after=StorageView.of(after),
        target_fingerprint=fingerprint(after, runtime.vault.key),
        secrets=tuple(secrets),
        workloads=tuple(workloads),
        mount_pods=tuple(find_mount_pods(runtime.cluster, setting)),
        business_pods=tuple(business_pods(runtime.cluster, runtime.cluster.persistent_volumes())),
        missing_objects=pull("check_consistency", "missing_objects"),
        steps=_steps(runtime, setting, after, workloads, [change.name for change in secrets]),
        findings=tuple(findings),
    )
    push("markdown", planned.to_markdown())
    return planned.model_dump(mode="json")


def _steps(
    runtime: Runtime, setting: Setting, after: StorageConfig, workloads: list[str], secrets: list[str]
) -> tuple[str, ...]:
    params = runtime.params
    write = WriteSetting(runtime.metadata, runtime.juicefs, setting, after)
    steps = [
        "back up the setting, the Secrets, the workloads' templates and the pods' identities, encrypted",
        "copy what the new store still lacks" if params.catch_up else "",
        write.plan(),
        f"patch Secrets {', '.join(secrets)}" if secrets else "no Secret needs a patch",
        f"watch the setting for {params.settle_s} s and put it right if a starting pod writes old values back",
        f"restart {', '.join(workloads)} and wait up to {params.rollout_timeout_s} s" if workloads else "",
        f"prove every client on the new store, for up to {params.client_timeout_s} s",
        "copy what clients wrote to the old store while they moved" if params.catch_up else "",
        "prove by the metadata that no block is missing",
        "prove a fresh mount with an empty cache, and that no pod restarted",
        "if a step fails: roll back" if params.on_failure == "rollback" else "if a step fails: hold, for a human",
    ]
    return tuple(step for step in steps if step)


def the_plan() -> Plan:
    """The plan of this run."""
    planned = pull("plan")
    if not planned:
        raise PermanentError("This run has no plan.", next_step="clear plan with Downstream")
    return Plan.model_validate(planned)


@runbook_task(kind="branch")
def choose_path() -> str:
    """A dry run ends here; a real run goes on, through approval where it is required.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    params = Runtime.of_run().params
    if params.dry_run:
        return "finalize"
    return "approve" if params.require_approval else "backup"


def approve() -> ApprovalOperator:
    """The human gate: shows the plan; a rejection or 24 hours without an answer end the run, nothing changed."""
    return ApprovalOperator(
        task_id="approve",
        subject="Switch the storage of {{ ti.xcom_pull(task_ids='plan')['volume'] }}?",
        body="{{ ti.xcom_pull(task_ids='plan', key='markdown') }}",
        defaults="Reject",
        fail_on_reject=True,
        response_timeout=timedelta(hours=24),
        retries=0,
        doc_md="Wait for a human who has read the plan. A rejection, or no answer within 24 hours, ends the run "
        "failed. **Changes** nothing. **Safe to clear**: yes, it asks again.",
    )


# --- apply ------------------------------------------------------------------------------------------------------------


def _the_backup(runtime: Runtime) -> Backup:
    """The backup of this run, read back from the vault."""
    name = backup_id(the_plan().volume, run_id())
    content = runtime.vault.load(name)
    if content is None:
        raise PermanentError(f"There is no backup {name}.", next_step="clear backup with Downstream")
    return Backup.from_bytes(content)


def _target(runtime: Runtime, setting: Setting) -> StorageConfig:
    """The new storage, refused where the connection is no longer what the plan showed and a human approved."""
    config, planned = runtime.target(setting), the_plan()
    if fingerprint(config, runtime.vault.key) != planned.target_fingerprint:
        raise PermanentError(
            f"Connection {runtime.params.target_conn_id!r} changed since the plan was made for {planned.after.bucket}.",
            next_step="start a new run, so that the plan shows what will be done",
        )
    return config


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
def backup() -> dict[str, Any]:
    """Record the state before the switch, encrypted; read it back and decrypt it before anything else happens.

    **Changes** nothing in the volume; writes one file to the folder of connection `juicefs_backup`.
    **Safe to clear**: yes; a backup that this run made before is kept.
    """
    runtime, planned = Runtime.of_run(), the_plan()
    setting = runtime.setting()
    name = backup_id(planned.volume, run_id())
    if existing := runtime.vault.load(name):
        kept = Backup.from_bytes(existing).setting
        if not setting.uses(kept.config) and not setting.uses(_target(runtime, setting)):
            raise NeedsHumanError(
                f"This run's backup {name} names bucket {kept.bucket}, the setting now names {setting.bucket}.",
                state="this task changed nothing",
                next_step="find out who changed the setting, then start a new run",
            )
        return {"backup_id": name, "written": False}
    if setting.uses(runtime.target(setting)):
        raise PermanentError(
            f"The setting names {setting.bucket} already and this run has no backup of what was before.",
            state="the volume is on the new store",
            next_step="nothing to switch; to go back, use the backup of the run that switched it",
        )
    secrets = volume_secrets(runtime.cluster, runtime.params.secret_name, setting.name)
    record = Backup(
        backup_id=name,
        run_id=run_id(),
        created_at=datetime.now(UTC),
        setting_hex=setting.raw.hex(),
        secrets={secret.name: storage_values(secret) for secret in secrets},
        templates=dict(runtime.cluster.templates()),
        plan=planned,
    )
    runtime.vault.save(name, record.to_bytes())
    return {"backup_id": name, "written": True}


def _copy(runtime: Runtime, *, back: bool, timeout_s: float) -> tuple[int, Difference]:
    """Copy the blocks that only one store has to the other: old to new, or back."""
    setting = _the_backup(runtime).setting
    old, new = runtime.source(setting), _target(runtime, setting)
    source, target = (new, old) if back else (old, new)
    store = runtime.source_store(old) if back else runtime.target_store
    return copy_until_none_missing(
        runtime.juicefs, runtime.metadata, setting, source, target, store, timeout_s=timeout_s
    )


@runbook_task(pool=COPY_POOL)
def copy_ahead() -> dict[str, Any]:
    """Copy what the new store still lacks, so that as little as possible is left for the moment of the switch.

    **Changes** the new store: adds blocks, overwrites and deletes none. **Safe to clear**: yes.
    """
    runtime = Runtime.of_run()
    if not runtime.params.catch_up:
        return {"copied": 0}
    copied, difference = _copy(runtime, back=False, timeout_s=_COPY_AHEAD_TIMEOUT_S)
    return {"copied": copied, "behind": difference.missing}


@runbook_task
def write_setting() -> dict[str, Any]:
    """`juicefs config`: point the setting at the new store. This is the cut-over; clients follow within a heartbeat.

    **Changes** the row `format` of `jfs_setting`. **Safe to clear**: yes; "already written" is an answer.
    **Undo**: restore_setting, or the revert of this run's backup.
    """
    runtime = Runtime.of_run()
    before = _the_backup(runtime).setting
    step = WriteSetting(runtime.metadata, runtime.juicefs, before, _target(runtime, before))
    return {"written": step.apply(), "bucket": step.target.bucket}


@runbook_task
def patch_secret() -> dict[str, Any]:
    """Make the volume's Secrets, per-volume copies included, agree with the setting.

    **Changes** the Secrets listed in the plan; the resourceVersion is tested. **Safe to clear**: yes.
    **Undo**: restore_secret.
    """
    runtime = Runtime.of_run()
    before = _the_backup(runtime).setting
    step = PatchSecrets(runtime.cluster, runtime.params.secret_name, before.name, _target(runtime, before))
    return {"patched": step.apply()}


@runbook_task
def settle() -> dict[str, Any]:
    """Guard the setting for `settle_s` seconds: a pod that started with old values may write them back.

    **Changes** the setting only where it moved back. **Safe to clear**: yes.
    """
    runtime = Runtime.of_run()
    before = _the_backup(runtime).setting
    step = WriteSetting(runtime.metadata, runtime.juicefs, before, _target(runtime, before))
    repaired = guard_setting(step, for_s=runtime.params.settle_s, clock=time.monotonic, sleep=time.sleep)
    return {"repaired": list(repaired)}


def _restart(runtime: Runtime, stamp: str) -> dict[str, Any]:
    if not runtime.params.restart_csi:
        return {"restarted": []}
    return {"restarted": RestartCsi(runtime.cluster, stamp).apply()}


def _rollouts_done(started: str) -> PokeReturnValue:
    """Look at both rollouts once; the worker slot is free between two looks."""
    runtime = Runtime.of_run()
    waiting = RestartCsi(runtime.cluster, "").verify() if runtime.params.restart_csi else []
    timing = pull(started, "timing")
    waited_s = (datetime.now(UTC) - datetime.fromisoformat(timing["applied_at"])).total_seconds() if timing else 0.0
    if waiting and waited_s > runtime.params.rollout_timeout_s:
        raise PermanentError(
            f"Rollouts not done {waited_s:.0f} s after the restart: {'; '.join(waiting)}.",
            state="the existing mounts go on",
            next_step=f"kubectl -n {runtime.params.namespace} get pods; then clear this task",
        )
    done = not waiting
    return PokeReturnValue(is_done=done, xcom_value={"waited_s": round(waited_s, 1)} if done else None)


@runbook_task
def restart_csi() -> dict[str, Any]:
    """Tell the CSI controller StatefulSet and node DaemonSet to restart, stamped with this run.

    **Changes** the pod templates' annotation. The mounts live in mount pods and do not notice.
    **Safe to clear**: yes; a workload that carries this run's stamp is not restarted again.
    """
    return _restart(Runtime.of_run(), run_id())


@runbook_task(kind="sensor", mode="reschedule", poke_interval=3, timeout=7300)
def wait_for_rollouts() -> PokeReturnValue:
    """Wait until both rollouts are done, as `kubectl rollout status` decides it; holds no worker slot.

    **Changes** nothing. **Safe to clear**: yes.
    """
    return _rollouts_done("restart_csi")


def _canary() -> str:
    """The name of the files that prove a mount: one per run, so that a repeated task removes what it left behind."""
    return f".storage-switch-{hashlib.sha256(run_id().encode()).hexdigest()[:12]}"


def _prove_clients(runtime: Runtime, config: StorageConfig, store: Any) -> dict[str, Any]:
    setting = _the_backup(runtime).setting
    proofs = wait_for_clients(
        runtime.cluster,
        setting,
        config,
        store,
        _canary(),
        timeout_s=runtime.params.client_timeout_s,
        clock=time.monotonic,
        sleep=time.sleep,
    )
    return {"clients": [proof.model_dump() for proof in proofs]}


@runbook_task
def prove_clients() -> dict[str, Any]:
    """Prove every mount pod on the new store: its `.config`, then a block written through its very mount.

    **Changes** nothing; a small file is written through each mount and removed. **Safe to clear**: yes.
    """
    runtime = Runtime.of_run()
    before = _the_backup(runtime).setting
    return _prove_clients(runtime, _target(runtime, before), runtime.target_store)


@runbook_task(pool=COPY_POOL)
def catch_up() -> dict[str, Any]:
    """Copy what clients wrote to the old store between the setting's write and their own move.

    **Changes** the new store: adds blocks, overwrites and deletes none. **Safe to clear**: yes.
    """
    runtime = Runtime.of_run()
    if not runtime.params.catch_up:
        return {"copied": 0}
    return {"copied": _copy(runtime, back=False, timeout_s=_CATCH_UP_TIMEOUT_S)[0]}


def _prove_blocks(runtime: Runtime, store: Any, bucket: str) -> dict[str, Any]:
    difference = missing_blocks(runtime.metadata, _the_backup(runtime).setting, store)
    require_all_blocks(difference, bucket)
    return {"blocks": difference.expected}


@runbook_task
def prove_blocks() -> dict[str, Any]:
    """Prove by the metadata (`jfs_chunk_ref`) that every block that some file refers to is on the new store.

    **Changes** nothing. **Safe to clear**: yes.
    """
    runtime = Runtime.of_run()
    return _prove_blocks(runtime, runtime.target_store, runtime.params.target_bucket)


@runbook_task
def prove_fresh_mount() -> dict[str, Any]:
    """`juicefs status`, then a fresh mount with an empty cache: write, read, list, unmount.

    **Changes** nothing; one small file is written and removed. **Safe to clear**: yes.
    """
    runtime = Runtime.of_run()
    before = _the_backup(runtime).setting
    config = _target(runtime, before)
    prove_status(runtime.juicefs, before, config)
    return {"objects": use_fresh_mount(runtime.juicefs, runtime.target_store, config, _canary())}


@runbook_task
def prove_no_restarts() -> dict[str, Any]:
    """Compare UIDs and restart counts of mount pods and business pods with those in the plan.

    Counts the object requests that failed in the clients since the plan was made. **Changes** nothing.
    **Safe to clear**: yes.
    """
    runtime, planned = Runtime.of_run(), the_plan()
    gone = compare_pods(runtime.cluster, planned)
    before = {mount.uid: mount.request_errors for mount in planned.mount_pods}
    mounts = [pod for pod in runtime.cluster.pods() if pod.uid in before]
    errors = sum(read_request_errors(runtime.cluster, pod) - before[pod.uid] for pod in mounts)
    return {
        "mount_pods": len(planned.mount_pods),
        "business_pods": len(planned.business_pods),
        "restarts": 0,
        "gone": gone,
        "failed_requests": int(errors),
    }


# --- decide and roll back ---------------------------------------------------------------------------------------------


@runbook_task(kind="branch", trigger_rule=TriggerRule.ALL_DONE)
def decide() -> str:
    """Roll back when a step failed after the setting was touched; else finish.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    failed = any(state in {"failed", "upstream_failed"} for state in _task_states(*APPLY).values())
    touched = failed and bool(pull("backup")) and _touched(Runtime.of_run())
    push("touched", touched)
    return "copy_back" if touched and Runtime.of_run().params.on_failure == "rollback" else "finalize"


def _touched(runtime: Runtime) -> bool:
    """Whether the setting or a Secret differs from the backup. The world decides, not what the run remembers."""
    record = _the_backup(runtime)
    try:
        return not runtime.setting().uses(record.setting.config) or bool(_restore_secrets(runtime, record).plan())
    except StorageSwitchError:
        log.exception("What was touched cannot be seen; rolling back will look again.")
        return True


def _restore_secrets(runtime: Runtime, record: Backup) -> PatchSecrets:
    old = runtime.source(record.setting)
    return PatchSecrets(runtime.cluster, runtime.params.secret_name, record.setting.name, old, exact=record.secrets)


@runbook_task(pool=COPY_POOL)
def copy_back() -> dict[str, Any]:
    """Copy blocks that clients wrote only to the new store back to the old one, before the setting goes back.

    **Changes** the old store: adds blocks, overwrites and deletes none. **Safe to clear**: yes, with Downstream.
    """
    return {"copied": _copy(Runtime.of_run(), back=True, timeout_s=_CATCH_UP_TIMEOUT_S)[0]}


@runbook_task(trigger_rule=TriggerRule.NONE_SKIPPED)
def restore_setting() -> dict[str, Any]:
    """Put the old storage back into the setting by compare-and-set: one UPDATE; the row is never absent.

    **Changes** the storage fields of the row `format`; nothing else in it. **Safe to clear**: yes, with Downstream.
    """
    runtime = Runtime.of_run()
    before = _the_backup(runtime).setting
    return {"restored": WriteSetting(runtime.metadata, runtime.juicefs, before, _target(runtime, before)).undo()}


@runbook_task(trigger_rule=TriggerRule.NONE_SKIPPED)
def restore_secret() -> dict[str, Any]:
    """Put the values of the backup back into the Secrets.

    **Changes** the Secrets that the run had patched. **Safe to clear**: yes, with Downstream.
    """
    runtime = Runtime.of_run()
    return {"patched": _restore_secrets(runtime, _the_backup(runtime)).apply()}


@runbook_task(trigger_rule=TriggerRule.NONE_SKIPPED)
def restart_csi_again() -> dict[str, Any]:
    """Restart the CSI controller and node components, so that they read the old values.

    **Changes** the pod templates' annotation. **Safe to clear**: yes, with Downstream.
    """
    return _restart(Runtime.of_run(), f"{run_id()} rollback")


@runbook_task(kind="sensor", mode="reschedule", poke_interval=3, timeout=7300, trigger_rule=TriggerRule.NONE_SKIPPED)
def wait_for_rollouts_again() -> PokeReturnValue:
    """Wait until both rollouts are done; holds no worker slot.

    **Changes** nothing. **Safe to clear**: yes.
    """
    return _rollouts_done("restart_csi_again")


@runbook_task(trigger_rule=TriggerRule.NONE_SKIPPED)
def prove_clients_on_old() -> dict[str, Any]:
    """Prove every mount pod on the old store, as prove_clients does on the new one.

    **Changes** nothing; a small file is written through each mount and removed. **Safe to clear**: yes.
    """
    runtime = Runtime.of_run()
    old = runtime.source(_the_backup(runtime).setting)
    return _prove_clients(runtime, old, runtime.source_store(old))


@runbook_task(pool=COPY_POOL, trigger_rule=TriggerRule.NONE_SKIPPED)
def copy_back_again() -> dict[str, Any]:
    """Copy back what clients wrote to the new store until they were proven on the old one.

    **Changes** the old store: adds blocks, overwrites and deletes none. **Safe to clear**: yes, with Downstream.
    """
    return {"copied": _copy(Runtime.of_run(), back=True, timeout_s=_CATCH_UP_TIMEOUT_S)[0]}


@runbook_task(trigger_rule=TriggerRule.NONE_SKIPPED)
def prove_blocks_on_old() -> dict[str, Any]:
    """Prove by the metadata that every block that some file refers to is on the old store.

    **Changes** nothing. **Safe to clear**: yes.
    """
    runtime = Runtime.of_run()
    old = runtime.source(_the_backup(runtime).setting)
    return _prove_blocks(runtime, runtime.source_store(old), old.endpoint_and_bucket[1])


# --- finalize ---------------------------------------------------------------------------------------------------------


def _outcome(states: dict[str, str], *, dry_run: bool, hold: bool) -> Outcome:
    def all_are(state: str, tasks: tuple[str, ...]) -> bool:
        return all(states[task] == state for task in tasks)

    if states["copy_back"] not in {"skipped", "none", "upstream_failed"}:
        return "rolled back" if all_are("success", ROLLBACK) else "half rolled back"
    if states["plan"] != "success":
        return "refused"
    if dry_run:
        return "planned"
    if states["approve"] in {"failed", "upstream_failed"}:
        return "rejected"
    if all_are("success", APPLY):
        return "switched"
    return "held" if hold and pull("decide", "touched") else "failed"


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, retries=0)
def finalize() -> dict[str, Any]:
    """Write the report and tell the truth: the run is green only when every check was made and passed.

    **Changes** nothing. **Safe to clear**: yes. The report stands in XCom `report`, as Markdown in `markdown`.
    """
    states = _task_states(*CHECKS, "plan", "choose_path", "approve", *APPLY, "decide", *ROLLBACK)
    params = pull("resolve_params") or {}
    runtime = Runtime.of_run() if params else None
    hold = params.get("on_failure") == "hold"
    outcome = _outcome(states, dry_run=bool(params.get("dry_run")), hold=hold)
    planned = Plan.model_validate(pull("plan")) if pull("plan") else None
    setting = _setting_or_none(runtime)
    results = {task_id: result for task_id in (*APPLY, *ROLLBACK) if isinstance(result := pull(task_id), dict)}
    if outcome == "switched" and runtime and (not setting or not _switched_now(runtime, setting)):
        outcome = "moved on"
    report = Report(
        outcome=outcome,
        meaning=MEANING[outcome],
        run_id=run_id(),
        volume=planned.volume if planned else None,
        before=planned.before if planned else None,
        after=planned.after if planned else None,
        setting_now=setting.bucket if setting else None,
        backup_id=results.get("backup", {}).get("backup_id"),
        approved_by=_approver(pull("approve")),
        findings=tuple(_all_findings()),
        states=states,
        took_s={task_id: timing["took_s"] for task_id in states if (timing := pull(task_id, "timing"))},
        proofs=tuple(proof_lines(results)),
        results=results,
    )
    push("report", report.model_dump(mode="json"))
    push("markdown", report.to_markdown())
    if outcome not in {"switched", "planned"}:
        failed = ", ".join(task_id for task_id, state in states.items() if state == "failed") or "none"
        raise PermanentError(f"{report.outcome}: {report.meaning}\nFailed tasks: {failed}.")
    return {"outcome": outcome}


def _setting_or_none(runtime: Runtime | None) -> Setting | None:
    try:
        return runtime.setting() if runtime else None
    except StorageSwitchError:
        return None


def _switched_now(runtime: Runtime, setting: Setting) -> bool:
    """The world as it is at the end: the setting and every Secret name the new store."""
    target = _target(runtime, setting)
    patches = PatchSecrets(runtime.cluster, runtime.params.secret_name, setting.name, target).plan()
    return setting.uses(target) and not patches


def _approver(answer: dict[str, Any] | None) -> str | None:
    user = (answer or {}).get("responded_by_user") or {}
    return user.get("name") or user.get("id") if isinstance(user, dict) else str(user)

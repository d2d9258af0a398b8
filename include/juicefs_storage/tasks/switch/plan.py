"""Plan and approve: nothing is changed before a human has seen what will be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.sdk import TriggerRule

from include.juicefs_storage.code_version import code_version
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.findings import Finding, findings_markdown
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.plan import Plan, SecretChange, StorageView, digest, fingerprint
from include.juicefs_storage.switch.run_record import RunRecord
from include.juicefs_storage.switch.steps import planned_steps
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.tasks.approval import require_second_person
from include.juicefs_storage.tasks.context import pull, push, run_id, triggered_at
from include.juicefs_storage.tasks.runbook import IDENTITY, runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.check import all_findings
from include.juicefs_storage.volume.clusters import name_in
from include.juicefs_storage.volume.csi import CSI_WORKLOADS
from include.juicefs_storage.volume.users import accepted_clients, unknown_sessions


@runbook_task(trigger_rule=TriggerRule.ALL_DONE)
def plan() -> dict[str, Any]:
    """Collect the checks; refuse, or write down exactly what will be changed.

    **Changes** nothing. **Safe to clear**: yes, with Downstream, as long as the setting has not been written.
    All refusals are reported here together, each with its remedy. The plan is in XCom `markdown`.
    """
    findings = all_findings()
    if refused := [finding for finding in findings if finding.level == "refusal"]:
        lines = "\n".join(f"- {finding.check}: {finding.message} Remedy: {finding.remedy}" for finding in refused)
        push("markdown", "\n".join(["## Refused", *findings_markdown(findings)]))
        raise PermanentError(f"{len(refused)} refusals:\n{lines}", state="nothing was changed")
    missing, blocks_s = (pull("check_consistency", key) for key in ("missing_objects", "blocks_s"))
    runtime = Runtime.of_run()
    lost, change = pull("check_consistency", "lost_blocks") or (), pull("check_consistency", "change") or {}
    planned = make_plan(runtime, findings, missing, blocks_s, lost, Change.model_validate(change))
    _require_a_move(runtime, planned)
    push(IDENTITY, planned.identity)
    push("markdown", planned.to_markdown())
    push("subject", f"{planned.title}?")
    return planned.model_dump(mode="json")


def _require_a_move(runtime: Runtime, planned: Plan) -> None:
    """Refuse a switch to the storage where the volume is. A run that moved it there itself may be planned again.

    Raises:
        PermanentError: There is nothing to switch.
    """
    setting = runtime.setting()
    if not setting.uses(runtime.target(setting)):
        return
    if RunRecord(runtime.vault, runtime.vault.keys, planned, run_id(), triggered_at()).find() is None:
        problem = f"Volume {setting.name} is on {setting.bucket} already, with these keys: nothing to switch."
        push("markdown", f"## Refused\n{problem}")
        raise PermanentError(
            problem,
            state="nothing was changed",
            next_step="correct `target_conn_id` and `target_bucket`, or leave the volume where it is. Where the run "
            "that moved it is gone before its end, see docs/rollback.md#a-run-that-was-left-where-it-is",
        )


def make_plan(
    runtime: Runtime,
    findings: list[Finding],
    missing_objects: int | None,
    blocks_s: float | None = None,
    lost_blocks: Sequence[str] = (),
    change: Change | None = None,
) -> Plan:
    """Write down what a run with these params would change, and what must not change. Reads only.

    Args:
        runtime: Of the run.
        findings: Of every check; none is a refusal.
        missing_objects: What the new store lacks; None: not counted.
        blocks_s: How many blocks Airflow reads a second; None: not measured.
        lost_blocks: The blocks that are lost already, and accepted as lost.
        change: How the storage changes; None: not known.
    """
    change = change or Change()
    params, setting, recorded = runtime.params, runtime.setting(), runtime.recorded
    pods = runtime.volume_pods(setting)
    mounts = pods.mounts()
    others = unknown_sessions(runtime.metadata.sessions(), [mount.mount_path for mount in mounts])
    before, after = runtime.source(setting), runtime.target(setting)
    exact = recorded.storage_values if recorded else {}
    patches = PatchSecrets(runtime.clusters, params.secret_name, setting.name, after, exact=exact).plan()
    restarted = list(runtime.clusters.each) if params.restart_csi else []
    workloads = [name_in(cluster, f"{kind}/{name}") for cluster in restarted for kind, name in CSI_WORKLOADS]
    secrets = [
        SecretChange(
            cluster=patch.cluster,
            namespace=patch.secret.namespace,
            name=patch.secret.name,
            keys=tuple(patch.values),
        )
        for patch in patches
    ]
    write = WriteSetting(
        runtime.metadata, runtime.juicefs, setting, after, recorded=recorded.setting if recorded else None
    )
    return Plan(
        backup_id=recorded.backup_id if recorded else None,
        volume=setting.name,
        uuid=setting.uuid,
        before=StorageView.of(before),
        after=StorageView.of(after),
        target_fingerprint=fingerprint(after, runtime.vault.key),
        secrets=tuple(secrets),
        workloads=tuple(workloads),
        mount_pods=tuple(mounts),
        business_pods=tuple(pods.business_pods(mounts)),
        more_clusters=params.more_kubernetes_conn_ids,
        missing_objects=missing_objects,
        blocks_s=blocks_s,
        lost_blocks=tuple(lost_blocks),
        accepted_clients=tuple(accepted_clients(others, params.accept_clients)),
        change=change,
        code=code_version(),
        creates_bucket=runtime.lacks_bucket,
        secret_keys=(digest(before.secret_key, runtime.vault.key), digest(after.secret_key, runtime.vault.key)),
        steps=(
            *([f"make the bucket `{after.bucket}`"] if runtime.lacks_bucket else []),
            *planned_steps(
                params, change, write.plan(), workloads, [name_in(secret.cluster, secret.name) for secret in secrets]
            ),
        ),
        findings=tuple(findings),
    )


@runbook_task(kind="branch")
def choose_path() -> str:
    """End a dry run here; continue a real run, through approval where it is required.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    params = Runtime.of_run().params
    require_second_person(asked=params.require_approval)
    if params.dry_run:
        return "finalize"
    return "approve" if params.require_approval else "backup"

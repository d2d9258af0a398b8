"""The tasks until a person approves: the params, the plan, and which way the run takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow.sdk import get_current_context

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.finish.params import resolve_finish_params
from include.juicefs_storage.finish.plan import FinishPlan, in_order, later_steps
from include.juicefs_storage.ports import Cluster
from include.juicefs_storage.switch.checks import (
    check_distinct,
    check_each,
    check_rights,
    check_secret_leads_to,
    ok,
    refusal,
    rights_to_finish,
)
from include.juicefs_storage.switch.findings import Finding, findings_markdown
from include.juicefs_storage.switch.lease import check_leases
from include.juicefs_storage.switch.moved_back import check_setting
from include.juicefs_storage.tasks.approval import require_second_person
from include.juicefs_storage.tasks.context import pull, push
from include.juicefs_storage.tasks.finish.run import FinishRun, two_stores
from include.juicefs_storage.tasks.registry import read_registry
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.volume.clusters import name_in
from include.juicefs_storage.volume.setting import Setting


@runbook_task
def resolve_params() -> dict[str, Any]:
    """Validate the params and fill in what the registry knows about the volume.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    return resolve_finish_params(dict(get_current_context()["params"]), read_registry()).model_dump()


@runbook_task
def plan() -> dict[str, Any]:
    """Find everything that carries other values than the setting, and write down which mount pods are replaced.

    Reads the setting, the Secrets, pods, workloads and PersistentVolumes; juicefs opens the store that the volume has
    left with the keys that a pod would have that restarts. **Changes** nothing. **Safe to clear**: yes, with
    Downstream.
    """
    run = FinishRun()
    setting = run.runtime.setting()
    findings = [*check_setting(run.runtime.vault, setting), *_clusters(run, setting)]
    _require_none_refused(findings)  # a cluster that cannot be read cannot be looked through
    carriers, door = run.look(setting)
    findings += [*check_leases(run.lease(setting)), *door, *_old_store(run)]
    _require_none_refused(findings)
    stale = {name_in(carrier.cluster, carrier.name) for carrier in carriers if carrier.kind == "mount pod"}
    mounts = [mount for mount in run.runtime.volume_pods(setting).mounts() if mount.name in stale]
    planned = FinishPlan(
        volume=setting.name,
        uuid=setting.uuid,
        bucket=setting.bucket,
        carriers=tuple(carrier.line for carrier in carriers),
        mount_pods=in_order(mounts),
        refresh=run.params.refresh_mount_pods,
        most_pods=run.params.most_pods,
        findings=tuple(findings),
        then=later_steps(run.params),
    )
    push("markdown", planned.to_markdown())
    push("subject", f"{planned.title}?")
    return planned.model_dump(mode="json")


def _require_none_refused(findings: Sequence[Finding]) -> None:
    """Raise PermanentError where one is a refusal."""
    if refused := [finding for finding in findings if finding.level == "refusal"]:
        push("markdown", "\n".join(["## Refused", *findings_markdown(findings)]))
        lines = "\n".join(f"{finding.message} Remedy: {finding.remedy}" for finding in refused)
        raise PermanentError(lines, state="nothing was changed")


def _clusters(run: FinishRun, setting: Setting) -> list[Finding]:
    """Check the rights in every cluster, and that each further one is another one that has this volume."""
    clusters, runtime = run.runtime.clusters, run.runtime

    def leads_here(name: str, cluster: Cluster) -> list[Finding]:
        return check_secret_leads_to(runtime.juicefs_in(cluster), setting) if name else []

    rights = check_each(clusters, "rights", lambda _, here: check_rights(here, rights_to_finish(here.namespace)))
    if any(finding.level == "refusal" for finding in rights) or not clusters.more:
        return rights
    return [*rights, *check_distinct(clusters), *check_each(clusters, "metadata", leads_here)]


def _old_store(run: FinishRun) -> list[Finding]:
    """Check that there is an old store to close, and that its administrator can be asked."""
    check, params = "administrator", run.params
    if not (params.close_door or params.rehearse_off_s):
        return []
    if run.moved is None or not two_stores(run.moved[1]):
        problem = "No run is known that moved this volume to another store: there is no old store to close."
        return [refusal(check, problem, "leave close_door and rehearse_off_s off; the old key is withdrawn by you")]
    try:
        fence = run.fence(run.moved[1])
        up = "; the fence is up" if fence and fence.is_up() else ""
    except PermanentError as error:
        return [refusal(check, error.problem, error.next_step)]
    return [ok(check, f"the old store can be told{up}" if fence else "none is given: the old store is only asked")]


@runbook_task(kind="branch")
def choose_path() -> str:
    """End here in a dry run, or where there is nothing to do; else continue, through approval where required.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    params, planned = FinishRun().params, FinishPlan.model_validate(pull("plan"))
    if params.dry_run or not (planned.chosen or planned.then):
        return "finalize"
    if not planned.chosen and not (params.close_door or params.rehearse_off_s or params.watch):
        return "certify"
    require_second_person(asked=params.require_approval)
    return "approve" if params.require_approval else "refresh_mount_pods"

"""The end of every run: one report, and a state that tells the truth."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from airflow.sdk import TriggerRule

from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.switch.plan import Plan
from include.juicefs_storage.switch.report import LEFT, MEANING, Report, RunOutcome, proof_lines
from include.juicefs_storage.tasks.context import log, pull, push, run_id, task_states
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.apply import APPLY
from include.juicefs_storage.tasks.switch.check import CHECKS, all_findings
from include.juicefs_storage.tasks.switch.rollback import DIAGNOSTICS, HELD_BECAUSE, ROLLBACK, recorded_run, touched
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.mount_pods import mount_pods_naming
from include.juicefs_storage.volume.setting import Setting


def _outcome(states: dict[str, str], run: SwitchRun | None, *, dry_run: bool) -> RunOutcome:
    def all_are(state: str, tasks: tuple[str, ...]) -> bool:
        return all(states[task] == state for task in tasks)

    # What the run changed and did not put back, whatever became of the tasks' states since.
    left = run is not None and not run.record.superseded().backup_id and touched(run)
    if states["copy_back"] not in {"skipped", "none"} and pull("decide", "chosen") == DIAGNOSTICS:
        if run and left and not _moved_back(run):
            return "held"
        return "rolled back" if all_are("success", ROLLBACK) and not left else "half rolled back"
    if left or all_are("success", APPLY):
        return "switched" if all_are("success", APPLY) else "held"
    if states["plan"] != "success":
        return "refused"
    if dry_run:
        return "planned"
    return "rejected" if states["approve"] in {"failed", "upstream_failed"} else "failed"


def _moved_back(run: SwitchRun) -> bool:
    """Whether the rollback has begun to move the volume: the setting or a Secret is not the new store's any more."""
    try:
        return not run.runtime.setting().uses(run.new.config) or bool(run.patch_secret.plan())
    except StorageSwitchError:
        return True


def _meaning(outcome: RunOutcome) -> str:
    """What the outcome means, and why a run that failed was left where it is."""
    reason = pull("decide", HELD_BECAUSE) if outcome == "held" else None
    return f"{reason.rstrip('.')}. {LEFT}" if reason else MEANING[outcome]


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, retries=0)
def finalize() -> dict[str, Any]:
    """Write the report and tell the truth: the run is green only when every check was made and passed.

    **Changes** nothing; gives the volume's Lease back, and takes the write fence on the old store down where no mount
    pod carries its values any more. **Safe to clear**: yes.
    The report stands in XCom `report`, as Markdown in `markdown`, in a line in `note`.
    """
    states = task_states(*CHECKS, "plan", "choose_path", "approve", *APPLY, "decide", DIAGNOSTICS, *ROLLBACK)
    params = pull("resolve_params") or {}
    runtime = Runtime.of_run() if params else None
    run = _recorded_or_none()
    outcome = _outcome(states, run, dry_run=bool(params.get("dry_run")))
    # The plan that was carried out, where one was.
    planned = run.carried_out if run else Plan.model_validate(pull("plan")) if pull("plan") else None
    setting = _setting_or_none(runtime)
    steps = (*APPLY, DIAGNOSTICS, *ROLLBACK)
    results = {task_id: result for task_id in steps if isinstance(result := pull(task_id), dict)}
    rolled_back = run is not None and pull("decide", "chosen") == DIAGNOSTICS
    unrecorded = run.record.mark("rolled-back") if run and rolled_back else ""
    if outcome == "switched":
        if _switched_now():
            unrecorded = SwitchRun.current().record.mark("switched")
            outcome = "reverted" if "backup_id" in params else outcome
        else:
            outcome = "moved on"
    report = Report(
        outcome=outcome,
        meaning=_meaning(outcome),
        run_id=run_id(),
        volume=planned.volume if planned else None,
        before=planned.before if planned else None,
        after=planned.after if planned else None,
        setting_now=setting.bucket if setting else None,
        backup_id=results.get("backup", {}).get("backup_id"),
        approved_by=_approver(pull("approve")),
        findings=tuple(all_findings()),
        states=states,
        took_s={task_id: timing["took_s"] for task_id in states if (timing := pull(task_id, "timing"))},
        proofs=(
            *proof_lines(results),
            *_window(),
            *(_fence(run, outcome) if run else []),
            *([f"how this run ended is not recorded beside its backup: {unrecorded}"] if unrecorded else []),
        ),
        results=results,
    )
    push("report", report.model_dump(mode="json"))
    push("markdown", report.to_markdown())
    push("note", report.to_note())
    if planned:
        _release_lease()
    if outcome not in {"switched", "reverted", "planned"}:
        failed = ", ".join(task_id for task_id, state in states.items() if state == "failed") or "none"
        raise PermanentError(f"{report.outcome}: {report.meaning}\nFailed tasks: {failed}.")
    return {"outcome": outcome}


def _fence(run: SwitchRun, outcome: str) -> list[str]:
    """Take the write fence down where nothing can write old values any more; else say what can.

    A run that holds leaves none: who may be behind it is not known, and nobody would take it down in time.
    """
    try:
        if outcome not in {"switched", "reverted", "held"} or not run.write_fence or not run.write_fence.is_up():
            return []
        if outcome == "held":
            run.write_fence.down()
            return [
                "the write fence on the old store was taken down: clients that have not moved may write there again"
            ]
        if pods := mount_pods_naming(run.runtime.cluster, run.before.bucket):
            listed = ", ".join(f"`{pod}`" for pod in pods)
            return [f"the write fence on the old store stays up, since mount pods carry its values: {listed}"]
        run.write_fence.down()
    except StorageSwitchError as error:
        return [f"the write fence on the old store may still be up: {error.problem}"]
    return ["the write fence on the old store was taken down: no mount pod carries its values"]


def _window() -> list[str]:
    """How long the clients took, to hold against the plan's forecast."""
    written, proven = (pull(task, "timing") for task in ("write_setting", "prove_clients"))
    if not (written and proven):
        return []
    took = datetime.fromisoformat(proven["applied_at"]) - datetime.fromisoformat(written["applied_at"])
    return [f"the last client was proven {took.total_seconds():.0f} s after the setting was written"]


def _release_lease() -> None:
    try:
        SwitchRun.current().lease.release()
    except StorageSwitchError:
        log.exception("The volume's Lease was not given back: it expires by itself.")


def _recorded_or_none() -> SwitchRun | None:
    try:
        return recorded_run()
    except StorageSwitchError:
        log.exception("The backup of this run cannot be read.")
        return None


def _setting_or_none(runtime: Runtime | None) -> Setting | None:
    try:
        return runtime.setting() if runtime else None
    except StorageSwitchError:
        return None


def _switched_now() -> bool:
    """The world as it is at the end: the setting and every Secret name the new store."""
    run = SwitchRun.current()
    return run.runtime.setting().uses(run.new.config) and not run.patch_secret.plan()


def _approver(answer: dict[str, Any] | None) -> str | None:
    user = (answer or {}).get("responded_by_user") or {}
    return user.get("name") or user.get("id") if isinstance(user, dict) else str(user)

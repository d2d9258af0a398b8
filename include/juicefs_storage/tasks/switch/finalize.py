"""The end of every run: one report, and a state that tells the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from airflow.sdk import TriggerRule

from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.names import ESTIMATE
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.evidence import Evidence
from include.juicefs_storage.switch.forecast import kept_lines
from include.juicefs_storage.switch.marks import End
from include.juicefs_storage.switch.outcome import (
    GREEN,
    LEFT,
    Observed,
    Progress,
    RunOutcome,
    failed_first,
    judge,
    meaning_of,
)
from include.juicefs_storage.switch.plan import Plan
from include.juicefs_storage.switch.report import Report, accepted_in, accepted_lines, proof_lines
from include.juicefs_storage.tasks.approval import ANSWER
from include.juicefs_storage.tasks.context import failure_of, log, pull, push, run_id, task_states
from include.juicefs_storage.tasks.metrics import gauge_outcome
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.apply import APPLY
from include.juicefs_storage.tasks.switch.check import CHECKS, all_findings
from include.juicefs_storage.tasks.switch.door import door_now
from include.juicefs_storage.tasks.switch.judgement import (
    DIAGNOSTICS,
    HELD_BECAUSE,
    ROLLBACK,
    Judgement,
    left_evidence,
    progress_without_backup,
)
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.mount_pods import mount_pods_naming

_STEPS = (*APPLY, DIAGNOSTICS, *ROLLBACK)
#: The tasks in the order of the runbook.
_ORDER = (*CHECKS, "plan", "choose_path", "approve", *APPLY, "decide", DIAGNOSTICS, *ROLLBACK)
#: How an outcome is marked beside the backup.
_MARKS: Mapping[RunOutcome, End] = {
    "switched": "switched",
    "reverted": "switched",
    "rolled back": "rolled-back",
    "half rolled back": "rolled-back",
}


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, retries=0)
def finalize() -> dict[str, Any]:
    """Write the report and tell the truth: the run is green only when every proof was made and is still true.

    The outcome follows from the volume as it is now and from the evidence that each task left. Task states count for
    nothing, since they can be set by hand. Clients and blocks whose proof is out of date are proven once more.
    **Changes** nothing; a small file may be written through each mount and removed. Releases the volume's Lease, and
    takes the write fence on the old store down where no mount pod carries its values any more. **Safe to clear**: yes.
    The report stands in XCom `report`, as Markdown in `markdown`, in a line in `note`.
    """
    states, evidence = task_states(*_ORDER), left_evidence(_STEPS)
    made_again: list[str] = []
    run, unreadable = _recorded(evidence)
    if run:
        judgement = Judgement(run, evidence, made_again)
        observed, progress = judgement.look()
    else:
        observed = Observed(unreadable=unreadable)
        progress = progress_without_backup(states, may_have_changed=bool(unreadable and evidence))
    outcome, missing = judge(observed, progress)
    carriers, door, refused = door_now(run) if run and outcome in {"switched", "reverted"} else ([], [], False)
    lines = [*made_again, *(_fence(run, outcome) if run else [])]
    if run and (how := _MARKS.get(outcome)) and (unrecorded := run.record.mark(how)):
        lines.append(f"how this run ended is not recorded beside its backup: {unrecorded}")
    lines += _release_lease(run)
    report = _report(run, outcome, missing, states, evidence, progress, lines)
    report = report.model_copy(update={"carriers": tuple(carriers), "door": tuple(door), "old_key_refused": refused})
    if run:
        gauge_outcome(outcome, run.before.name, report.results, _window_s(evidence))
    push("report", report.model_dump(mode="json"))
    push("markdown", report.to_markdown())
    push("note", report.to_note())
    if outcome not in GREEN:
        raise PermanentError(report.to_error())
    return {"outcome": outcome}


def _report(
    run: SwitchRun | None,
    outcome: RunOutcome,
    missing: tuple[str, ...],
    states: dict[str, str],
    evidence: Mapping[str, Evidence],
    progress: Progress,
    lines: list[str],
) -> Report:
    """Put the report together.

    Args:
        run: None where nothing was changed, or where the backup cannot be read.
        outcome: How the run ended.
        missing: What it did not prove.
        states: Of its tasks, in the order of the runbook.
        evidence: What they left.
        progress: How far it came.
        lines: What `finalize` itself did.
    """
    # The plan that was carried out, where one was.
    planned = run.carried_out if run else Plan.model_validate(pull("plan")) if pull("plan") else None
    results = {task_id: dict(left.result) for task_id, left in evidence.items()}
    change = planned.change if planned else Change()
    accepted = accepted_in(planned.accepted_clients if planned else (), results)
    approval, approver = _approval(states["approve"])
    failed = "" if outcome in GREEN else failed_first(_ORDER, states, progress.unproven or {})
    return Report(
        outcome=outcome,
        meaning=_meaning(outcome, accepted, change),
        accepted=accepted,
        failure=failure_of(failed) if failed else None,
        missing=missing,
        run_id=run_id(),
        volume=planned.volume if planned else None,
        before=planned.before if planned else None,
        after=planned.after if planned else None,
        change=change,
        setting_now=_bucket_now(),
        backup_id=run.backup_id if run else None,
        approved_by=approver,
        approval=approval,
        findings=tuple(all_findings()),
        states=states,
        took_s={task_id: timing["took_s"] for task_id in states if (timing := pull(task_id, "timing"))},
        proofs=(
            *accepted_lines(accepted, results),
            *proof_lines(results, change),
            *_forecast_kept(planned, evidence),
            *lines,
        ),
        results=results,
    )


def _meaning(outcome: RunOutcome, accepted: Sequence[str], change: Change) -> str:
    """Say what the outcome means, and why a run that failed was left where it is."""
    reason = pull("decide", HELD_BECAUSE) if outcome == "held" else None
    return f"{reason.rstrip('.')}. {LEFT}" if reason else meaning_of(outcome, accepted, change)


def _recorded(evidence: Mapping[str, Evidence]) -> tuple[SwitchRun | None, str]:
    """Find this run with its backup, and why that cannot be read.

    Args:
        evidence: What the tasks left that run after the backup was made.
    """
    try:
        run = SwitchRun.recorded()
    except StorageSwitchError as error:
        log.exception("The backup of this run cannot be read.")
        return None, error.problem
    if run is None and evidence:
        return None, f"the backup that {', '.join(evidence)} went by is not in the folder of backups any more"
    return run, ""


def _approval(state: str) -> tuple[str, str | None]:
    """Say who answered to the plan; and return the name of who approved it.

    Args:
        state: Of task `approve`.
    """
    answer = pull("approve", ANSWER)
    name = _name((answer or {}).get("by") or (pull("approve") or {}).get("responded_by_user"))
    if answer and answer["timed_out"]:
        return "Nobody answered in time, which rejects the plan", None
    if state == "failed":
        return f"Rejected by {name or 'a person'}" if answer else "Not approved: see the log of approve", None
    return (f"Approved by {name}", name) if name else ("Nobody was asked to approve", None)


def _name(user: Any) -> str | None:
    return user.get("name") or user.get("id") if isinstance(user, dict) else user and str(user)


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
        if pods := mount_pods_naming(run.runtime.clusters, run.before.bucket):
            listed = ", ".join(f"`{pod}`" for pod in pods)
            return [f"the write fence on the old store stays up, since mount pods carry its values: {listed}"]
        run.write_fence.down()
    except StorageSwitchError as error:
        return [f"the write fence on the old store may still be up: {error.problem}"]
    return ["the write fence on the old store was taken down: no mount pod carries its values"]


def _forecast_kept(planned: Plan | None, evidence: Mapping[str, Evidence]) -> list[str]:
    """Hold the plan's forecast against how long the copy and the clients took."""
    copied, window_s = evidence.get("copy_ahead"), _window_s(evidence)
    proof_s = pull("prove_blocks", ESTIMATE) if "prove_blocks" in evidence else None
    if planned is None:
        return kept_lines(None, None, [], None, window_s, proof_s)
    took_s = (pull("copy_ahead", "timing") or {}).get("took_s") if copied else None
    heartbeats_s = [pod.heartbeat_s for pod in planned.mount_pods]
    return kept_lines(planned.missing_objects, planned.blocks_s, heartbeats_s, took_s, window_s, proof_s)


def _window_s(evidence: Mapping[str, Evidence]) -> float | None:
    """Return the seconds from the write of the setting to the proof of the last client; None: not both happened."""
    written, proven = evidence.get("write_setting"), evidence.get("prove_clients")
    return (proven.ended_at - written.ended_at).total_seconds() if written and proven else None


def _release_lease(run: SwitchRun | None) -> list[str]:
    """Give the Leases back; say of another cluster than the first that it did not answer."""
    try:
        lease = (run or SwitchRun.current()).lease
        lease.release()
    except StorageSwitchError as error:
        log.warning("The volume's Lease was not released, it expires by itself: %s", error.problem)
        return []
    return [
        f"cluster {cluster} did not answer: the volume's Lease there may still be this run's, and expires within an "
        "hour: once it answers, clear `finalize` to give it back"
        for cluster in sorted(lease.silent)
    ]


def _bucket_now() -> str | None:
    """Return the bucket that the setting names; None where it cannot be read."""
    try:
        return Runtime.of_run().setting().bucket
    except StorageSwitchError:
        return None

"""The task that ends every run: it looks at what is there now, and writes the report."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from airflow.sdk import TriggerRule

from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.finish.plan import FinishPlan, FinishReport
from include.juicefs_storage.finish.refresh import Refreshed
from include.juicefs_storage.finish.watch import Watched, WatchRecord
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.tasks.context import log, pull, push, run_id, why_it_failed
from include.juicefs_storage.tasks.finish.run import FinishRun
from include.juicefs_storage.tasks.finish.steps import DENIED, REPLACED
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.volume.carriers import Carrier
from include.juicefs_storage.volume.setting import Setting

#: What a run is called that ended with one of these tasks; the last of them counts.
_ENDS = {"certify": "certified", "watch": "watched", "rehearse_off": "rehearsed", "close_door": "closed"}


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, retries=0)
def finalize() -> dict[str, Any]:
    """Write the report: what was replaced, what still carries other values, and what is left to a person.

    The run is green only if every mount pod of the plan carries the setting's values now. Releases the volume's Lease,
    and takes back what a rehearsal of switching off has denied. **Changes** nothing else. **Safe to clear**: yes.
    The report is XCom `report`, as Markdown `markdown`, in a line `note`.
    """
    planned = FinishPlan.model_validate(found) if (found := pull("plan")) else None
    problem = "\n".join(why_it_failed())
    replaced = [Refreshed.model_validate(row) for row in pull("refresh_mount_pods", REPLACED) or ()]
    carriers: list[Carrier] = []
    door: list[Finding] = []
    outcome = "failed"
    run = FinishRun() if planned else None
    if planned and run:
        try:
            setting = run.runtime.setting()
            _allow_again(run)
            run.lease(setting).release()
            carriers, door = run.look(setting, ask_door=not run.params.dry_run)
            outcome, left = _judge(run, planned, setting)
        except StorageSwitchError as error:
            left = f"What is there now is not known: {error.problem}"
        problem = problem or left
    certified, seen = pull("certify") or {}, _watched(run) if run else None
    report = FinishReport(
        outcome="failed" if problem else outcome,
        run_id=run_id(),
        volume=planned.volume if planned else None,
        problem=problem,
        replaced=tuple(replaced),
        carriers=tuple(carrier.line for carrier in carriers),
        door=tuple(door),
        closed=(pull("close_door") or {}).get("proven", ""),
        rehearsed=(pull("rehearse_off") or {}).get("line", ""),
        watched=seen.line if seen else "",
        found=seen.found if seen else (),
        public_key=certified.get("public_key", ""),
    )
    push("report", report.model_dump(mode="json"))
    push("markdown", report.to_markdown())
    push("note", report.to_note())
    if report.outcome == "failed":
        raise PermanentError(problem or "Nothing was planned.", next_step="see the report")
    return {"outcome": report.outcome}


def _allow_again(run: FinishRun) -> None:
    """Take back what a rehearsal of switching off has denied: its task may have been killed.

    Raises:
        StorageSwitchError: The store cannot be told. The denial ends by itself.
    """
    if not pull("rehearse_off", DENIED):
        return
    try:
        if off := run.fence(run.last_move[1], datetime.now(UTC)):
            off.down()
    except StorageSwitchError as error:
        until = pull("rehearse_off", DENIED)["until"]
        problem = f"The old key may be denied until {until}: {error.problem}"
        raise type(error)(problem, next_step=error.next_step) from error


def _judge(run: FinishRun, planned: FinishPlan, setting: Setting) -> tuple[str, str]:
    """Return the outcome by the pods as they are now, and what is wrong where it is none."""
    if run.params.dry_run:
        return "planned", ""
    done = next((end for task, end in _ENDS.items() if pull(task)), "")
    if not planned.chosen:
        return done or ("named" if planned.mount_pods else "nothing to do"), ""
    step = run.refresh(setting)
    now = {mount.name: step.observe(mount) for mount in planned.chosen}
    if behind := [name for name, pod in now.items() if pod is None or step.is_stale(pod)]:
        return "failed", f"These mount pods were not replaced, or nothing serves their mounts: {', '.join(behind)}."
    return done or "refreshed", ""


def _watched(run: FinishRun) -> Watched | None:
    """Read what the run's watch has seen: XComs go at each look. None where it did not watch, or nobody can tell."""
    if not run.params.watch or run.moved is None:
        return None
    try:
        return WatchRecord(run.runtime.vault, run.moved[1].backup_id, run_id()).load()
    except StorageSwitchError as error:
        log.warning("What the watch has seen cannot be read: %s", error.problem)
        return None

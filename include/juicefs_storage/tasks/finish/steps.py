"""The tasks that change something, each where a param asks for it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import PokeReturnValue, TriggerRule
from airflow.sdk.exceptions import AirflowRescheduleException

from include.juicefs_storage.errors import StillAwayError, TransientError
from include.juicefs_storage.finish.plan import FinishPlan
from include.juicefs_storage.finish.refresh import Refreshed
from include.juicefs_storage.finish.watch import WatchRecord
from include.juicefs_storage.names import PROGRESS
from include.juicefs_storage.objects.progress import Progress
from include.juicefs_storage.tasks.context import log, pull, push, run_id
from include.juicefs_storage.tasks.finish.run import FinishRun
from include.juicefs_storage.tasks.runbook import runbook_task

#: The XCom of `refresh_mount_pods` that names what was replaced so far.
REPLACED = "replaced"
#: A watch takes days: the metadata or the cluster may be away for some minutes.
_AWAY: dict[str, Any] = {"retries": 12, "retry_delay": timedelta(minutes=5)}


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS, retries=0)
def refresh_mount_pods() -> list[dict[str, Any]]:
    """Replace the planned mount pods one after the other, and prove each: it writes a block, and the store has it.

    **Changes** mount pods, by the driver's own smooth upgrade; business pods go on, and their UIDs and restarts are
    compared. Stops at the first that is not as before. **Safe to clear**: yes. What was replaced is left alone.
    """
    run, planned = FinishRun(), FinishPlan.model_validate(pull("plan"))
    if not planned.chosen:
        return []
    setting = run.planned_setting()
    lease = run.lease(setting)
    lease.acquire()
    replaced: list[Refreshed] = []
    with lease.kept_renewed():
        for mount in planned.chosen:
            done = run.refresh(setting).apply(mount, pause_s=run.params.pause_s)
            if done is None:
                log.info("%s was replaced before.", mount.name)
                continue
            replaced.append(done)
            push(REPLACED, [row.model_dump() for row in replaced])
    return [row.model_dump() for row in replaced]


@runbook_task(kind="sensor", mode="reschedule", trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS, **_AWAY)
def watch() -> PokeReturnValue:
    """Watch for `idle_s`, where `watch` asks for it: what comes to the old store, who has a session, what fails.

    Looks every `watch_every_s`, and holds no worker slot between two looks. What is found is named, and begins the time
    again; a setting that moved fails the task. Another run may work on the volume meanwhile.
    **Changes** the volume's own store: adds blocks that came to the old store and are missing there. **Safe to
    clear**: yes, it goes on from its last look.
    """
    run = FinishRun()
    if not run.params.watch:
        return PokeReturnValue(is_done=True)
    try:
        setting = run.planned_setting()
        run.lease(setting).release()
    except StillAwayError as error:  # of no other task would another try be worth it
        raise TransientError(error.problem, state=error.state, next_step=error.next_step) from error
    mark, backup = run.last_move
    record = WatchRecord(run.runtime.vault, backup.backup_id, run_id())
    watching = run.watch(setting, backup)
    before = record.load() or watching.begin(run_id(), mark.at)
    seen = watching.try_to_look(before)
    record.save(seen)
    ends_at, now = seen.ends_at(run.params.idle_s), datetime.now(UTC)
    log.info("Watching, %s.%s", seen.line, f" {seen.problem}" if seen.problem else "")
    if now >= ends_at and not seen.problem:
        return PokeReturnValue(is_done=True, xcom_value={"seen": seen.line, "found": list(seen.found)})
    doing = f"{seen.line}; ends at {ends_at:%Y-%m-%d %H:%M} UTC at the earliest"
    push(PROGRESS, asdict(Progress("watch", "running", doing, because=seen.problem, at=now.isoformat())))
    raise AirflowRescheduleException(now + timedelta(seconds=run.params.watch_every_s))  # type: ignore[no-untyped-call]

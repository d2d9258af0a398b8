"""The tasks that change something, each where a param asks for it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import PokeReturnValue, TriggerRule
from airflow.sdk.exceptions import AirflowRescheduleException

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StillAwayError, TransientError
from include.juicefs_storage.finish.plan import FinishPlan
from include.juicefs_storage.finish.refresh import Refreshed
from include.juicefs_storage.finish.watch import WatchRecord
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.names import PROGRESS
from include.juicefs_storage.objects.progress import Progress
from include.juicefs_storage.tasks.context import log, pull, push, run_id
from include.juicefs_storage.tasks.finish.run import FinishRun
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.volume.mount_pods import MountPod, request_errors
from include.juicefs_storage.volume.setting import Setting

#: The XCom of `refresh_mount_pods` that names what was replaced so far.
REPLACED = "replaced"
#: The XCom of `rehearse_off` that says what it denies, pushed before that; and how much later than planned the denial
#: ends by itself, in seconds.
DENIED, _ENDS_LATER_S = "denied", 60
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


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
def close_door() -> dict[str, Any] | None:
    """Have the old store refuse the old key's writes, where `close_door` asks for it, and prove it with that key.

    The proof writes nothing: it asks to copy an object that does not exist. Without `fence_conn_id` that is all.
    **Changes** a policy on the old store, by its administrator; it stays. **Safe to clear**: yes.
    """
    run = FinishRun()
    if not run.params.close_door:
        return None
    setting = run.planned_setting()
    _, backup = run.last_move
    lease = run.lease(setting)
    lease.acquire()
    _require_clients_here(run, setting)
    lease.confirm()
    return {"proven": run.door(setting, backup).close(run.fence(backup))}


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS, retries=0)
def rehearse_off() -> dict[str, Any] | None:
    """Deny the old key reads and writes for `rehearse_off_s`, as if the old store were off; undone at the first error.

    Looks at the clients every second: a request that fails, or a setting that moved, ends it. The denial ends by itself
    a minute later, also where this task is killed; finalize takes it back in any case.
    **Changes** a policy on the old store, by its administrator; it is taken back. **Safe to clear**: yes.
    """
    run = FinishRun()
    if not run.params.rehearse_off_s:
        return None
    setting = run.planned_setting()
    _, backup = run.last_move
    door, lease = run.door(setting, backup), run.lease(setting)
    lease.acquire()
    mounts = _require_clients_here(run, setting)
    before = request_errors(run.runtime.clusters, mounts)

    def failed() -> dict[str, int]:
        now = request_errors(run.runtime.clusters, mounts)
        return {name: errors - before.get(name, 0) for name, errors in now.items() if errors != before.get(name, 0)}

    def trouble() -> list[str]:
        moved = run.runtime.setting().bucket
        lines = [f"the setting names {moved}"] if moved != setting.bucket else []
        return lines + [f"{counted(number, 'request')} of mount pod {name} failed" for name, number in failed().items()]

    until = door.left.now() + timedelta(seconds=run.params.rehearse_off_s + _ENDS_LATER_S)
    if not (off := run.fence(backup, until)):
        raise PermanentError("`rehearse_off_s` takes `fence_conn_id`.", next_step="trigger the DAG with both")
    lease.confirm()
    push(DENIED, {"until": until.isoformat(), "key_of": backup.setting.bucket})
    with lease.kept_renewed():
        seen = door.rehearse_off(off, trouble, lambda: sum(failed().values()), for_s=run.params.rehearse_off_s)
    return seen.model_dump() | {"line": seen.line}


def _require_clients_here(run: FinishRun, setting: Setting) -> list[MountPod]:
    """List the volume's mount pods, each of which must use the volume's own store.

    Raises:
        NeedsHumanError: One uses another store, and would lose it.
    """
    mounts = run.runtime.volume_pods(setting).mounts()
    if elsewhere := [f"{mount.name} ({mount.bucket})" for mount in mounts if mount.bucket != setting.bucket]:
        raise NeedsHumanError(
            f"These mount pods do not use {setting.bucket}, which the volume is on: {', '.join(elsewhere)}.",
            state="this task changed nothing",
            next_step="find out why they do not follow the setting: `bucket=` among their mount options?",
        )
    return mounts


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

"""The tasks that change something, each where a param asks for it."""

from __future__ import annotations

from typing import Any

from airflow.sdk import TriggerRule

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.finish.plan import FinishPlan
from include.juicefs_storage.finish.refresh import Refreshed
from include.juicefs_storage.tasks.context import log, pull, push
from include.juicefs_storage.tasks.finish.run import FinishRun
from include.juicefs_storage.tasks.runbook import runbook_task

#: The XCom of `refresh_mount_pods` that names what was replaced so far.
REPLACED = "replaced"


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS, retries=0)
def refresh_mount_pods() -> list[dict[str, Any]]:
    """Replace the planned mount pods one after the other, and prove each: it writes a block, and the store has it.

    **Changes** mount pods, by the driver's own smooth upgrade; business pods go on, and their UIDs and restarts are
    compared. Stops at the first that is not as before. **Safe to clear**: yes. What was replaced is left alone.
    """
    run, planned = FinishRun(), FinishPlan.model_validate(pull("plan"))
    setting = run.runtime.setting()
    if (setting.uuid, setting.bucket) != (planned.uuid, planned.bucket):
        raise NeedsHumanError(
            f"The setting names {setting.bucket}, the plan was made for {planned.bucket}.",
            state="nothing was changed",
            next_step="trigger the DAG again, and look at its finding `setting`",
        )
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

"""Copy and verify partitions."""

from __future__ import annotations

import resource
import time
from typing import Any

from airflow.sdk import TriggerRule

from include.juicefs_storage.copy.pace import Steering
from include.juicefs_storage.copy.partitions import task_groups
from include.juicefs_storage.copy.plan import SyncPlan
from include.juicefs_storage.copy.reconcile import about
from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.names import COPY_POOL
from include.juicefs_storage.objects.model import ObjectOutcome
from include.juicefs_storage.objects.progress import EVERY_S, Status
from include.juicefs_storage.objects.totals import Totals
from include.juicefs_storage.tasks.context import log, push, run_id
from include.juicefs_storage.tasks.lineage import report_datasets
from include.juicefs_storage.tasks.progress import Publisher
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.sync.folder import manifests_folder, plan_of_run
from include.juicefs_storage.tasks.sync.plan import shards_of
from include.juicefs_storage.tasks.sync.runtime import RETRIES, TASKS, SyncRuntime
from include.juicefs_storage.tasks.sync.steering import steer

#: A partition has no deadline: it may be held back, or paused, for as long as a person wants. What hangs is found by
#: the limits of each request, and those of a tool.
_PARTITION: dict[str, Any] = {
    "pool": COPY_POOL,
    "max_active_tis_per_dagrun": TASKS,
    "map_index_template": "{{ task.op_kwargs['shard']['label'] }}",
    "execution_timeout": None,
    **RETRIES,
}


@runbook_task(**_PARTITION)
def copy(shard: dict[str, Any]) -> dict[str, Any]:
    """Copy what the target lacks of a partition, check each object at once, write the manifest.

    **Changes** the target: objects are added, and replaced where they differ only with overwrite=true. Nothing is
    deleted. The source is only read. **Safe to clear**: yes, also alone; it does only what is missing. Clear with
    Downstream to have the report made again. **To undo**: the manifest names every object that was `copied`.
    """
    return _work("copy", shard)


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED)
def list_to_verify() -> list[dict[str, Any]]:
    """List the partitions whose two sides are to be compared, now that the copies are done.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    plan = plan_of_run()
    return [] if plan.params.dry_run or "verify" not in plan.phases else shards_of(plan)


@runbook_task(**_PARTITION)
def verify(shard: dict[str, Any]) -> dict[str, Any]:
    """List both sides of a partition again, compare every object as `compare` says, write the manifest.

    A difference does not fail this task: it is in the manifest, and `finalize` fails.
    **Changes** nothing on either store. **Safe to clear**: yes, also alone; with Downstream for the report.
    """
    return _work("verify", shard)


def _work(phase: str, shard: dict[str, Any]) -> dict[str, Any]:
    """Copy or verify the partitions of one task, one after the other."""
    from include.juicefs_storage.adapters.manifests import ParquetManifest

    started, before_mib, plan = time.time(), _peak_mib(), plan_of_run()
    if shard["plan_id"] != plan.id:
        raise PermanentError(
            f"Expected plan {shard['plan_id']}, found {plan.id}: the plan was made again since.",
            next_step="clear plan_partitions with Downstream",
        )
    if phase == "copy":
        report_datasets(plan.params)
    runtime, tasks = SyncRuntime(plan.params), len(task_groups(plan.partitions))
    steering = steer(plan.params, phase, tasks)
    transfer, tool = runtime.transfer(plan, steering), runtime.tool(steering)
    status = _status(plan, shard["partitions"], steering)
    folder = manifests_folder(run_id()) / plan.id / phase
    totals = Totals()
    said: list[str] = []
    with status.told(steering.look):
        for index in shard["partitions"]:
            partition = plan.partitions[index]
            manifest = ParquetManifest(folder, partition.name, about(plan, phase, partition))
            status.begin(partition.label)
            if phase == "copy" and tool:
                counted, word = transfer.mirror(tool, partition.keys, manifest, status)
                said += [word] if word else []
            else:
                work = transfer.copy if phase == "copy" else transfer.verify
                counted = work(partition.keys, manifest, status)
            log.info("%s: %s", partition.label, counted.as_json())
            totals.merge(counted)
    ended = status.progress()
    result = {
        "totals": totals.as_json(),
        "span": [started, time.time()],
        "estimated_s": ended.estimated_s,
        "paused_s": ended.paused_s,
        "said": said,
        "peak_mib": _peak_mib(),
        "airflow_mib": before_mib,
    }
    log.info("Most memory that this task held: %d MiB; before it began: %d MiB.", result["peak_mib"], before_mib)
    if left := totals.objects(ObjectOutcome.FAILED, ObjectOutcome.CHANGED):
        push("result", result)
        raise TransientError(
            f"{left:,} objects could not be treated: {totals.as_json()}; the manifest names each of them.",
            state="nothing was deleted; what was copied is there",
            next_step="the task tries again; then look at the manifest (column detail) and at the stores",
        )
    return result


def _status(plan: SyncPlan, partitions: list[int], steering: Steering) -> Status:
    """Make what tells how far a task is.

    Args:
        plan: Of the run.
        partitions: Of the task.
        steering: Its flow counts what the engine does.
    """
    expected = [plan.partitions[index] for index in partitions]
    return Status(
        objects=sum(partition.objects for partition in expected),
        bytes=sum(partition.bytes for partition in expected),
        flow=steering.flow,
        every_s=EVERY_S,
        publish=Publisher(steering.every_s),
        # With metadata the plan had counted what only the target has as well.
        uncounted=ObjectOutcome.SKIPPED if plan.needed else ObjectOutcome.EXTRA,
    )


def _peak_mib() -> int:
    """Return the most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

"""Check what is asked, and cut the keys of the source into partitions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from airflow.sdk import TriggerRule, get_current_context

from include.juicefs_storage.copy.nearby import refuse_empty
from include.juicefs_storage.copy.pace import Pace
from include.juicefs_storage.copy.params import SyncParams, check_places, refuse_one_store
from include.juicefs_storage.copy.partitions import amount, cut_partitions, task_groups
from include.juicefs_storage.copy.plan import NeededPlan, SyncPlan
from include.juicefs_storage.copy.scope import below_prefix, shard_at
from include.juicefs_storage.copy.segments import MAX_SEGMENTS, Ruler, Segment
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.names import PACE
from include.juicefs_storage.objects.merge import key_filter
from include.juicefs_storage.tasks.context import log, pull, push, run_id
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.sync.folder import earlier_plan, manifests_folder
from include.juicefs_storage.tasks.sync.listing import begin_listing, read_listing
from include.juicefs_storage.tasks.sync.runtime import RETRIES, SyncRuntime
from include.juicefs_storage.tasks.sync.steering import read_pace
from include.juicefs_storage.volume.layout import ObjectSizes
from include.juicefs_storage.volume.needed import needed_objects, to_pages, watermark

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.manifests import ManifestReader
    from include.juicefs_storage.adapters.s3.store import S3Store


@runbook_task(kind="short_circuit", ignore_downstream_trigger_rules=False, execution_timeout=None, **RETRIES)
def check() -> list[dict[str, Any]]:
    """Validate the params; both buckets can be listed; the engine and a place for the manifests are there.

    With plan=metadata: the metadata is that of the volume at the source. Else the source is listed for the plan, up to
    four million objects; of a larger one the rest is shared out, and where there is no rest `list_source` is skipped.
    **Changes** nothing on the source; writes and removes one file in the folder of the manifests and, where a target
    may be the source by another name, one object on the target.
    **Safe to clear**: yes, with Downstream.
    """
    params = SyncParams.validated(get_current_context()["params"])
    runtime = SyncRuntime(params)
    source, target = runtime.stores()
    check_places(params, source.endpoint, target.endpoint)
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

    for store in (source, target):
        S3Bucket(store).check()
    whole = S3Bucket(replace(source, prefix="")), S3Bucket(replace(target, prefix=""))
    if "copy" in params.mode:
        runtime.find_tool()
    if params.plan == "metadata":
        runtime.check_volume(source)
    else:
        refuse_empty(S3Bucket(source), whole[0], params.source_prefix)
    if "copy" in params.mode and not params.dry_run:
        refuse_one_store(params, *whole)
    folder = manifests_folder(run_id())
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "writable"
    probe.write_bytes(b"")
    probe.unlink()
    if params.recut_from:
        earlier_plan(params.recut_from)
    if Pace.of_text(read_pace()).paused:
        log.warning("Variable %s pauses every copy: this one waits before it lists or copies.", PACE)
    push("params", params.model_dump(mode="json"))
    return [] if params.plan == "metadata" or params.recut_from else begin_listing(params, source)


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED, **RETRIES)
def plan_partitions() -> list[dict[str, Any]]:
    """Count the source's objects and bytes, and cut its keys into partitions of about the same work.

    Joins what `check` and `list_source` listed. With plan=metadata: the blocks that files refer to, which are written
    down beside the manifests for all tasks.
    The plan is in XCom `markdown` and, with every range, in `plan.json` beside the manifests.
    **Changes** nothing on either store. **Safe to clear**: yes, with Downstream: the same listing gives the same plan.
    To list the source again, clear `check`.
    """
    params = SyncParams.model_validate(pull("check", "params"))
    runtime = SyncRuntime(params)
    source, target = runtime.stores()
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

    needed, made_at = None, S3Bucket(source).now()
    if params.plan == "metadata":
        needed, segments = _list_needed(runtime, source)
        cut_by, requests = "the metadata", 0
    elif params.recut_from:
        segments, cut_by, requests = _recut(params.recut_from), f"the manifests of {params.recut_from}", 0
    else:
        segments, requests = read_listing()
        cut_by = "a listing of the source"
    plan = SyncPlan(
        source=source.name,
        target=target.name,
        params=params,
        partitions=tuple(cut_partitions(segments, params.keys, 1 if params.engine == "mc" else params.partitions)),
        cut_by=cut_by,
        requests=requests,
        needed=needed,
        made_at=made_at,
    )
    file = manifests_folder(run_id()) / "plan.json"
    file.write_text(plan.model_dump_json())
    push("markdown", plan.to_markdown())
    push("summary", {"objects": plan.objects, "bytes": plan.bytes, "partitions": len(plan.partitions),
                     "requests": requests, "plan_id": plan.id,
                     "next_since_id": needed.next_since_id if needed else None})  # fmt: skip
    return [] if params.dry_run or "copy" not in plan.phases else shards_of(plan)


def _list_needed(runtime: SyncRuntime, source: S3Store) -> tuple[NeededPlan, list[Segment]]:
    """Write down which blocks the volume needs of the source, and count them."""
    from include.juicefs_storage.adapters.needed_files import NeededFiles

    params, metadata = runtime.params, runtime.metadata
    setting, next_since_id = metadata.read_setting(), watermark(metadata)
    chunks = below_prefix(setting, params.source_prefix)
    shard = shard_at(setting, source.endpoint, source.bucket)
    # Its own: a plan that is made again may find other blocks, and tasks of this one still read.
    name = f"needed-{uuid4().hex[:12]}"
    blocks = needed_objects(metadata, setting, params.since_id, shard)
    pages = to_pages(blocks, params.source_prefix, params.keys, key_filter(params.include, params.exclude))
    ruler = Ruler()
    track = ruler.track()
    for page in NeededFiles(manifests_folder(run_id()) / name).write(pages):
        ruler.add_page(track, page)
    plan = NeededPlan(
        volume=f"{setting.name} ({setting.uuid})",
        folder=name,
        chunks=chunks,
        sizes=ObjectSizes.of(setting),
        next_since_id=next_since_id,
        shard="" if shard is None else f"in bucket {source.bucket}, one of {setting.shards}",
    )
    return plan, ruler.segments()


def shards_of(plan: SyncPlan) -> list[dict[str, Any]]:
    """List what each task is given: the partitions, and the name in the grid."""
    given = []
    for group in task_groups(plan.partitions):
        first, held = plan.partitions[group[0]], [plan.partitions[index] for index in group]
        label = first.label
        if len(group) > 1:
            size = amount(sum(each.objects for each in held), sum(each.bytes for each in held))
            label = f"{group[0]:03}-{group[-1]:03} {first.where} {size}"
        given.append({"plan_id": plan.id, "partitions": group, "label": label})
    return given


def _recut(run: str) -> list[Segment]:
    """Read from the manifests of an earlier run what the source had; nothing is listed."""
    from include.juicefs_storage.adapters.manifests import ManifestReader

    plan = earlier_plan(run)
    ruler = Ruler()
    track = ruler.track()
    for partition in plan.partitions:
        file = manifests_folder(run) / plan.id / plan.phases[-1] / f"{partition.name}.parquet"
        if not file.exists():
            raise PermanentError(
                f"Param `recut_from`: run {run!r} left no manifest of partition {partition.index}.",
                next_step="give the id of a run that was complete, or leave `recut_from` empty",
            )
        for segment in _measured(ManifestReader(file), max(1, plan.objects // MAX_SEGMENTS)):
            ruler.add(track, segment)
    return ruler.segments()


def _measured(manifest: ManifestReader, step: int) -> Iterator[Segment]:
    for keys, sizes in manifest.listed():
        for first in range(0, len(keys), step):
            last = min(first + step, len(keys))
            yield Segment(keys[last - 1], last - first, sum(sizes[first:last]))

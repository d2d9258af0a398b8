"""The tasks of `juicefs_storage_sync`: check, plan, copy and verify by partitions, reconcile."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Collection, Iterator
from dataclasses import asdict, replace
from functools import cached_property
from typing import IO, TYPE_CHECKING, Any, cast
from uuid import uuid4

from airflow.sdk import TriggerRule, get_current_context

from include.juicefs_storage.copy import partitions as cutting
from include.juicefs_storage.copy.params import SyncParams, check_places
from include.juicefs_storage.copy.plan import NeededPlan, SyncPlan
from include.juicefs_storage.copy.reconcile import MEANING, SyncReport, about
from include.juicefs_storage.copy.reconcile import reconcile as join
from include.juicefs_storage.copy.run import Options, copy_partition, mirror_partition, verify_partition
from include.juicefs_storage.copy.scope import below_prefix, shard_at
from include.juicefs_storage.errors import PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.objects.merge import key_filter
from include.juicefs_storage.objects.model import Mirrored, ObjectOutcome
from include.juicefs_storage.objects.progress import Status
from include.juicefs_storage.objects.totals import Totals
from include.juicefs_storage.switch.params import resolve_params
from include.juicefs_storage.tasks.context import log, mask, pull, push, run_id
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.registry import read_registry
from include.juicefs_storage.tasks.runbook import COPY_POOL, runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.volume.comparison import NeededBlocks, still_needed
from include.juicefs_storage.volume.layout import ObjectSizes
from include.juicefs_storage.volume.needed import needed_objects, to_pages, watermark

if TYPE_CHECKING:
    from airflow.sdk import ObjectStoragePath

    from include.juicefs_storage.adapters.manifests import ManifestReader
    from include.juicefs_storage.adapters.mysql import MySqlMetadata
    from include.juicefs_storage.adapters.s3.store import S3Store
    from include.juicefs_storage.objects.model import Engine, MirrorTool

#: The folder for manifests: an URL such as `s3://<connection id>@<bucket>/<prefix>`, for the workers' environment.
MANIFESTS_ENV = "JUICEFS_STORAGE_MANIFESTS"
#: How many partitions of a run are worked on at once, for the DAG processor's environment; the pool limits all runs.
TASKS = int(os.environ.get("JUICEFS_STORAGE_SYNC_TASKS") or 8)
#: Compressed blocks that a task reads and decompresses at once: each is held in memory, 16 MiB at most.
_BLOCKS_AT_ONCE = 8
#: A store that is down for some minutes is no reason to have a person clear the task.
_RETRIES = {"retries": 3, "retry_exponential_backoff": True}


class SyncRuntime:
    """The two sides, the engines and the manifests of a run. Every secret value is registered with Airflow's masker."""

    def __init__(self, params: SyncParams) -> None:
        self.params = params

    def stores(self) -> tuple[S3Store, S3Store]:
        """Source and target, as their connections describe them."""
        from include.juicefs_storage.adapters.s3.store import S3Store

        params = self.params
        stores = (
            S3Store.from_connection(params.source_conn_id, params.source_bucket, params.source_prefix),
            S3Store.from_connection(params.target_conn_id, params.target_bucket, params.target_prefix),
        )
        for store in stores:
            mask(store.access_key, store.secret_key, store.session_token)
        return stores

    def engine(self, source: S3Store, target: S3Store, tasks: int) -> Engine:
        """Moves objects and compares contents.

        Args:
            source: Only read.
            target: Written to.
            tasks: How many there are, to share the bandwidth.
        """
        from include.juicefs_storage.adapters.s3.engine import NativeEngine

        return NativeEngine(source, target, self.params.concurrency, self._rate(tasks))

    def tool(self, source: S3Store, target: S3Store, tasks: int) -> MirrorTool | None:
        """The program that copies; None: the native engine does."""
        params, rate = self.params, self._rate(tasks)
        if params.engine == "juicefs":
            from include.juicefs_storage.adapters.tools.juicefs_sync import JuiceFSSync

            return JuiceFSSync(source, target, params.concurrency, rate, params.include, params.exclude)
        if params.engine == "mc":
            from include.juicefs_storage.adapters.tools.mc_mirror import McMirror

            return McMirror(source, target, rate, params.include, params.exclude)
        return None

    def find_tool(self) -> None:
        """Refuse an engine whose program is not on this worker.

        Raises:
            PermanentError: It is not.
        """
        from include.juicefs_storage.adapters.tools import juicefs_sync as juicefs
        from include.juicefs_storage.adapters.tools import mc_mirror as mc

        {"juicefs": juicefs.find, "mc": mc.find}.get(self.params.engine, str)()

    def _rate(self, tasks: int) -> float | None:
        """Bytes a second for one task of those that may run at once."""
        total = self.params.bandwidth_mib_s
        return total * 2**20 / max(1, min(tasks, TASKS)) if total else None

    @cached_property
    def metadata(self) -> MySqlMetadata:
        """The metadata database of the volume whose blocks are copied (plan=metadata)."""
        params = self.params
        named = {"volume": params.volume, "meta_conn_id": params.meta_conn_id}
        places = {"target_conn_id": params.target_conn_id, "target_bucket": params.target_bucket}
        return Runtime(resolve_params({**named, **places}, read_registry())).metadata

    def check_volume(self, source: S3Store) -> None:
        """The metadata is that of the volume whose objects lie at the source.

        Raises:
            PermanentError: It is another volume's, or the prefix or the bucket is not where it keeps its blocks.
        """
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        setting = self.metadata.read_setting()
        below_prefix(setting, self.params.source_prefix)
        shard_at(setting, source.endpoint, source.bucket)
        key = f"{setting.name}/juicefs_uuid"
        found = S3Bucket(replace(source, prefix="")).read(key)
        if found is not None and found.decode(errors="replace").strip() != setting.uuid:
            raise PermanentError(
                f"{key} on the source names another volume than the metadata, which is that of {setting.uuid}.",
                next_step="correct `volume` or `meta_conn_id`, or the source",
            )

    @property
    def options(self) -> Options:
        """How partitions are compared."""
        params = self.params
        return Options(params.compare, params.overwrite, params.include, params.exclude)


def manifests_folder(run: str) -> ObjectStoragePath:
    """The folder of a run's manifests.

    Raises:
        PermanentError: The environment names none.
    """
    from airflow.sdk import ObjectStoragePath

    root = os.environ.get(MANIFESTS_ENV)
    if not root:
        raise PermanentError(
            f"Expected the folder for manifests in the workers' environment, found no {MANIFESTS_ENV}.",
            next_step="set it to an URL such as s3://<connection id>@<bucket>/<prefix>, or file:///… on one machine",
        )
    return ObjectStoragePath(root) / re.sub(r"[^A-Za-z0-9._-]", "_", run)


@runbook_task
def check() -> dict[str, Any]:
    """Validate the params; both buckets can be listed; the engine and a place for the manifests are there.

    With plan=metadata: the metadata is that of the volume at the source.
    **Changes** nothing on either store; writes and removes one file in the folder of the manifests.
    **Safe to clear**: yes, with Downstream.
    """
    params = SyncParams.validated(get_current_context()["params"])
    runtime = SyncRuntime(params)
    source, target = runtime.stores()
    check_places(params, source.endpoint, target.endpoint)
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

    for store in (source, target):
        S3Bucket(store).check()
    if "copy" in params.mode:
        runtime.find_tool()
    if params.plan == "metadata":
        runtime.check_volume(source)
    folder = manifests_folder(run_id())
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / "writable"
    probe.write_bytes(b"")
    probe.unlink()
    if params.recut_from:
        _earlier_plan(params.recut_from)
    return params.model_dump(mode="json")


@runbook_task(**_RETRIES)
def plan_partitions() -> list[dict[str, Any]]:
    """Count the source's objects and bytes, and cut its keys into partitions of about the same work.

    With plan=metadata: the blocks that files refer to, which are written down beside the manifests for all tasks.
    The plan is in XCom `markdown` and, with every range, in `plan.json` beside the manifests.
    **Changes** nothing on either store. **Safe to clear**: yes, with Downstream: a source that is the same gives the
    same plan.
    """
    params = SyncParams.model_validate(pull("check"))
    runtime = SyncRuntime(params)
    source, target = runtime.stores()
    needed = None
    if params.plan == "metadata":
        needed, segments = _list_needed(runtime, source)
        cut_by, requests = "the metadata", 0
    elif params.recut_from:
        segments, cut_by, requests = _recut(params.recut_from), f"the manifests of {params.recut_from}", 0
    else:
        from include.juicefs_storage.adapters.s3.bucket import S3Bucket

        survey = cutting.Survey(S3Bucket(source), key_filter(params.include, params.exclude), tell=log.info)
        segments, requests = survey.run(params.keys), survey.calls
        cut_by = "a listing of the source"
    plan = SyncPlan(
        source=source.name,
        target=target.name,
        params=params,
        partitions=tuple(cutting.cut(segments, params.keys, 1 if params.engine == "mc" else params.partitions)),
        cut_by=cut_by,
        requests=requests,
        needed=needed,
    )
    file = manifests_folder(run_id()) / "plan.json"
    file.write_text(plan.model_dump_json())
    push("markdown", plan.to_markdown())
    push("summary", {"objects": plan.objects, "bytes": plan.bytes, "partitions": len(plan.partitions),
                     "requests": requests, "plan_id": plan.id,
                     "next_since_id": needed.next_since_id if needed else None})  # fmt: skip
    return [] if params.dry_run or "copy" not in plan.phases else _shards(plan)


def _list_needed(runtime: SyncRuntime, source: S3Store) -> tuple[NeededPlan, list[cutting.Segment]]:
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
    ruler = cutting.Ruler()
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


def _needed(plan: SyncPlan, runtime: SyncRuntime, source: S3Store) -> NeededBlocks | None:
    """What the volume needs, as the plan wrote it down; None where the plan is a listing's."""
    from include.juicefs_storage.adapters.compressed_blocks import CODECS, CompressedBlocks
    from include.juicefs_storage.adapters.needed_files import NeededFiles
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

    if plan.needed is None:
        return None
    sizes, params = plan.needed.sizes, plan.params
    # A size proves what is stored as it is, and nothing reads what is encrypted.
    read = params.compare == "content" and sizes.compression in CODECS and not sizes.encrypted
    concurrency = min(params.concurrency, _BLOCKS_AT_ONCE)
    blocks = CompressedBlocks(S3Bucket(source), sizes.compression, concurrency) if read else None
    return NeededBlocks(
        chunks=plan.needed.chunks,
        sizes=sizes,
        pages=NeededFiles(manifests_folder(run_id()) / plan.needed.folder).pages,
        still=still_needed(runtime.metadata),
        problems=blocks.problems if blocks else None,
        delta=bool(params.since_id),
    )


def _shards(plan: SyncPlan) -> list[dict[str, Any]]:
    """What each task is given: the partitions, and the name in the grid."""
    given = []
    for group in cutting.shards(plan.partitions):
        first, held = plan.partitions[group[0]], [plan.partitions[index] for index in group]
        label = first.label
        if len(group) > 1:
            size = cutting.amount(sum(each.objects for each in held), sum(each.bytes for each in held))
            label = f"{group[0]:03}-{group[-1]:03} {first.where} {size}"
        given.append({"plan_id": plan.id, "partitions": group, "label": label})
    return given


@runbook_task(
    pool=COPY_POOL,
    max_active_tis_per_dagrun=TASKS,
    map_index_template="{{ task.op_kwargs['shard']['label'] }}",
    **_RETRIES,
)
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
    plan = _plan()
    return [] if plan.params.dry_run or "verify" not in plan.phases else _shards(plan)


@runbook_task(
    pool=COPY_POOL,
    max_active_tis_per_dagrun=TASKS,
    map_index_template="{{ task.op_kwargs['shard']['label'] }}",
    **_RETRIES,
)
def verify(shard: dict[str, Any]) -> dict[str, Any]:
    """List both sides of a partition again, compare every object as `compare` says, write the manifest.

    A difference does not fail this task: it is in the manifest, and `finalize` fails.
    **Changes** nothing on either store. **Safe to clear**: yes, also alone; with Downstream for the report.
    """
    return _work("verify", shard)


def _work(phase: str, shard: dict[str, Any]) -> dict[str, Any]:
    """Copy or verify the partitions of one task, one after the other."""
    from include.juicefs_storage.adapters.manifests import ParquetManifest
    from include.juicefs_storage.adapters.s3.bucket import S3Bucket

    started, before_mib, plan = time.time(), _peak_mib(), _plan()
    if shard["plan_id"] != plan.id:
        raise PermanentError(
            f"Expected plan {shard['plan_id']}, found {plan.id}: the plan was made again since.",
            next_step="clear plan_partitions with Downstream",
        )
    runtime = SyncRuntime(plan.params)
    source, target = runtime.stores()
    tasks = len(cutting.shards(plan.partitions))
    engine, tool = runtime.engine(source, target, tasks), runtime.tool(source, target, tasks)
    sides, needed = (S3Bucket(source), S3Bucket(target)), _needed(plan, runtime, source)
    folder = manifests_folder(run_id()) / plan.id / phase
    totals = Totals()
    said: list[Mirrored] = []
    for index in shard["partitions"]:
        partition = plan.partitions[index]
        manifest = ParquetManifest(folder, partition.name, about(plan, phase, partition))
        status = Status(partition.label, partition.objects)
        if phase == "copy" and tool:
            counted, word = mirror_partition(*sides, engine, tool, partition.keys, manifest, runtime.options, status)
            said += [word] if word else []
        else:
            work = copy_partition if phase == "copy" else verify_partition
            counted = work(*sides, engine, partition.keys, manifest, runtime.options, status, needed)
        log.info("%s: %s", partition.label, counted.as_json())
        totals.merge(counted)
    result = {
        "totals": totals.as_json(),
        "span": [started, time.time()],
        "said": [_sentence(word) for word in said],
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


def _peak_mib() -> int:
    """The most memory that this process held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _sentence(said: Mirrored) -> str:
    """What a tool says that it did."""
    counts = {name: value for name, value in asdict(said).items() if name != "command" and value}
    return f"`{said.command}` says: {', '.join(f'{name} {value:,}' for name, value in counts.items())}"


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, **_RETRIES)
def reconcile() -> dict[str, Any]:
    """Join the plan with the manifests: every partition is accounted for, every difference is named in a file.

    Writes `report.json`, `report.md` and a CSV for each kind of difference beside the manifests.
    **Changes** nothing on either store. **Safe to clear**: yes, with Downstream.
    """
    plan = _plan()
    folder = manifests_folder(run_id()) / plan.id
    folder.mkdir(parents=True, exist_ok=True)
    if plan.params.dry_run:
        report = _planned(plan)
    else:
        spans = {phase: _spans(phase) for phase in plan.phases}

        def read(phase: str, partition: cutting.Partition) -> ManifestReader | None:
            from include.juicefs_storage.adapters.manifests import ManifestReader

            file = folder / phase / f"{partition.name}.parquet"
            return ManifestReader(file) if file.exists() else None

        def create(name: str) -> IO[str]:
            return cast("IO[str]", (folder / name).open("w", newline="", encoding="utf-8"))  # type: ignore[no-untyped-call]

        said = [word for result in _results("copy") for word in result.get("said", ())]

        def files_of(slice_ids: Collection[int]) -> Iterator[tuple[int, str]]:
            return SyncRuntime(plan.params).metadata.files_of(slice_ids)

        report = join(plan, run_id(), read, create, spans, said, files_of if plan.needed else None)
        report = report.model_copy(update={"files": tuple(str(folder / name) for name in report.files)})
    (folder / "report.json").write_text(report.model_dump_json(indent=1))
    (folder / "report.md").write_text(report.to_markdown())
    return report.model_dump(mode="json")


def _planned(plan: SyncPlan) -> SyncReport:
    return SyncReport(
        outcome="planned",
        meaning=MEANING["planned"],
        run_id=run_id(),
        source=plan.source,
        target=plan.target,
        params=plan.params.model_dump(mode="json"),
        objects=plan.objects,
        bytes=plan.bytes,
        partitions=len(plan.partitions),
        notes=tuple(partition.label for partition in plan.partitions[:100]),
        next_since_id=plan.needed.next_since_id if plan.needed else None,
    )


def _spans(phase: str) -> list[tuple[float, float]]:
    """Start and end of the tasks of a phase, of those that came to an end."""
    return [(span[0], span[1]) for result in _results(phase) if (span := result.get("span"))]


def _results(phase: str) -> list[dict[str, Any]]:
    """What the tasks of a phase returned, those that came to an end."""
    found = pull(phase) or []
    # Where a task was mapped over one value, Airflow hands over its result alone.
    return [result for result in (found if isinstance(found, list) else [found]) if result]


@runbook_task(
    trigger_rule=TriggerRule.ALL_DONE, retries=0, on_failure_callback=Notify("a copy is not proven to be complete")
)
def finalize() -> dict[str, Any]:
    """Tell the truth: the run is green only where every partition is accounted for and nothing is missing or different.

    **Changes** nothing. **Safe to clear**: yes. The report stands in XCom `report`, as Markdown in `markdown`.
    """
    found = pull("reconcile")
    if not found:
        push("markdown", f"## Failed\n{MEANING['failed']}")
        push("report", {"outcome": "failed", "meaning": MEANING["failed"]})
        push("note", f"failed: {MEANING['failed']}")
        raise PermanentError(f"failed: {MEANING['failed']}", next_step="see the log of the task that failed")
    report = SyncReport.model_validate(found)
    push("report", found)
    push("markdown", report.to_markdown())
    push("note", report.headline)
    if report.outcome not in {"proven", "planned"}:
        lines = "\n".join(f"- {problem}" for problem in report.problems)
        raise PermanentError(f"{report.outcome}: {report.meaning}\n{lines}")
    return {"outcome": report.outcome}


def _plan() -> SyncPlan:
    """The plan of this run, as plan_partitions wrote it down."""
    return _read_plan(run_id())


def _read_plan(run: str) -> SyncPlan:
    file = manifests_folder(run) / "plan.json"
    if not file.exists():
        raise PermanentError(
            f"Expected the plan of run {run} in {file}, found none.",
            next_step="clear plan_partitions with Downstream; all workers need the same folder for manifests",
        )
    return SyncPlan.model_validate_json(file.read_text())


def _earlier_plan(run: str) -> SyncPlan:
    try:
        return _read_plan(run)
    except StorageSwitchError:
        raise PermanentError(
            f"Param `recut_from`: run {run!r} left no plan in the folder for manifests.",
            next_step="give the id of an earlier run of this DAG, or leave `recut_from` empty",
        ) from None


def _recut(run: str) -> list[cutting.Segment]:
    """What the manifests of an earlier run tell about the source; nothing is listed."""
    from include.juicefs_storage.adapters.manifests import ManifestReader

    plan = _earlier_plan(run)
    ruler = cutting.Ruler()
    track = ruler.track()
    for partition in plan.partitions:
        file = manifests_folder(run) / plan.id / plan.phases[-1] / f"{partition.name}.parquet"
        if not file.exists():
            raise PermanentError(
                f"Param `recut_from`: run {run!r} left no manifest of partition {partition.index}.",
                next_step="give the id of a run that was complete, or leave `recut_from` empty",
            )
        for segment in _measured(ManifestReader(file), max(1, plan.objects // cutting.MAX_SEGMENTS)):
            ruler.add(track, segment)
    return ruler.segments()


def _measured(manifest: ManifestReader, step: int) -> Iterator[cutting.Segment]:
    for keys, sizes in manifest.listed():
        for first in range(0, len(keys), step):
            last = min(first + step, len(keys))
            yield cutting.Segment(keys[last - 1], last - first, sum(sizes[first:last]))

"""Join the plan with the manifests, and report how the run ended."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import IO, TYPE_CHECKING, Any, cast

from airflow.sdk import TriggerRule

from include.juicefs_storage.copy.partitions import Partition
from include.juicefs_storage.copy.plan import SyncPlan
from include.juicefs_storage.copy.reconcile import join_manifests
from include.juicefs_storage.copy.report import SYNC_MEANING, Span, SyncReport
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.tasks.context import pull, push, run_id, why_it_failed
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.sync.folder import manifests_folder, plan_of_run
from include.juicefs_storage.tasks.sync.runtime import RETRIES, SyncRuntime

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.manifests import ManifestReader


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, **RETRIES)
def reconcile() -> dict[str, Any]:
    """Join the plan with the manifests: every partition is accounted for, every difference is named in a file.

    Writes `report.json`, `report.md` and a CSV for each kind of difference beside the manifests.
    **Changes** nothing on either store. **Safe to clear**: yes, with Downstream.
    """
    plan = plan_of_run()
    folder = manifests_folder(run_id()) / plan.id
    folder.mkdir(parents=True, exist_ok=True)
    if plan.params.dry_run:
        report = _planned(plan)
    else:
        spans = {phase: _spans(phase) for phase in plan.phases}

        def read(phase: str, partition: Partition) -> ManifestReader | None:
            from include.juicefs_storage.adapters.manifests import ManifestReader

            file = folder / phase / f"{partition.name}.parquet"
            return ManifestReader(file) if file.exists() else None

        def create(name: str) -> IO[str]:
            return cast("IO[str]", (folder / name).open("w", newline="", encoding="utf-8"))  # type: ignore[no-untyped-call]

        said = [word for result in _results("copy") for word in result.get("said", ())]

        def files_of(slice_ids: Collection[int]) -> Iterator[tuple[int, str]]:
            return SyncRuntime(plan.params).metadata.files_of(slice_ids)

        report = join_manifests(plan, run_id(), read, create, spans, said, files_of if plan.needed else None)
        report = report.model_copy(update={"files": tuple(str(folder / name) for name in report.files)})
    (folder / "report.json").write_text(report.model_dump_json(indent=1))
    (folder / "report.md").write_text(report.to_markdown())
    return report.model_dump(mode="json")


def _planned(plan: SyncPlan) -> SyncReport:
    notes = tuple(partition.label for partition in plan.partitions[:100])
    return SyncReport.of(plan, run_id(), "planned", notes=notes)


def _spans(phase: str) -> list[Span]:
    """Collect the times of the tasks of a phase, of those that ended."""
    return [
        Span(span[0], span[1], result.get("estimated_s"), result.get("paused_s") or 0.0)
        for result in _results(phase)
        if (span := result.get("span"))
    ]


def _results(phase: str) -> list[dict[str, Any]]:
    """Collect what the tasks of a phase returned, of those that ended."""
    found = pull(phase) or []
    # Where a task was mapped over one value, Airflow hands over its result alone.
    return [result for result in (found if isinstance(found, list) else [found]) if result]


@runbook_task(
    trigger_rule=TriggerRule.ALL_DONE, retries=0, on_failure_callback=Notify("a copy is not proven to be complete")
)
def finalize() -> dict[str, Any]:
    """Tell the truth: the run is green only where every partition is accounted for and nothing is missing or different.

    **Changes** nothing. **Safe to clear**: yes. The report is in XCom `report`, as Markdown in `markdown`.
    """
    found = pull("reconcile")
    if not found:
        meaning = SYNC_MEANING["failed"]
        push("markdown", "\n".join(["## Failed", *why_it_failed(), meaning]))
        push("report", {"outcome": "failed", "meaning": meaning})
        push("note", f"failed: {meaning}")
        raise PermanentError(f"failed: {meaning}", next_step="see the log of the task that failed")
    report = SyncReport.model_validate(found)
    push("report", found)
    title, _, rest = report.to_markdown().partition("\n")
    green = report.outcome in {"proven", "planned"}
    push("markdown", "\n".join([title, *([] if green else why_it_failed()), rest]))
    push("note", report.headline)
    if not green:
        lines = "\n".join(f"- {problem}" for problem in report.problems)
        raise PermanentError(f"{report.outcome}: {report.meaning}\n{lines}")
    return {"outcome": report.outcome}

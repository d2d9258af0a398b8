"""The report of a copy, in the order in which a person asks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Self

from include.juicefs_storage.copy.partitions import amount
from include.juicefs_storage.copy.plan import SyncPlan
from include.juicefs_storage.markdown import bullets
from include.juicefs_storage.objects.model import ObjectOutcome
from include.juicefs_storage.objects.progress import duration, estimate_kept
from include.juicefs_storage.objects.totals import Totals
from include.juicefs_storage.records import Record

SyncOutcome = Literal["proven", "planned", "not proven", "failed"]

SYNC_MEANING: Mapping[SyncOutcome, str] = {
    "proven": "Every object of the source that was listed is on the target, compared as the table says.",
    "planned": "Dry run: nothing was changed. Trigger again with dry_run=false to carry the plan out.",
    "not proven": "Something is missing, different or not accounted for. See below for what, and for what to do. "
    "Nothing was deleted.",
    "failed": "The run ended before there was a result: see the failed task. Nothing was deleted.",
}
_PROVEN_BY_METADATA = (
    "Every block that files referred to when the plan was made{scope} is on the target, compared as the table says."
)
_PROVEN_BUT_DELETED = (
    "Every object of the source that was listed and not deleted is on the target, compared as the table says."
)
_MOVED = (ObjectOutcome.COPIED, ObjectOutcome.OVERWRITTEN)


class Span(NamedTuple):
    """The times of a task.

    Attributes:
        start: Unix time.
        end: Unix time.
        estimated_s: What its first ETA said that it takes, pauses left out; None: there was none.
        paused_s: For how long it was paused.
    """

    start: float
    end: float
    estimated_s: float | None = None
    paused_s: float = 0.0


class PhaseReport(Record):
    """The result of `copy` or `verify`.

    Attributes:
        totals: `outcome/comparison` -> objects, bytes.
        new: Objects that were written to the source after `copy` had listed it.
        fell_back: Compared by content although ETags were asked for.
        task_s: Seconds of all tasks together.
        wall_s: Seconds from the first task's start to the last one's end.
        grew: Objects more than the plan had counted, in the partitions with more.
        shrank: Objects fewer than the plan had counted, in the partitions with fewer.
        estimates: How many tasks had an ETA.
        estimated_s: What the first ETAs of these said that they take, in seconds of tasks, pauses left out.
        estimate_took_s: What these tasks took, pauses left out.
        paused_s: For how long tasks were paused, all of them together.
    """

    phase: str
    totals: dict[str, list[int]]
    new: int = 0
    fell_back: int = 0
    task_s: float = 0.0
    wall_s: float = 0.0
    grew: int = 0
    shrank: int = 0
    estimates: int = 0
    estimated_s: float = 0.0
    estimate_took_s: float = 0.0
    paused_s: float = 0.0

    def counted(self) -> Totals:
        """Return the totals."""
        return Totals.from_json(self.totals)


class SyncReport(Record):
    """The result of a run."""

    outcome: SyncOutcome
    meaning: str
    run_id: str
    source: str
    target: str
    params: dict[str, Any]
    objects: int
    bytes: int
    partitions: int
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    phases: tuple[PhaseReport, ...] = ()
    files: tuple[str, ...] = ()
    next_since_id: int | None = None

    @classmethod
    def of(cls, plan: SyncPlan, run_id: str, outcome: SyncOutcome, **found: Any) -> Self:
        """Build the report of a plan.

        Args:
            plan: The plan.
            run_id: The run.
            outcome: How the run ended.
            found: The other fields.
        """
        return cls(
            outcome=outcome,
            meaning=_meaning(plan, outcome),
            run_id=run_id,
            source=plan.source,
            target=plan.target,
            params=plan.params.model_dump(mode="json"),
            objects=plan.objects,
            bytes=plan.bytes,
            partitions=len(plan.partitions),
            next_since_id=plan.needed.next_since_id if plan.needed else None,
            **found,
        )

    @property
    def headline(self) -> str:
        """The report in a line: what was compared, and how much of it was copied, where that is known."""
        line = f"{self.outcome}: {amount(self.objects, self.bytes)} in {self.partitions} partitions"
        copies = [phase.counted() for phase in self.phases if phase.phase == "copy"]
        if not copies or self.params.get("engine") != "native":
            return line
        return f"{line}; copied: {amount(copies[0].objects(*_MOVED), copies[0].bytes(*_MOVED))}"

    def to_markdown(self) -> str:
        """Render the report for a person."""
        lines = [
            f"## {self.headline[0].upper()}{self.headline[1:]}",
            self.meaning,
            "",
            f"From `{self.source}` to `{self.target}`, engine {self.params.get('engine')}.",
            "",
        ]
        if self.problems:
            lines += ["### To be dealt with", *bullets(list(self.problems)), ""]
        for phase in self.phases:
            counted = phase.counted()
            lines += [f"### {phase.phase}", "| outcome | compared by | objects | bytes |", "|---|---|---|---|"]
            lines += [
                f"| {outcome} | {comparison or '-'} | {objects:,} | {size:,} |"
                for (outcome, comparison), (objects, size) in sorted(counted.counts.items())
            ]
            lines += ["", " ".join(filter(None, (_speed(phase, counted), _estimate(phase)))), ""]
        lines += ["### Worth knowing", *bullets(list(self.notes)), ""]
        if self.files:
            lines += ["### Files beside the manifests", *bullets([f"`{name}`" for name in self.files])]
        return "\n".join(lines)


def _speed(phase: PhaseReport, counted: Totals) -> str:
    moved = counted.bytes(*_MOVED)
    objects = counted.objects()
    wall = phase.wall_s or phase.task_s
    rate = f"{objects / wall:,.0f} objects/s, {moved / 2**20 / wall:,.1f} MiB/s copied" if wall else "no time measured"
    return f"{wall:,.1f} s from the first task's start to the last one's end, {phase.task_s:,.1f} s of tasks: {rate}."


def _estimate(phase: PhaseReport) -> str:
    """Hold the first ETAs against what came."""
    paused = f" Paused for {duration(phase.paused_s)}, all tasks together." if phase.paused_s else ""
    if not phase.estimates:
        return paused.strip()
    of_tasks = "" if phase.estimates == 1 else f", by the first ETAs of {phase.estimates} tasks together"
    return f"{estimate_kept(phase.estimated_s, phase.estimate_took_s).capitalize()}{of_tasks}.{paused}"


def _meaning(plan: SyncPlan, outcome: SyncOutcome) -> str:
    if outcome != "proven" or plan.needed is None:
        accepted = outcome == "proven" and plan.params.accept_deleted
        return _PROVEN_BUT_DELETED if accepted else SYNC_MEANING[outcome]
    scope = plan.needed.scope(plan.params.since_id)
    return _PROVEN_BY_METADATA.format(scope=f", {', '.join(scope)}," if scope else "")

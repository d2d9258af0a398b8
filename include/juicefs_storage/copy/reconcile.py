"""The plan joined with the manifests: every partition accounted for, every difference named, one report."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import IO, Any, Literal

from include.juicefs_storage.copy.manifest import ManifestRow, Reader
from include.juicefs_storage.copy.partitions import Partition, amount
from include.juicefs_storage.copy.plan import SyncPlan
from include.juicefs_storage.markdown import bullets
from include.juicefs_storage.objects.model import Comparison, ObjectOutcome
from include.juicefs_storage.objects.totals import Totals
from include.juicefs_storage.records import Record
from include.juicefs_storage.volume.layout import slice_of

Result = Literal["proven", "planned", "not proven", "failed"]

MEANING: dict[Result, str] = {
    "proven": "Every object of the source that was listed is on the target, compared as the table says.",
    "planned": "Dry run: nothing was changed. Trigger again with dry_run=false to carry the plan out.",
    "not proven": "Something is missing, different or not accounted for; what, and what to do, stands below. "
    "Nothing was deleted.",
    "failed": "The run ended before there was a result: see the failed task. Nothing was deleted.",
}
_PROVEN_BY_METADATA = (
    "Every block that files referred to when the plan was made{scope} is on the target, compared as the table says."
)
#: What a person has to do something about, and what.
_REMEDIES: dict[ObjectOutcome, str] = {
    ObjectOutcome.MISSING: "clear `copy` of these partitions with Downstream",
    ObjectOutcome.DIFFERENT: "find out which side is right; overwrite=true replaces the target's",
    ObjectOutcome.CHANGED: "clear `copy` of these partitions with Downstream: it copies what is there now",
    ObjectOutcome.FAILED: "see the column detail; clear `copy` (or `verify`) of these partitions with Downstream",
    ObjectOutcome.LOST: "neither side has what files refer to: restore these files from elsewhere, or delete them",
    ObjectOutcome.DAMAGED: "see the column detail: where the target's may be whole, leave it; else restore the files",
}
#: What is listed for people in a file of its own.
LISTED = (
    ObjectOutcome.MISSING, ObjectOutcome.DIFFERENT, ObjectOutcome.CHANGED, ObjectOutcome.FAILED,
    ObjectOutcome.VANISHED, ObjectOutcome.EXTRA, ObjectOutcome.OVERWRITTEN, ObjectOutcome.LOST, ObjectOutcome.DAMAGED,
)  # fmt: skip
_MOVED = (ObjectOutcome.COPIED, ObjectOutcome.OVERWRITTEN)
#: Missing on the target, but written to the source after `copy` had listed it.
NEW = "new"
#: Lost and damaged slices that are traced to files, and the files that are named in the report.
_TRACED_SLICES, _SHOWN_FILES = 10_000, 5
_COLUMNS = ("phase", "partition", "key", "size", "source_etag", "target_etag", "comparison", "detail")


def about(plan: SyncPlan, phase: str, partition: Partition) -> dict[str, str]:
    """What a manifest belongs to."""
    return {"plan": plan.id, "phase": phase, "partition": partition.name}


class PhaseReport(Record):
    """What `copy` or `verify` came to.

    Attributes:
        totals: `outcome/comparison` -> objects, bytes.
        new: Objects that the source got after `copy` had listed it.
        fell_back: Compared by content although ETags were asked for.
        task_s: Seconds of all tasks together.
        grew: Objects more than the plan had counted, in the partitions where there were more.
        shrank: Objects fewer.
    """

    phase: str
    totals: dict[str, list[int]]
    new: int = 0
    fell_back: int = 0
    task_s: float = 0.0
    wall_s: float = 0.0
    grew: int = 0
    shrank: int = 0

    def counted(self) -> Totals:
        """The totals, to be asked."""
        return Totals.from_json(self.totals)


class SyncReport(Record):
    """What a run came to, in the order in which a person asks."""

    outcome: Result
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

    @property
    def headline(self) -> str:
        """The report in a line: what was looked at, and what of it was copied, where that is known."""
        line = f"{self.outcome}: {amount(self.objects, self.bytes)} in {self.partitions} partitions"
        copies = [phase.counted() for phase in self.phases if phase.phase == "copy"]
        if not copies or self.params.get("engine") != "native":
            return line
        return f"{line}; copied: {amount(copies[0].objects(*_MOVED), copies[0].bytes(*_MOVED))}"

    def to_markdown(self) -> str:
        """The report for a person."""
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
            lines += ["", _speed(phase, counted), ""]
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


def reconcile(
    plan: SyncPlan,
    run_id: str,
    read: Callable[[str, Partition], Reader | None],
    create: Callable[[str], IO[str]],
    spans: dict[str, list[tuple[float, float]]] | None = None,
    said: Iterable[str] = (),
    files_of: Callable[[Collection[int]], Iterable[tuple[int, str]]] | None = None,
) -> SyncReport:
    """Join the plan with the manifests: streaming, no more than a row group in memory.

    Args:
        plan: What was to be done.
        run_id: Of the run.
        read: A finished manifest by phase and partition; None where there is none.
        create: Opens a new file for people beside the manifests, by its name.
        spans: Phase -> start and end of its tasks in Unix time, where known.
        said: What the tools of another engine say that they did, for the report alone.
        files_of: Which files refer to some slices (see ports.MetadataStore); None: there is no metadata to ask.

    Raises:
        PermanentError: A manifest cannot be read.
    """
    problems: list[str] = []
    notes: list[str] = []
    with ExitStack() as stack:
        files = _Files(create, stack)
        phases = [
            _phase(plan, phase, read, files, problems, notes, (spans or {}).get(phase, [])) for phase in plan.phases
        ]
        if files_of:
            _trace(plan, read, files, problems, files_of)
    return SyncReport(
        outcome="not proven" if problems else "proven",
        meaning=_meaning(plan, problems),
        run_id=run_id,
        source=plan.source,
        target=plan.target,
        params=plan.params.model_dump(mode="json"),
        objects=plan.objects,
        bytes=plan.bytes,
        partitions=len(plan.partitions),
        problems=tuple(problems),
        notes=(*notes, *said, *_next_delta(plan)),
        phases=tuple(phases),
        files=tuple(files.names),
        next_since_id=plan.needed.next_since_id if plan.needed else None,
    )


def _meaning(plan: SyncPlan, problems: list[str]) -> str:
    if problems or plan.needed is None:
        return MEANING["not proven" if problems else "proven"]
    scope = plan.needed.scope(plan.params.since_id)
    return _PROVEN_BY_METADATA.format(scope=f", {', '.join(scope)}," if scope else "")


def _next_delta(plan: SyncPlan) -> list[str]:
    if plan.needed is None:
        return []
    return [f"The blocks of what is written from now on: a run with `since_id={plan.needed.next_since_id}`."]


def _trace(
    plan: SyncPlan,
    read: Callable[[str, Partition], Reader | None],
    files: _Files,
    problems: list[str],
    files_of: Callable[[Collection[int]], Iterable[tuple[int, str]]],
) -> None:
    """Name the files whose blocks are lost or damaged, by the last phase."""
    keys: dict[int, list[str]] = {}
    for partition in plan.partitions:
        manifest = read(plan.phases[-1], partition)
        for row in manifest.rows((ObjectOutcome.LOST, ObjectOutcome.DAMAGED)) if manifest else ():
            if len(keys) < _TRACED_SLICES:
                keys.setdefault(slice_of(row.key), []).append(row.key)
    if not keys:
        return
    paths: dict[str, None] = {}
    for slice_id, path in files_of(keys):
        paths[path] = None
        for key in keys[slice_id]:
            files.write("lost_files", (path, key), ("file", "key"))
    shown = ", ".join(f"`{path}`" for path in list(paths)[:_SHOWN_FILES])
    problems.append(f"{len(paths):,} files have lost or damaged blocks (`lost_files.csv`), such as {shown}.")


def _phase(
    plan: SyncPlan,
    phase: str,
    read: Callable[[str, Partition], Reader | None],
    files: _Files,
    problems: list[str],
    notes: list[str],
    spans: list[tuple[float, float]],
) -> PhaseReport:
    totals = Totals()
    absent: list[int] = []
    empty: list[int] = []
    where: dict[ObjectOutcome, list[int]] = {}
    new = grew = shrank = 0
    for partition in plan.partitions:
        manifest = read(phase, partition)
        if manifest is None or manifest.about()[0] != about(plan, phase, partition):
            absent.append(partition.index)
            continue
        counted = manifest.count()
        # With metadata, what the target alone has is something that the plan had counted.
        found = counted.objects() - counted.objects(ObjectOutcome.SKIPPED if plan.needed else ObjectOutcome.EXTRA)
        grew += max(0, found - partition.objects)
        shrank += max(0, partition.objects - found)
        if partition.objects and not found:
            empty.append(partition.index)
        differing = [outcome for outcome in LISTED if counted.objects(outcome)]
        for outcome in differing:
            where.setdefault(outcome, []).append(partition.index)
        if differing:
            known = _copied_keys(plan, partition, read) if phase == "verify" else None
            unknown = _write_rows(phase, partition, manifest.rows(differing), known, files)
            new += unknown[0]
            if unknown[0]:
                _move_to_new(counted, *unknown)
                if not counted.objects(ObjectOutcome.MISSING):
                    where[ObjectOutcome.MISSING].remove(partition.index)
        totals.merge(counted)
    if absent:
        problems.append(
            f"{len(absent)} of {len(plan.partitions)} partitions have no finished manifest of `{phase}`: "
            f"{_numbers(absent)}. Clear `{phase}` of these with Downstream."
        )
    if empty:
        problems.append(
            f"Partitions {_numbers(empty)}: the plan had counted objects, `{phase}` found none. "
            "Look at the source, then start a new run."
        )
    for outcome, remedy in _REMEDIES.items():
        if count := totals.objects(outcome):
            problems.append(
                f"{count:,} objects are {outcome} after `{phase}`, in partitions {_numbers(where[outcome])} "
                f"(`{outcome}.csv`): {remedy}."
            )
    notes += _notes(phase, totals, new, grew, shrank, plan)
    fell_back = totals.compared_by(Comparison.CONTENT) if plan.params.compare == "etag" else 0
    if spans:
        totals.seconds = sum(end - start for start, end in spans)
    return PhaseReport(
        phase=phase,
        totals=totals.as_json(),
        new=new,
        fell_back=fell_back,
        task_s=round(totals.seconds, 1),
        wall_s=round(max((end for _, end in spans), default=0) - min((start for start, _ in spans), default=0), 1),
        grew=grew,
        shrank=shrank,
    )


def _notes(phase: str, totals: Totals, new: int, grew: int, shrank: int, plan: SyncPlan) -> list[str]:
    notes = []
    for count, text in (
        (
            totals.objects(ObjectOutcome.VANISHED),
            "objects left the source between its listing and the copy (`vanished.csv`)",
        ),
        (totals.objects(ObjectOutcome.EXTRA), "objects are on the target alone (`extra.csv`); they were left alone"),
        (totals.objects(ObjectOutcome.OVERWRITTEN), "objects were different and were overwritten (`overwritten.csv`)"),
        (totals.objects(ObjectOutcome.SKIPPED), "objects are blocks that no file refers to; they were left alone"),
        (new, "objects were written to the source after `copy` had listed it (`new.csv`): a new run copies them"),
        (grew, "objects more than the plan had counted were found on the source"),
        (shrank, "objects fewer than the plan had counted were found on the source"),
    ):
        if count:
            notes.append(f"`{phase}`: {count:,} {text}.")
    by_content = totals.compared_by(Comparison.CONTENT)
    if plan.params.compare == "etag" and by_content:
        notes.append(f"`{phase}`: the ETags of {by_content:,} objects cannot be compared; their contents were.")
    return notes


def _copied_keys(
    plan: SyncPlan, partition: Partition, read: Callable[[str, Partition], Reader | None]
) -> Iterator[str] | None:
    """The keys that `copy` of this run had listed, in order; None where it did not run."""
    manifest = read("copy", partition) if "copy" in plan.phases else None
    return (row.key for row in manifest.rows(tuple(ObjectOutcome))) if manifest else None


def _write_rows(
    phase: str, partition: Partition, rows: Iterable[ManifestRow], known: Iterator[str] | None, files: _Files
) -> tuple[int, int]:
    """Write rows for people; returns objects and bytes of those that are new since the copy."""
    count = size = 0
    last = next(known, None) if known else None
    for row in rows:
        name = row.outcome
        if name == ObjectOutcome.MISSING and not row.comparison and known is not None:
            while last is not None and last < row.key:
                last = next(known, None)
            if last != row.key:
                name, count, size = NEW, count + 1, size + row.size
        values = [row.key, row.size, row.source_etag, row.target_etag, row.comparison, row.detail or ""]
        files.write(name, [phase, partition.index, *values])
    return count, size


def _move_to_new(counted: Totals, objects: int, size: int) -> None:
    kind = (ObjectOutcome.MISSING, Comparison.NONE)
    left = counted.counts[kind][0] - objects, counted.counts[kind][1] - size
    if left[0]:
        counted.counts[kind] = left
    else:
        del counted.counts[kind]


class _Files:
    """CSV files, made when the first row comes."""

    def __init__(self, create: Callable[[str], IO[str]], stack: ExitStack) -> None:
        self._create, self._stack = create, stack
        self._writers: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        return [f"{name}.csv" for name in self._writers]

    def write(self, name: str, row: Sequence[object], columns: Sequence[str] = _COLUMNS) -> None:
        if name not in self._writers:
            file = self._stack.enter_context(self._create(f"{name}.csv"))
            self._writers[name] = csv.writer(file)
            self._writers[name].writerow(columns)
        self._writers[name].writerow(row)


def _numbers(indexes: list[int]) -> str:
    shown = ", ".join(map(str, indexes[:20]))
    return shown + (f" and {len(indexes) - 20} more" if len(indexes) > 20 else "")

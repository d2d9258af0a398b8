"""Join the plan with the manifests: every partition is accounted for, every difference is named, in one report."""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, Any

from include.juicefs_storage.copy.manifest import WRITTEN_SINCE, ManifestRow, Reader
from include.juicefs_storage.copy.partitions import Partition
from include.juicefs_storage.copy.plan import SyncPlan
from include.juicefs_storage.copy.report import PhaseReport, Span, SyncReport
from include.juicefs_storage.objects.model import Comparison, ObjectOutcome
from include.juicefs_storage.objects.totals import Totals
from include.juicefs_storage.volume.comparison import UNNEEDED
from include.juicefs_storage.volume.layout import slice_of

_CLEAR = "clear `copy` of these partitions with Downstream"
_CLEAR_VERIFY = "clear `verify` of these partitions with Downstream"
_WHICH = "find out which side is right; a copy with overwrite=true replaces the target's"
_AGAIN = f"one of the two sides was changed meanwhile: find out by whom, then {_CLEAR}: it overwrites again"
_RESTORE = "neither side has what files refer to: restore these files from elsewhere, or delete them"
_DAMAGED = "see the column detail: where the target's may be whole, leave it; else restore the files"
#: Outcomes that need a person, and the next step: where this run copies, and where it only compares.
_REMEDIES: dict[ObjectOutcome, tuple[str, str]] = {
    ObjectOutcome.MISSING: (_CLEAR, "start a run with mode=copy+verify"),
    ObjectOutcome.DIFFERENT: (_WHICH, _WHICH),
    ObjectOutcome.CHANGED: (f"{_CLEAR}: it copies what is there now", _CLEAR_VERIFY),
    ObjectOutcome.FAILED: (f"see the column detail; {_CLEAR}", f"see the column detail; {_CLEAR_VERIFY}"),
    ObjectOutcome.LOST: (_RESTORE, _RESTORE),
    ObjectOutcome.DAMAGED: (_DAMAGED, _DAMAGED),
}
#: Outcomes whose objects are listed in a CSV.
LISTED = (
    ObjectOutcome.MISSING, ObjectOutcome.DIFFERENT, ObjectOutcome.CHANGED, ObjectOutcome.FAILED,
    ObjectOutcome.VANISHED, ObjectOutcome.EXTRA, ObjectOutcome.OVERWRITTEN, ObjectOutcome.LOST, ObjectOutcome.DAMAGED,
)  # fmt: skip
#: What `copy` left on the target of what the source listed; and such objects that `verify` found on neither side.
_LEFT = (ObjectOutcome.SAME, ObjectOutcome.COPIED, ObjectOutcome.OVERWRITTEN, ObjectOutcome.DIFFERENT)
_GONE = "gone"
#: Missing on the target, but written to the source after `copy` had listed it.
NEW = "new"
#: The detail of an object that is missing, and older than the plan, though `copy` had no row for it.
_LEFT_OUT = "the listing of `copy` left it out"
#: Lost and damaged slices that are traced to files, and the files that are named in the report.
_TRACED_SLICES, _SHOWN_FILES = 10_000, 5
_COLUMNS = ("phase", "partition", "key", "size", "source_etag", "target_etag", "comparison", "detail")


def about(plan: SyncPlan, phase: str, partition: Partition) -> dict[str, str]:
    """Describe what a manifest belongs to.

    Args:
        plan: The plan of the run.
        phase: `copy` or `verify`.
        partition: One of the plan.
    """
    return {"plan": plan.id, "phase": phase, "partition": partition.name}


def join_manifests(
    plan: SyncPlan,
    run_id: str,
    read: Callable[[str, Partition], Reader | None],
    create: Callable[[str], IO[str]],
    spans: dict[str, list[Span]] | None = None,
    said: Iterable[str] = (),
    files_of: Callable[[Collection[int]], Iterable[tuple[int, str]]] | None = None,
) -> SyncReport:
    """Join the plan with the manifests: streaming, with no more than a row group in memory.

    Args:
        plan: The plan of the run.
        run_id: The run.
        read: Opens a finished manifest by phase and partition; returns None where there is none.
        create: Opens a new file for people beside the manifests, by its name.
        spans: Phase -> the times of its tasks, where known.
        said: What the tools of another engine say that they did, for the report alone.
        files_of: Which files refer to some slices (see ports.MetadataStore); None: there is no metadata to ask.

    Raises:
        PermanentError: A manifest cannot be read.
    """
    with ExitStack() as stack:
        join = _Join(plan, read, _Files(create, stack))
        phases = [join.phase(name) for name in plan.phases]
        problems = [problem for phase in phases for problem in phase.problems(plan, begun=phases[0].ended())]
        if files_of:
            problems += join.trace(files_of)
        files = join.files.names
    compare = plan.params.compare
    notes = [note for phase in phases for note in phase.notes(compare)]
    return SyncReport.of(
        plan,
        run_id,
        "not proven" if problems else "proven",
        problems=tuple(problems),
        notes=(*notes, *said, *_next_delta(plan)),
        phases=tuple(phase.report(compare, (spans or {}).get(phase.name, [])) for phase in phases),
        files=tuple(files),
    )


def _next_delta(plan: SyncPlan) -> list[str]:
    if plan.needed is None:
        return []
    return [f"The blocks of what is written from now on: a run with `since_id={plan.needed.next_since_id}`."]


@dataclass
class _Phase:
    """What the manifests of `copy` or `verify` hold, over all partitions.

    Attributes:
        name: `copy` or `verify`.
        absent: Partitions without a finished manifest of this plan.
        empty: Partitions where the plan had counted objects, and none was found.
        where: Outcome -> the partitions that have it.
        new: See PhaseReport, as `grew` and `shrank`.
        gone: Objects that `copy` left on the target and `verify` found on neither side.
        gone_in: The partitions that had them.
        vanished: Objects that left the source between listing and copy. Not those in `unneeded`.
        vanished_in: The partitions that had them.
        unneeded: Blocks that VANISHED, and that no file refers to any more.
        deleted: Objects that the plan had counted and that neither side had when `copy` listed them, at least.
        deleted_in: The partitions that had them.
    """

    name: str
    totals: Totals = field(default_factory=Totals)
    absent: list[int] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    where: dict[ObjectOutcome, list[int]] = field(default_factory=dict)
    new: int = 0
    grew: int = 0
    shrank: int = 0
    gone: int = 0
    gone_in: list[int] = field(default_factory=list)
    vanished: int = 0
    vanished_in: list[int] = field(default_factory=list)
    unneeded: int = 0
    deleted: int = 0
    deleted_in: list[int] = field(default_factory=list)

    def add(self, partition: Partition, counted: Totals, found: int, unneeded: int) -> None:
        """Add a partition.

        Args:
            partition: The partition.
            counted: Its manifest's rows, counted.
            found: How many of them the plan had counted as well.
            unneeded: How many of those that VANISHED no file refers to any more.
        """
        self.unneeded += unneeded
        if vanished := counted.objects(ObjectOutcome.VANISHED) - unneeded:
            self.vanished += vanished
            self.vanished_in.append(partition.index)
        # What the target has as well may be among those that the plan had counted.
        if found and (deleted := partition.objects - counted.objects()) > 0:
            self.deleted += deleted
            self.deleted_in.append(partition.index)
        self.grew += max(0, found - partition.objects)
        self.shrank += max(0, partition.objects - found)
        if partition.objects and not found:
            self.empty.append(partition.index)
        for outcome in _listed(counted):
            self.where.setdefault(outcome, []).append(partition.index)
        self.totals.merge(counted)

    def ended(self) -> bool:
        """Return whether no task of the phase failed: without that the next phase has no tasks."""
        return not self.absent and not self.totals.objects(ObjectOutcome.CHANGED, ObjectOutcome.FAILED)

    def problems(self, plan: SyncPlan, *, begun: bool) -> list[str]:
        """Return what a person must act on, one sentence each, with what can be done in this run.

        Args:
            plan: Of the run.
            begun: Whether the run's first phase ended well, so that the second has tasks.
        """
        found = []
        if self.absent:
            remedy = f"Clear `{self.name}` of these with Downstream."
            if self.name != plan.phases[0] and not begun:
                remedy = f"It begins when `{plan.phases[0]}` has ended well."
            found.append(
                f"{len(self.absent)} of {len(plan.partitions)} partitions have no finished manifest of `{self.name}`: "
                f"{_numbers(self.absent)}. {remedy}"
            )
        if self.empty:
            found.append(
                f"Partitions {_numbers(self.empty)}: the plan had counted objects, `{self.name}` found none. "
                "Look at the source, then start a new run."
            )
        if self.gone:
            found.append(
                f"{self.gone:,} objects that `copy` left on the target were found on neither side by `{self.name}`, in "
                f"partitions {_numbers(self.gone_in)} (`{_GONE}.csv`). Look at who deletes on the target, then start a "
                "new run."
            )
        if not plan.params.accept_deleted:
            found += self._deletions(plan)
        for outcome, remedies in _REMEDIES.items():
            remedy = remedies["copy" not in plan.phases]
            if outcome is ObjectOutcome.DIFFERENT and plan.params.overwrite and "copy" in plan.phases:
                remedy = _AGAIN
            if count := self.totals.objects(outcome):
                found.append(
                    f"{count:,} objects are {outcome} after `{self.name}`, in partitions "
                    f"{_numbers(self.where[outcome])} (`{outcome}.csv`): {remedy}."
                )
        return found

    def _deletions(self, plan: SyncPlan) -> list[str]:
        """Return what left the source since it was listed, one sentence each, with what to do."""
        again = (
            "That is ordinary where files are deleted meanwhile; else find out who deletes. Start a new run with the "
            "same params: it lists again, and copies only what differs."
        )
        if "copy" in plan.phases:
            again += " Where the source never stands still: accept_deleted=true."
        found = []
        if self.vanished:
            found.append(
                f"{self.vanished:,} objects left the source after `{self.name}` had listed it, in partitions "
                f"{_numbers(self.vanished_in)} (`{ObjectOutcome.VANISHED}.csv`): they were not copied or compared. "
                f"{again}"
            )
        # The counts of another run are older; and what was gone when `copy` listed, `verify` need not say again.
        if self.deleted and self.name == "copy" and not plan.params.recut_from:
            found.append(
                f"{self.deleted:,} objects that the plan had counted were on neither side when `copy` listed them, in "
                f"partitions {_numbers(self.deleted_in)}. {again}"
            )
        return found

    def notes(self, compare: str) -> list[str]:
        """Return what a person may want to know, one sentence each.

        Args:
            compare: The param.
        """
        objects = self.totals.objects
        counts = (
            (self.vanished, "objects left the source after it was listed (`vanished.csv`)"),
            (self.unneeded, "blocks were deleted after they were listed, and no file refers to them (`vanished.csv`)"),
            (objects(ObjectOutcome.EXTRA), "objects are on the target alone (`extra.csv`); they were left alone"),
            (objects(ObjectOutcome.OVERWRITTEN), "objects were different and were overwritten (`overwritten.csv`)"),
            (objects(ObjectOutcome.SKIPPED), "objects are blocks that no file refers to; they were left alone"),
            (
                self.new,
                "objects were written to the source after `copy` had listed it (`new.csv`): a new run copies them",
            ),
            (self.grew, "objects more than the plan had counted were found on the source"),
            (self.shrank, "objects fewer than the plan had counted were found on the source"),
            (
                self._fell_back(compare),
                "objects have ETags that cannot be compared; their contents were compared",
            ),
        )
        return [f"`{self.name}`: {count:,} {text}." for count, text in counts if count]

    def report(self, compare: str, spans: Sequence[Span]) -> PhaseReport:
        """Return the phase as the report shows it.

        Args:
            compare: The param.
            spans: The times of its tasks, where known.
        """
        if spans:
            self.totals.seconds = sum(span.end - span.start for span in spans)
        first, last = min((span.start for span in spans), default=0.0), max((span.end for span in spans), default=0.0)
        estimates = [
            (span.estimated_s, span.end - span.start - span.paused_s) for span in spans if span.estimated_s is not None
        ]
        return PhaseReport(
            phase=self.name,
            totals=self.totals.as_json(),
            new=self.new,
            fell_back=self._fell_back(compare),
            task_s=round(self.totals.seconds, 1),
            wall_s=round(last - first, 1),
            grew=self.grew,
            shrank=self.shrank,
            estimates=len(estimates),
            estimated_s=round(sum(estimated for estimated, _ in estimates), 1),
            estimate_took_s=round(sum(took for _, took in estimates), 1),
            paused_s=round(sum(span.paused_s for span in spans), 1),
        )

    def _fell_back(self, compare: str) -> int:
        return self.totals.compared_by(Comparison.CONTENT) if compare == "etag" else 0


@dataclass(frozen=True)
class _Join:
    """Reads the manifests of a plan, and writes the rows that differ into files for people."""

    plan: SyncPlan
    read: Callable[[str, Partition], Reader | None]
    files: _Files

    def phase(self, name: str) -> _Phase:
        """Read the manifests of a phase."""
        phase = _Phase(name)
        for partition in self.plan.partitions:
            manifest = self.read(name, partition)
            if manifest is None or manifest.about()[0] != about(self.plan, name, partition):
                phase.absent.append(partition.index)
                continue
            counted = manifest.count()
            # With metadata the plan had counted what only the target has as well.
            uncounted = ObjectOutcome.SKIPPED if self.plan.needed else ObjectOutcome.EXTRA
            found = counted.objects() - counted.objects(uncounted)
            unneeded = 0
            if outcomes := _listed(counted):
                objects, size, unneeded = self._write_rows(name, partition, manifest.rows(outcomes))
                phase.new += objects
                _take_out_new(counted, objects, size)
            if name == "verify" and (gone := self._write_gone(partition, manifest, counted.objects())):
                phase.gone += gone
                phase.gone_in.append(partition.index)
            phase.add(partition, counted, found, unneeded)
        return phase

    def _write_gone(self, partition: Partition, verified: Reader, objects: int) -> int:
        """Name what `copy` left on the target and `verify` found on neither side; return how many there are.

        Args:
            partition: The partition.
            verified: Its manifest of `verify`.
            objects: How many objects that has, without those that are new since the copy.
        """
        # With metadata such a block is `lost`, or no file refers to it any more.
        copied = self.read("copy", partition) if "copy" in self.plan.phases and not self.plan.needed else None
        # Rows are read only where there are fewer than there were.
        if copied is None or copied.count().objects(*_LEFT, ObjectOutcome.EXTRA) <= objects:
            return 0
        found = (row.key for row in verified.rows(tuple(ObjectOutcome)))
        gone, last = 0, next(found, None)
        for row in copied.rows(_LEFT):
            while last is not None and last < row.key:
                last = next(found, None)
            if last != row.key:
                gone += 1
                values = [row.key, row.size, row.source_etag, row.target_etag, row.comparison, row.detail or ""]
                self.files.write(_GONE, ["verify", partition.index, *values])
        return gone

    def trace(self, files_of: Callable[[Collection[int]], Iterable[tuple[int, str]]]) -> list[str]:
        """Name the files whose blocks are lost or damaged, by any phase: one sentence, or none."""
        keys: dict[int, dict[str, None]] = {}
        for name in self.plan.phases:
            for partition in self.plan.partitions:
                manifest = self.read(name, partition)
                for row in manifest.rows((ObjectOutcome.LOST, ObjectOutcome.DAMAGED)) if manifest else ():
                    if len(keys) < _TRACED_SLICES:
                        keys.setdefault(slice_of(row.key), {})[row.key] = None
        if not keys:
            return []
        paths: dict[str, None] = {}
        for slice_id, path in files_of(keys):
            paths[path] = None
            for key in keys[slice_id]:
                self.files.write("lost_files", (path, key), ("file", "key"))
        shown = ", ".join(f"`{path}`" for path in list(paths)[:_SHOWN_FILES])
        return [f"{len(paths):,} files have lost or damaged blocks (`lost_files.csv`), such as {shown}."]

    def _write_rows(self, phase: str, partition: Partition, rows: Iterable[ManifestRow]) -> tuple[int, int, int]:
        """Write rows for people.

        Args:
            phase: `copy` or `verify`.
            partition: The partition.
            rows: Those that are worth a look.

        Returns:
            Objects and bytes of those that are new since the copy; how many VANISHED, and no file refers to them.
        """
        count = size = unneeded = 0
        known = self._copied_keys(partition) if phase == "verify" else None
        last = next(known, None) if known else None
        for row in rows:
            name, detail = row.outcome, row.detail or ""
            if name == ObjectOutcome.MISSING and not row.comparison and known is not None:
                while last is not None and last < row.key:
                    last = next(known, None)
                if last != row.key and detail == WRITTEN_SINCE:
                    name, count, size = NEW, count + 1, size + row.size
                elif last != row.key:
                    detail = _LEFT_OUT
            unneeded += name == ObjectOutcome.VANISHED and detail == UNNEEDED
            values = [row.key, row.size, row.source_etag, row.target_etag, row.comparison, detail]
            self.files.write(name, [phase, partition.index, *values])
        return count, size, unneeded

    def _copied_keys(self, partition: Partition) -> Iterator[str] | None:
        """Return the keys that `copy` of this run had listed, in order; None where it did not run."""
        manifest = self.read("copy", partition) if "copy" in self.plan.phases else None
        return (row.key for row in manifest.rows(tuple(ObjectOutcome))) if manifest else None


def _listed(counted: Totals) -> list[ObjectOutcome]:
    return [outcome for outcome in LISTED if counted.objects(outcome)]


def _take_out_new(counted: Totals, objects: int, size: int) -> None:
    """Count no object as missing that is new since the copy."""
    kind = (ObjectOutcome.MISSING, Comparison.NONE)
    if not objects:
        return
    left = counted.counts[kind][0] - objects, counted.counts[kind][1] - size
    if left[0]:
        counted.counts[kind] = left
    else:
        del counted.counts[kind]


class _Files:
    """CSV files; each is created with its first row."""

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

"""The plan against the manifests: nothing is green that was not looked at."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import IO

import pytest

from include.juicefs_storage.adapters.manifests import ManifestReader, ParquetManifest
from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.copy.partitions import Partition, cut_partitions
from include.juicefs_storage.copy.plan import NeededPlan, SyncPlan
from include.juicefs_storage.copy.reconcile import about, join_manifests
from include.juicefs_storage.copy.report import SyncReport
from include.juicefs_storage.copy.run import Options, Transfer
from include.juicefs_storage.copy.segments import Segment
from include.juicefs_storage.copy.survey import Survey
from include.juicefs_storage.objects.comparison import Rows
from include.juicefs_storage.objects.model import Comparison, Copied, KeyRange, Listed, ObjectOutcome, Page
from include.juicefs_storage.volume.comparison import NeededBlocks
from include.juicefs_storage.volume.layout import ObjectSizes
from include.juicefs_storage.volume.needed import to_pages
from tests.support.copy_fakes import MemoryBucket, MemoryEngine
from tests.support.fakes import FakeMetadata, setting

PLANNED = datetime(2026, 1, 31, 9, tzinfo=UTC)


class Run:
    """A copy in memory whose manifests are real."""

    def __init__(self, folder: Path, source: dict[str, bytes], target: dict[str, bytes], **params: object) -> None:
        self.folder, self.source, self.target = folder, MemoryBucket(source), MemoryBucket(target)
        self.engine = MemoryEngine(self.source, self.target)
        given = {"source_conn_id": "a", "source_bucket": "one", "target_conn_id": "b", "target_bucket": "two"}
        self.params: SyncParams = SyncParams.validated({**given, **params})
        segments = Survey(self.source, listers=2).run(KeyRange())
        self.plan = SyncPlan(
            source="one at a", target="two at b", params=self.params, cut_by="a listing",
            partitions=tuple(cut_partitions(segments, KeyRange(), 4)), made_at=PLANNED,
        )  # fmt: skip

    def work(self, phase: str, indexes: range | list[int]) -> None:
        transfer = Transfer(self.source, self.target, self.engine, Options(self.params.compare), since=PLANNED)
        work = transfer.copy if phase == "copy" else transfer.verify
        for index in indexes:
            partition = self.plan.partitions[index]
            manifest = ParquetManifest(self.folder / phase, partition.name, about(self.plan, phase, partition))
            work(partition.keys, manifest)

    def report(self) -> SyncReport:
        def read(phase: str, partition: Partition) -> ManifestReader | None:
            file = self.folder / phase / f"{partition.name}.parquet"
            return ManifestReader(file) if file.exists() else None

        def create(name: str) -> IO[str]:
            return (self.folder / name).open("w", newline="")

        return join_manifests(self.plan, "run", read, create)

    def listed(self, name: str) -> list[str]:
        with (self.folder / f"{name}.csv").open(newline="") as file:
            return [row["key"] for row in csv.DictReader(file)]


def bodies(count: int) -> dict[str, bytes]:
    return {f"k{number:03}": b"x" * (number + 1) for number in range(count)}


ALL = range(4)


def test_everything_copied_and_compared_is_proven(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), {"k0005": b"theirs"})
    run.work("copy", ALL)
    run.work("verify", ALL)
    report = run.report()
    assert (report.outcome, report.problems) == ("proven", ())
    assert report.phases[0].totals == {"copied/etag": [40, 820], "extra/": [1, 6]}
    assert report.phases[1].totals == {"same/etag": [40, 820], "extra/": [1, 6]}
    assert run.listed("extra") == ["k0005", "k0005"]
    text = report.to_markdown()
    assert text.startswith("## Proven: 40 objects, 820 B in 4 partitions; copied: 40 objects, 820 B\n")
    assert "| same | etag | 40 | 820 |" in text
    assert "on the target alone (`extra.csv`)" in text


@pytest.mark.parametrize("phase", ["copy", "verify"])
def test_a_partition_that_never_ran_is_a_failure(phase: str, tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), {})
    run.work("copy", [0, 1, 3] if phase == "copy" else ALL)
    run.work("verify", [0, 1, 3] if phase == "verify" else ALL)
    report = run.report()
    assert report.outcome == "not proven"
    assert f"1 of 4 partitions have no finished manifest of `{phase}`: 2. Clear" in report.problems[0]


def test_a_manifest_of_another_plan_counts_for_nothing(tmp_path: Path) -> None:
    other = Run(tmp_path, bodies(40), {}, compare="size")
    other.work("copy", ALL)
    run = Run(tmp_path, bodies(40), {}, mode="copy")
    assert "4 of 4 partitions have no finished manifest" in run.report().problems[0]


def test_a_partition_that_runs_again_and_is_killed_is_not_accounted_for_by_its_earlier_pass(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), {}, mode="copy")
    run.work("copy", ALL)
    assert run.report().outcome == "proven"
    partition = run.plan.partitions[1]
    ParquetManifest(tmp_path / "copy", partition.name, about(run.plan, "copy", partition)).resume()
    assert run.report().outcome == "not proven"


def test_zero_objects_where_some_were_expected_is_a_failure(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), {}, mode="copy")
    run.source.objects.clear()
    run.work("copy", ALL)
    report = run.report()
    assert "the plan had counted objects, `copy` found none" in report.problems[0]
    assert report.phases[0].shrank == 40


def test_differences_are_named_with_what_to_do(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), bodies(40) | {"k007": b"y" * 8, "k030": b"short"}, mode="verify")
    del run.target.objects["k012"]
    run.work("verify", ALL)
    report = run.report()
    assert report.outcome == "not proven"
    assert [problem.split(":")[0] for problem in report.problems] == [
        "1 objects are missing after `verify`, in partitions 1 (`missing.csv`)",
        "2 objects are different after `verify`, in partitions 0, 3 (`different.csv`)",
    ]
    assert "`copy`" not in " ".join(report.problems), "there is no such task in this run"
    assert "start a run with mode=copy+verify" in report.problems[0]
    assert run.listed("missing") == ["k012"]
    assert run.listed("different") == ["k007", "k030"]
    assert report.phases[0].fell_back == 1


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("mode", ["copy", "verify", "copy+verify"])
@pytest.mark.parametrize("seen", [{"copy"}, {"verify"}, {"copy", "verify"}, set()])
def test_every_remedy_is_possible_in_the_run(mode: str, overwrite: bool, seen: set[str], tmp_path: Path) -> None:
    """No task is to be cleared that the run does not have, or that has not begun; no param that is set already."""
    run = Run(tmp_path, bodies(40), bodies(40), mode=mode, overwrite=overwrite)
    for phase in seen & set(run.plan.phases):
        for partition in run.plan.partitions:
            manifest, rows = (
                ParquetManifest(tmp_path / phase, partition.name, about(run.plan, phase, partition)),
                Rows(),
            )
            for outcome in ObjectOutcome:
                rows.add([f"{partition.after}{outcome}"], [1], [""], [""], outcome, Comparison.SIZE)
            manifest.append(rows)
            manifest.finish()
    tasks = set(run.plan.phases)
    if "copy" in tasks and "verify" not in seen:
        tasks -= {"verify"}  # `copy` failed
    report = run.report()
    for sentence in report.problems + report.notes:
        assert set(re.findall(r"[Cc]lear `(\w+)`", sentence)) <= tasks, sentence
        assert not (overwrite and mode != "verify" and "overwrite=true" in sentence), sentence
    assert len(report.problems) >= 1


def test_what_was_written_after_the_copys_listing_is_new_and_not_missing(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), {})
    run.work("copy", ALL)
    run.source.write("k0105", b"written meanwhile", PLANNED)
    del run.target.objects["k011"]
    run.work("verify", ALL)
    report = run.report()
    assert run.listed("new") == ["k0105"]
    assert run.listed("missing") == ["k011"]
    assert report.phases[1].new == 1
    assert report.phases[1].totals["missing/"] == [1, 12]
    run.target.objects["k011"] = run.source.objects["k011"]
    run.work("verify", ALL)
    report = run.report()
    assert (report.outcome, report.phases[1].grew) == ("proven", 1)


@pytest.mark.parametrize("modified", [format_datetime(PLANNED - timedelta(seconds=1), usegmt=True), "", "long ago"])
def test_what_the_listing_of_the_copy_left_out_is_missing_and_not_new(tmp_path: Path, modified: str) -> None:
    """As servers do that skip a key where a page or a range begins."""
    run = Run(tmp_path, bodies(40), {})
    run.source.objects["k0105"] = b"there all the time"
    run.source.modified["k0105"] = modified
    hidden, run.source.hidden = run.source.hidden, {"k0105"}
    run.work("copy", ALL)
    run.source.hidden = hidden
    run.work("verify", ALL)
    report = run.report()
    assert report.outcome == "not proven"
    assert run.listed("missing") == ["k0105"]
    assert "the listing of `copy` left it out" in (tmp_path / "missing.csv").read_text()


class Deleting(MemoryEngine):
    """Some of the source's objects are deleted after they were listed, and before they are read."""

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        for key in ("k003", "k033"):
            self.source.objects.pop(key, None)
        return super().copy(objects, overwrite=overwrite)


@pytest.mark.parametrize("mode", ["copy", "copy+verify"])
def test_what_was_listed_and_vanished_is_green_only_where_that_is_accepted(mode: str, tmp_path: Path) -> None:
    def run(folder: str, **params: object) -> Run:
        made = Run(tmp_path / folder, bodies(40), {}, mode=mode, **params)
        made.engine = Deleting(made.source, made.target)
        for phase in made.plan.phases:
            made.work(phase, ALL)
        return made

    red = run("red")
    report = red.report()
    assert (report.outcome, red.listed("vanished")) == ("not proven", ["k003"])
    assert (
        "1 objects left the source after `copy` had listed it, in partitions 0 (`vanished.csv`)" in report.problems[0]
    )
    assert "Start a new run with the same params" in report.problems[0]
    # Deleted while another partition was copied: the plan had counted it, and no listing of `copy` has it.
    assert "1 objects that the plan had counted were on neither side" in report.problems[1]
    assert "partitions 3. That is ordinary" in report.problems[1]
    accepted = run("accepted", accept_deleted=True)
    report = accepted.report()
    assert (report.outcome, accepted.listed("vanished")) == ("proven", ["k003"])
    assert "listed and not deleted is on" in report.meaning
    assert "1 objects left the source after it was listed" in report.notes[0]


def test_what_left_the_source_and_is_on_the_target_is_no_deletion_to_accept(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), bodies(40), mode="copy")
    del run.source.objects["k005"]
    run.work("copy", ALL)
    assert (run.report().outcome, run.listed("extra")) == ("proven", ["k005"])


def test_what_came_and_went_since_the_copy_is_not_missing(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), {}, accept_deleted=True)
    run.work("copy", ALL)
    found = run.source.pages

    def pages(keys: KeyRange) -> Iterator[Page]:
        run.source.pages = found  # type: ignore[method-assign]  # at the second look it is gone
        run.source.write("k0105", b"for a moment", PLANNED)
        listed = list(found(keys))
        del run.source.objects["k0105"]
        yield from listed

    for index in ALL:
        run.source.pages = pages  # type: ignore[method-assign]
        run.work("verify", [index])
    assert (run.report().outcome, run.listed("vanished")) == ("proven", ["k0105"])
    run.plan = run.plan.model_copy(update={"params": run.params.model_copy(update={"accept_deleted": False})})
    assert run.report().outcome == "not proven"


def test_what_both_sides_lost_since_the_copy_is_not_proven(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), {"k021x": b"theirs", "k022x": b"theirs"})
    run.work("copy", ALL)
    del run.source.objects["k020"], run.target.objects["k021x"]
    run.work("verify", ALL)
    assert run.report().outcome == "proven"  # the target has it, and what was theirs does not count
    del run.target.objects["k020"]
    run.work("verify", ALL)
    report = run.report()
    assert report.outcome == "not proven"
    assert "1 objects that `copy` left on the target were found on neither side by `verify`" in report.problems[0]
    assert "partitions 2" in report.problems[0]
    assert run.listed("gone") == ["k020"]


def test_objects_that_failed_are_named(tmp_path: Path) -> None:
    run = Run(tmp_path, bodies(40), {}, mode="copy")
    run.engine.fails = {"k020"}
    run.work("copy", ALL)
    report = run.report()
    assert "1 objects are failed after `copy`" in report.problems[0]
    assert run.listed("failed") == ["k020"]


def test_an_empty_source_is_proven_to_be_empty(tmp_path: Path) -> None:
    run = Run(tmp_path, {}, {})
    run.work("copy", range(1))
    run.work("verify", range(1))
    assert run.report().outcome == "proven"


def test_the_plan_is_another_one_when_anything_in_it_is(tmp_path: Path) -> None:
    one = Run(tmp_path, bodies(40), {}).plan
    assert one.id == SyncPlan.model_validate_json(one.model_dump_json()).id
    assert one.id != Run(tmp_path, bodies(40), {}, overwrite=True).plan.id
    assert one.id != Run(tmp_path, bodies(41), {}).plan.id
    assert "| 3 | after `k029` |" in one.to_markdown()


def block(slice_id: int, length: int = 1) -> str:
    return f"chunks/0/{slice_id // 1000}/{slice_id}_0_{length}"


def test_lost_blocks_make_the_report_red_and_name_the_files(tmp_path: Path) -> None:
    params = SyncParams(
        source_conn_id="a", source_bucket="one", target_conn_id="b", target_bucket="two", plan="metadata",
        meta_conn_id="m", mode="verify",
    )  # fmt: skip
    blocks = {block(number): 1 for number in range(1, 6)}
    plan = SyncPlan(
        source="one", target="two", params=params, cut_by="the metadata",
        partitions=tuple(cut_partitions([Segment(block(5), 5, 5)], KeyRange(), 1)),
        needed=NeededPlan(volume="myjfs", folder="needed", chunks="chunks/", sizes=ObjectSizes(), next_since_id=77),
    )  # fmt: skip
    both = MemoryBucket(dict.fromkeys(blocks, b"1") | {block(9): b"1"})
    del both.objects[block(2)]
    both.objects[block(3)] = b"cut"
    folder = tmp_path / plan.id / "verify"
    manifest = ParquetManifest(folder, "00000", about(plan, "verify", plan.partitions[0]))
    Transfer(
        both,
        both,
        MemoryEngine(both, both),
        needed=NeededBlocks(
            "chunks/", ObjectSizes(), lambda keys: to_pages(iter(sorted(blocks.items())), keys=keys), set
        ),
    ).verify(KeyRange(), manifest)

    written: dict[str, io.StringIO] = {}

    class Kept(io.StringIO):
        def close(self) -> None:
            pass

    report = join_manifests(
        plan, "run", lambda phase, partition: ManifestReader(folder / "00000.parquet"),
        lambda name: written.setdefault(name, Kept()), files_of=FakeMetadata(setting()).files_of,
    )  # fmt: skip
    assert report.outcome == "not proven"
    assert report.next_since_id == 77
    assert [problem.partition(" after")[0] for problem in report.problems[:2]] == [
        "1 objects are lost",
        "1 objects are damaged",
    ]
    assert report.problems[2] == "2 files have lost or damaged blocks (`lost_files.csv`), such as `/file-2`, `/file-3`."
    assert written["lost_files.csv"].getvalue().split() == [
        "file,key", f"/file-2,{block(2)}", f"/file-3,{block(3)}",
    ]  # fmt: skip
    assert "1 objects are blocks that no file refers to" in " ".join(report.notes)
    assert "| the next delta | `since_id=77` |" in plan.to_markdown()
    assert plan.needed
    assert plan.needed.scope(0) == []
    sharded = plan.needed.model_copy(update={"shard": "in bucket data-1, one of 3"})
    assert sharded.scope(5) == ["of slices from id 5 on", "in bucket data-1, one of 3"]

"""One partition: what becomes of each key, what is written down, and what a killed try leaves to the next."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from include.juicefs_storage.adapters.manifests import ManifestReader, ParquetManifest
from include.juicefs_storage.copy import run
from include.juicefs_storage.copy.manifest import ManifestRow
from include.juicefs_storage.copy.run import Options, Transfer
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.comparison import Rows
from include.juicefs_storage.objects.flow import Flow
from include.juicefs_storage.objects.model import (
    Compared,
    Comparison,
    Copied,
    KeyRange,
    Listed,
    Mirrored,
    ObjectOutcome,
    Page,
)
from include.juicefs_storage.objects.progress import Status
from tests.support.copy_fakes import KilledError, MemoryBucket, MemoryEngine

ALL = KeyRange()


def manifest_in(folder: Path, about: str = "plan") -> ParquetManifest:
    return ParquetManifest(folder, "00000", {"plan": about})


def rows_of(folder: Path) -> dict[str, ManifestRow]:
    rows = list(ManifestReader(folder / "00000.parquet").rows(tuple(ObjectOutcome)))
    assert [row.key for row in rows] == sorted(row.key for row in rows)
    return {row.key: row for row in rows}


def sides(source: dict[str, bytes], target: dict[str, bytes]) -> tuple[MemoryBucket, MemoryBucket, MemoryEngine]:
    one, other = MemoryBucket(source, "source"), MemoryBucket(target, "target")
    return one, other, MemoryEngine(one, other)


def test_only_what_is_missing_is_copied_and_nothing_else_is_touched(tmp_path: Path) -> None:
    source, target, engine = sides(
        {"a": b"1", "b": b"2", "c": b"3", "d": b"44", "e": b"5", "z": b""},
        {"b": b"2", "c": b"x", "d": b"4", "da": b"theirs", "zz": b"theirs"},
    )
    before = dict(target.objects)
    totals = Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path))
    assert engine.copied == ["a", "e", "z"]
    assert target.objects == {**before, "a": b"1", "e": b"5", "z": b""}
    outcomes = {key: (row.outcome, row.comparison) for key, row in rows_of(tmp_path).items()}
    assert outcomes == {
        "a": ("copied", "etag"),
        "b": ("same", "etag"),
        "c": ("different", "content"),
        "d": ("different", "size"),
        "da": ("extra", ""),
        "e": ("copied", "etag"),
        "z": ("copied", "etag"),
        "zz": ("extra", ""),
    }
    assert rows_of(tmp_path)["d"].detail == "2 bytes on the source, 1 on the target"
    assert totals.objects() == 8
    assert totals.objects(ObjectOutcome.COPIED) == 3
    assert totals.bytes(ObjectOutcome.COPIED) == 2
    assert totals.compared_by(Comparison.CONTENT) == 1
    assert ManifestReader(tmp_path / "00000.parquet").count().counts == totals.counts


def test_overwrite_replaces_what_is_different_and_nothing_else(tmp_path: Path) -> None:
    source, target, engine = sides({"a": b"1", "b": b"22", "c": b"3"}, {"a": b"x", "b": b"2", "c": b"3", "d": b"4"})
    totals = Transfer(source, target, engine, Options(overwrite=True)).copy(ALL, manifest_in(tmp_path))
    assert engine.copied == ["a", "b"]
    assert target.objects == {"a": b"1", "b": b"22", "c": b"3", "d": b"4"}
    assert totals.objects(ObjectOutcome.OVERWRITTEN) == 2


@pytest.mark.parametrize(
    ("compare", "outcome", "compared"),
    [("size", ("same", "size"), 0), ("etag", ("different", "content"), 1), ("content", ("different", "content"), 2)],
)
def test_the_comparison_that_was_asked_for(
    compare: str, outcome: tuple[str, str], compared: int, tmp_path: Path
) -> None:
    source, target, engine = sides({"a": b"1", "b": b"2"}, {"a": b"x", "b": b"2"})
    Transfer(source, target, engine, Options(compare=compare)).verify(ALL, manifest_in(tmp_path))  # type: ignore[arg-type]
    found = rows_of(tmp_path)
    assert (found["a"].outcome, found["a"].comparison) == outcome
    assert found["b"].comparison == {"size": "size", "etag": "etag", "content": "content"}[compare]
    assert len(engine.compared) == compared


def test_etags_that_are_no_md5_are_not_trusted(tmp_path: Path) -> None:
    """A foreign server's ETags may be equal over contents that are not."""
    foreign = {"a": "0" * 32, "b": "1" * 32}
    source, target, engine = sides({"a": b"1", "b": b"2"}, {"a": b"x", "b": b"2"})
    source.etags, target.etags = dict(foreign), dict(foreign)
    totals = Transfer(source, target, engine).verify(ALL, manifest_in(tmp_path))
    assert totals.objects(ObjectOutcome.DIFFERENT) == 1
    assert totals.compared_by(Comparison.CONTENT) == 2
    assert source.hashed == ["a"], "one sample"


def test_multipart_etags_are_compared_by_content_and_the_rest_by_etag(tmp_path: Path) -> None:
    bodies = {key: key.encode() for key in "abcdef"}
    source, target, engine = sides(dict(bodies), dict(bodies))
    source.etags = target.etags = {"c": "0" * 32 + "-2"}
    totals = Transfer(source, target, engine).verify(ALL, manifest_in(tmp_path))
    assert engine.compared == ["c"]
    assert totals.counts == {
        (ObjectOutcome.SAME, Comparison.ETAG): (5, 5),
        (ObjectOutcome.SAME, Comparison.CONTENT): (1, 1),
    }


def test_objects_that_tell_nothing_do_not_decide_for_the_rest(tmp_path: Path) -> None:
    """The first page holds an upload in parts and an empty object."""
    bodies = {"a": b"parts", "b": b"", "d": b"4", "e": b"5"}
    source, target, engine = sides(dict(bodies), dict(bodies))
    source.page_keys = target.page_keys = 2
    source.etags = target.etags = {"a": "0" * 32 + "-2"}
    totals = Transfer(source, target, engine).verify(ALL, manifest_in(tmp_path))
    assert engine.compared == ["a", "b"]
    assert totals.compared_by(Comparison.ETAG) == 2


def test_an_empty_page_is_not_the_end(tmp_path: Path) -> None:
    source, target, engine = sides({"a": b"1", "b": b"2"}, {})
    pages = list(source.pages(ALL))
    source.pages = lambda keys: iter([Page([], [], []), *pages])  # type: ignore[method-assign]
    assert Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path)).objects() == 2


def test_verification_writes_nothing(tmp_path: Path) -> None:
    source, target, engine = sides({"a": b"1", "b": b"2"}, {"b": b"x"})
    totals = Transfer(source, target, engine, Options(overwrite=True)).verify(ALL, manifest_in(tmp_path))
    assert engine.copied == []
    assert (totals.objects(ObjectOutcome.MISSING), totals.objects(ObjectOutcome.DIFFERENT)) == (1, 1)


def test_patterns_and_ranges_leave_keys_alone_on_both_sides(tmp_path: Path) -> None:
    source, target, engine = sides(
        {"a/1": b"1", "a/2.tmp": b"2", "b/1": b"3", "c/1": b"4", "d": b"5"}, {"a/9.tmp": b"9", "c/2": b"8"}
    )
    options = Options(include=("a/*", "c/*"), exclude=("*.tmp",))
    Transfer(source, target, engine, options).copy(KeyRange("a", "c/1"), manifest_in(tmp_path))
    assert {key: row.outcome for key, row in rows_of(tmp_path).items()} == {"a/1": "copied", "c/1": "copied"}


def test_what_vanishes_changes_or_fails_is_named(tmp_path: Path) -> None:
    source, target, engine = sides({"a": b"1", "b": b"2", "c": b"3", "d": b"4"}, {})
    engine.fails = {"d"}
    found = list(source.pages(ALL))
    del source.objects["b"]
    source.objects["c"] = b"333"
    listings, pages = [iter(found)], source.pages
    source.pages = lambda keys: listings.pop() if listings else pages(keys)  # type: ignore[method-assign]
    Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path))
    rows = rows_of(tmp_path)
    assert {key: row.outcome for key, row in rows.items()} == {
        "a": "copied", "b": "vanished", "c": "changed", "d": "failed",
    }  # fmt: skip
    assert rows["d"].detail == "refused"


def test_a_killed_try_leaves_the_next_only_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "BATCH_KEYS", 10)
    bodies = {f"{number:03}": b"x" * number for number in range(100)}
    source, target, engine = sides(dict(bodies), {})
    source.page_keys = target.page_keys = 7
    engine.dies_after = 45
    with pytest.raises(KilledError):
        Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path))
    assert not (tmp_path / "00000.parquet").exists()
    checkpoints = len(list((tmp_path / "00000").iterdir()))
    assert checkpoints >= 3

    source.lists, engine.dies_after = 0, None
    totals = Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path))
    assert target.objects == bodies
    assert sorted(engine.copied) == sorted(bodies), "no object was copied twice"
    assert source.lists <= 11, "what is written down is not listed again"
    assert totals.objects() == 100
    assert list(rows_of(tmp_path)) == sorted(bodies)
    assert list((tmp_path / "00000").iterdir()) == []
    # A complete partition runs again when it is cleared.
    totals = Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path))
    assert totals.objects(ObjectOutcome.SAME) == 100
    assert len(engine.copied) == 100


def test_checkpoints_of_another_plan_are_refused(tmp_path: Path) -> None:
    source, target, engine = sides({"a": b"1"}, {})
    unfinished = manifest_in(tmp_path)
    unfinished.finish = lambda: None  # type: ignore[method-assign]
    Transfer(source, target, engine).copy(ALL, unfinished)
    with pytest.raises(PermanentError, match="expected a checkpoint of"):
        Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path, "another"))


def test_a_manifest_that_is_damaged_is_not_read_as_less(tmp_path: Path) -> None:
    source, target, engine = sides({"a": b"1"}, {})
    Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path))
    file = tmp_path / "00000.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(PermanentError, match="cannot be read"):
        ManifestReader(file).count()


def test_nothing_at_all_is_a_manifest_too(tmp_path: Path) -> None:
    source, target, engine = sides({}, {})
    assert Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path)).objects() == 0
    assert rows_of(tmp_path) == {}


class SilentTool:
    """A tool that skips one key and says nothing of it."""

    name = "tool"

    def __init__(self, source: MemoryBucket, target: MemoryBucket) -> None:
        self.source, self.target, self.runs = source, target, 0

    def mirror(self, keys: KeyRange, *, compare: str, overwrite: bool) -> Mirrored:
        self.runs += 1
        left_out = max(self.source.objects)
        for key, body in self.source.objects.items():
            if key != left_out:
                self.target.objects.setdefault(key, body)
        return Mirrored("tool", found=3, copied=3)


def test_no_tools_word_is_trusted(tmp_path: Path) -> None:
    source, target, engine = sides({"a": b"1", "b": b"2", "c": b"3"}, {})
    tool = SilentTool(source, target)
    totals, said = Transfer(source, target, engine).mirror(tool, ALL, manifest_in(tmp_path))
    assert said == "`tool` says: found 3, copied 3"
    assert {key: row.outcome for key, row in rows_of(tmp_path).items()} == {"a": "same", "b": "same", "c": "copied"}
    assert target.objects == source.objects
    totals, said = Transfer(source, target, engine).mirror(tool, ALL, manifest_in(tmp_path))
    assert (totals.objects(ObjectOutcome.SAME), said, tool.runs) == (3, "", 1)


@pytest.mark.parametrize("key", ["x/", "a//b", "/a", "a/./b", "../a", "a/..", "e\u0301"])
@pytest.mark.parametrize("side", ["source", "target", "left out"])
def test_no_tool_is_run_where_a_key_may_be_taken_for_another(tmp_path: Path, key: str, side: str) -> None:
    source, target, engine = sides({"a": b"1"}, {})
    (target if side == "target" else source).objects[key] = b"2"
    tool = SilentTool(source, target)
    options = Options(exclude=(key,)) if side == "left out" else Options()
    _, said = Transfer(source, target, engine, options).mirror(tool, ALL, manifest_in(tmp_path))
    assert tool.runs == 0
    assert f"may take a key such as {key!r} for another one" in said
    assert rows_of(tmp_path)["a"].outcome == "copied"


@dataclass
class Unreadable(MemoryEngine):
    """Finds none of these keys on the source, as a layer does that reads `x/` as `x`."""

    unreadable: frozenset[str] = frozenset()

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        done = super().copy(objects, overwrite=overwrite)
        gone = Copied(ObjectOutcome.VANISHED)
        return [gone if listed[0] in self.unreadable else copied for listed, copied in zip(objects, done, strict=True)]

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        return [
            Compared(ObjectOutcome.VANISHED) if listed[0] in self.unreadable else compared
            for listed, compared in zip(objects, super().compare(objects), strict=True)
        ]


@pytest.mark.parametrize("target", [{}, {"x/": b"12", "y": b"12"}])
def test_what_the_source_lists_and_does_not_have_is_no_object_that_vanished(
    tmp_path: Path, target: dict[str, bytes]
) -> None:
    source, copy = MemoryBucket({"x": b"1", "x/": b"12", "x/y": b"1"}), MemoryBucket(target)
    engine = Unreadable(source, copy, unreadable=frozenset({"x/"}))
    totals = Transfer(source, copy, engine, Options(compare="content")).copy(ALL, manifest_in(tmp_path))
    assert totals.objects(ObjectOutcome.VANISHED) == 0
    assert rows_of(tmp_path)["x/"].outcome == "failed"
    assert rows_of(tmp_path)["x/"].detail == "the source has it, and answers 404 when it is read"


@dataclass
class Late(Unreadable):
    """Finds none of these keys at first, as a store does that another site still writes to."""

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        found = super().copy(objects, overwrite=overwrite)
        self.unreadable = frozenset()
        return found


def test_what_is_there_when_it_is_asked_for_again_is_copied(tmp_path: Path) -> None:
    source, target = MemoryBucket({"x": b"1", "y": b"2"}), MemoryBucket()
    engine = Late(source, target, unreadable=frozenset({"x"}))
    totals = Transfer(source, target, engine).copy(ALL, manifest_in(tmp_path))
    assert totals.objects(ObjectOutcome.COPIED) == 2
    assert target.objects == source.objects


def test_what_a_listing_still_has_and_head_does_not_is_unreadable(tmp_path: Path) -> None:
    source, target = MemoryBucket({"x": b"1"}), MemoryBucket()
    source.head = lambda key: None  # type: ignore[method-assign]
    Transfer(source, target, Unreadable(source, target, unreadable=frozenset({"x"}))).copy(ALL, manifest_in(tmp_path))
    assert rows_of(tmp_path)["x"].outcome == "failed"


class Folding(MemoryBucket):
    """Keeps `a//b` as `a/b`, as stores on a file system do."""

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        self.objects = {key.replace("//", "/"): body for key, body in self.objects.items()}
        return super().pages(keys)


def test_what_the_target_keeps_under_another_key_is_not_copied(tmp_path: Path) -> None:
    source, target = MemoryBucket({"a//b": b"1", "a/c": b"2", "d": b"3"}), Folding()
    transfer = Transfer(source, target, MemoryEngine(source, target), lists_copied=True)
    transfer.copy(ALL, manifest_in(tmp_path))
    rows = rows_of(tmp_path)
    assert {key: row.outcome for key, row in rows.items()} == {"a//b": "failed", "a/c": "copied", "d": "copied"}
    assert "the target does not list it" in str(rows["a//b"].detail)


def test_what_was_copied_is_listed_once_more_and_no_more_than_that(tmp_path: Path) -> None:
    bodies = {f"k{number:03}": b"x" for number in range(100)}
    source, target, engine = sides(dict(bodies), {key: body for key, body in bodies.items() if key != "k050"})
    for confirmed in (False, True):
        target.objects.pop("k050", None)
        target.lists, target.page_keys = 0, 10
        Transfer(source, target, engine, lists_copied=confirmed).copy(ALL, manifest_in(tmp_path))
        assert target.lists <= 11 + 2 * confirmed


def test_the_status_counts_each_object_once_also_where_it_is_compared_before_it_is_copied(tmp_path: Path) -> None:
    source, target, engine = sides(
        {"a": b"1", "b": b"22", "c": b"333", "d": b"4444"}, {"a": b"1", "b": b"xx", "zz": b"theirs"}
    )
    flow = Flow()
    status = Status("all", objects=4, bytes=10, flow=flow)

    def counted(objects: Sequence[Listed]) -> None:
        for _, size, _ in objects:
            flow.done(size)

    copy, compare = engine.copy, engine.compare

    def counted_copy(objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        counted(objects)
        return copy(objects, overwrite=overwrite)

    def counted_compare(objects: Sequence[Listed]) -> list[Compared]:
        counted(objects)
        found = compare(objects)
        target.objects.pop("b", None)
        return [item._replace(outcome=ObjectOutcome.MISSING) if key == "b" else item
                for (key, _, _), item in zip(objects, found, strict=True)]  # fmt: skip

    engine.copy, engine.compare = counted_copy, counted_compare  # type: ignore[method-assign]
    seen: list[int] = []
    manifest = manifest_in(tmp_path)
    append = manifest.append

    def watched(rows: Rows) -> None:
        seen.append(status.progress().objects)
        append(rows)

    manifest.append = watched  # type: ignore[method-assign]
    Transfer(source, target, engine, Options()).copy(ALL, manifest, status)
    found = status.progress()
    assert (found.objects, found.bytes, found.percent) == (4, 10, 100.0)
    assert seen == [3], "what the engine had done; the row that its listings settled comes with the checkpoint"


class WatchedFlow(Flow):
    """Tells that somebody waits for the end of a pause."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = threading.Event()

    def await_resumed(self) -> None:
        self.waits.set()
        super().await_resumed()


def test_a_pause_holds_listings_and_copies(tmp_path: Path) -> None:
    source, target, engine = sides({f"{number:03}": b"1" for number in range(40)}, {})
    flow = WatchedFlow()
    flow.pause()
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(Transfer(source, target, engine).copy, ALL, manifest_in(tmp_path), Status(flow=flow))
        assert flow.waits.wait(30)
        assert (source.lists, target.lists, engine.copied) == (0, 0, [])
        flow.resume()
        assert copying.result(timeout=30).objects(ObjectOutcome.COPIED) == 40

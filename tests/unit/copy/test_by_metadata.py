"""What the metadata says must exist, beside two listings: nothing needed is missed, nothing else is touched."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.adapters.manifests import ManifestReader, ParquetManifest
from include.juicefs_storage.adapters.needed_files import NeededFiles
from include.juicefs_storage.adapters.s3.compressed_blocks import CODECS, holds
from include.juicefs_storage.copy import partitions as cutting
from include.juicefs_storage.copy import run
from include.juicefs_storage.copy.by_metadata import Needed, below_prefix, compare_needed, shard_at, to_pages
from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.copy.plan import NeededPlan, SyncPlan
from include.juicefs_storage.copy.reconcile import about, reconcile
from include.juicefs_storage.copy.run import Options, copy_partition, verify_partition
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.model import KeyRange, ObjectOutcome, Page
from include.juicefs_storage.ports import Session
from include.juicefs_storage.switch.checks import check_consistency
from include.juicefs_storage.volume.layout import ObjectSizes
from include.juicefs_storage.volume.needed import watermark
from tests.support.copy_fakes import KilledError, MemoryEngine, MemorySide
from tests.support.fakes import FakeMetadata, FakeStore, setting

ALL = KeyRange()
EXACT = ObjectSizes()


def key(slice_id: int, length: int = 1) -> str:
    return f"chunks/0/{slice_id // 1000}/{slice_id}_0_{length}"


@dataclass
class Metadata:
    """The needed blocks as a dict; `gone` are those that nothing refers to any more when they are asked for again."""

    blocks: dict[str, int]
    gone: set[str] = field(default_factory=set)
    sizes: ObjectSizes = EXACT
    delta: bool = False

    def needed(self) -> Needed:
        def pages(keys: KeyRange) -> Iterator[Page]:
            return to_pages(iter(sorted(self.blocks.items())), keys=keys)

        def still(keys: Collection[str]) -> set[str]:
            return set(keys) & self.blocks.keys() - self.gone

        return Needed("chunks/", self.sizes, pages, still, delta=self.delta)


def outcomes(
    folder: Path, metadata: Metadata, source: MemorySide, target: MemorySide, *, copies: bool = False, **options: bool
) -> dict[str, str]:
    work = copy_partition if copies else verify_partition
    manifest = ParquetManifest(folder, "00000", {"plan": "plan"})
    engine = MemoryEngine(source, target)
    totals = work(source, target, engine, ALL, manifest, Options(**options), needed=metadata.needed())  # type: ignore[arg-type]
    rows = list(ManifestReader(folder / "00000.parquet").rows(tuple(ObjectOutcome)))
    assert [row.key for row in rows] == sorted({row.key for row in rows})
    assert totals.objects() == len(rows)
    return {row.key: row.outcome for row in rows}


def test_every_kind_of_block(tmp_path: Path) -> None:
    metadata = Metadata({key(number, 2): 2 for number in range(9)})
    # 0 both, 1 source alone, 2 target alone, 3 neither, 4 source cut, 5 source cut and target whole, 6 target cut,
    # 7 target cut and not on the source, 8 other content.
    source = MemorySide(
        {key(number, 2): b"12" for number in (0, 1, 6, 8)} | {key(number, 2): b"1" for number in (4, 5)}
    )
    target = MemorySide({key(number, 2): b"12" for number in (0, 2, 5)} | {key(6, 2): b"1", key(7, 2): b"1"})
    target.objects[key(8, 2)] = b"xx"
    source.objects |= {key(20): b"1", "meta/dump": b"m", "juicefs_uuid": b"u"}
    target.objects |= {key(21): b"1"}
    before = dict(target.objects)
    expected = {
        key(0, 2): "same", key(1, 2): "missing", key(2, 2): "extra", key(3, 2): "lost", key(4, 2): "damaged",
        key(5, 2): "damaged", key(6, 2): "different", key(7, 2): "damaged", key(8, 2): "different",
        key(20): "skipped", key(21): "skipped", "meta/dump": "missing", "juicefs_uuid": "missing",
    }  # fmt: skip
    assert outcomes(tmp_path / "verify", metadata, source, target) == expected
    assert target.objects == before

    copied = {key(1, 2), "meta/dump", "juicefs_uuid"}
    found = outcomes(tmp_path / "copy", metadata, source, target, copies=True)
    assert found == expected | dict.fromkeys(copied, "copied")
    assert {name for name in target.objects if before.get(name) != target.objects[name]} == copied

    found = outcomes(tmp_path / "over", metadata, source, target, copies=True, overwrite=True)
    assert {name for name, outcome in found.items() if outcome == "overwritten"} == {key(6, 2), key(8, 2)}
    assert target.objects[key(5, 2)] == b"12", "what the source has cut does not replace what is whole"
    rows = {row.key: row for row in ManifestReader(tmp_path / "over/00000.parquet").rows((ObjectOutcome.DAMAGED,))}
    assert (
        rows[key(5, 2)].detail
        == "a block of 2 bytes, 1 bytes on the source, 2 bytes on the target (which may be whole)"
    )
    assert rows[key(7, 2)].detail == "a block of 2 bytes, nothing on the source, 1 bytes on the target"


SIDE = st.dictionaries(st.integers(0, 40), st.integers(1, 3), max_size=30)


@settings(max_examples=150, deadline=None)
@given(wanted=SIDE, ours=SIDE, theirs=SIDE, page=st.integers(1, 5), delta=st.booleans())
def test_as_a_comparison_in_memory_says(
    wanted: dict[int, int], ours: dict[int, int], theirs: dict[int, int], page: int, delta: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    def name(number: int) -> str:
        return f"chunks/{number // 5}/{number}_0_1"

    needed = {name(number): length for number, length in wanted.items()}
    source, target = (
        MemorySide({name(number): b"x" * size for number, size in side.items()}, page_keys=page)
        for side in (ours, theirs)
    )
    found = outcomes(tmp_path_factory.mktemp("rows"), Metadata(needed, delta=delta), source, target)

    def expected(place: str) -> str:
        one, other = len(source.objects.get(place, b"")), len(target.objects.get(place, b""))
        length = needed.get(place)
        if length is None:
            return "skipped"
        if one == length:
            return "missing" if not other else "same" if other == one else "different"
        return "damaged" if one else "extra" if other == length else "damaged" if other else "lost"

    places = needed.keys() | source.objects.keys() | target.objects.keys()
    everything = {place: expected(place) for place in places}
    if delta:
        assert {place: found[place] for place in needed} == {place: everything[place] for place in needed}
        assert {found[place] for place in found.keys() - needed.keys()} <= {"skipped"}
    else:
        assert found == everything


class Late(MemorySide):
    """Shows some objects from the second listing on: they were uploaded just after the first had gone by."""

    late: dict[str, bytes]

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        yield from super().pages(keys)
        self.objects |= self.late


def test_what_seems_lost_is_looked_up_again(tmp_path: Path) -> None:
    blocks = {key(number): 1 for number in range(8)}
    source, target = Late({key(0): b"1"}), Late({})
    source.late = {key(1): b"1", key(2): b"1", key(3): b"22", key(6): b"1"}
    target.late = {key(2): b"1", key(4): b"1", key(6): b"2"}
    found = outcomes(tmp_path, Metadata(blocks, gone={key(5)}), source, target, copies=True)
    assert found == {
        key(0): "copied", key(1): "copied", key(2): "same", key(3): "damaged", key(4): "extra", key(5): "vanished",
        key(6): "different", key(7): "lost",
    }  # fmt: skip


def test_a_delta_lists_only_where_its_blocks_are(tmp_path: Path) -> None:
    source = MemorySide({key(number): b"1" for number in range(20_000)}, page_keys=1000)
    target = MemorySide({}, page_keys=1000)
    new = {key(number): 1 for number in range(17_990, 18_010)}
    found = outcomes(tmp_path, Metadata(new, delta=True), source, target, copies=True)
    assert found == dict.fromkeys(new, "copied")
    assert source.lists <= 4, "one, and the end of it, in each of two folders"
    assert target.objects.keys() == new.keys()


@pytest.mark.parametrize(
    ("sizes", "length", "possible", "impossible"),
    [
        (EXACT, 4096, [4096], [0, 3, 4095, 4097]),
        (ObjectSizes("lz4"), 4 << 20, [16_449, 1 << 20, (4 << 20) + 16_464], [0, 3, 16_448, 5 << 20]),
        (ObjectSizes("zstd"), 4 << 20, [128, 200, (4 << 20) + 16_384], [0, 3, 127, 5 << 20]),
        (ObjectSizes("", True), 4096, [4096 + 287], [0, 3, 4095, 8192]),
        (ObjectSizes("lz4", True), 4096, [17, 4096 + 300], [0, 3, 16, 8192]),
    ],
)
def test_what_cannot_hold_a_block(sizes: ObjectSizes, length: int, possible: list[int], impossible: list[int]) -> None:
    assert [size for size in possible if not sizes.fit(length, size)] == []
    assert [size for size in impossible if sizes.fit(length, size)] == []


@pytest.mark.parametrize("content", [b"\0" * (4 << 20), bytes(range(256)) * 16, b"a"])
def test_the_bounds_hold_for_real_compressors(content: bytes) -> None:
    import pyarrow as pa

    for codec, name in (("lz4_raw", "lz4"), ("zstd", "zstd")):
        size = pa.compress(content, codec=codec, asbytes=True)
        assert ObjectSizes(name).fit(len(content), len(size))


@settings(max_examples=60, deadline=None)
@given(
    wanted=SIDE,
    theirs=SIDE,
    kills=st.lists(st.integers(0, 6), max_size=4),
    batch=st.integers(1, 6),
    delta=st.booleans(),
)
def test_a_partition_that_is_killed_goes_on_behind_its_checkpoint(
    wanted: dict[int, int], theirs: dict[int, int], kills: list[int], batch: int, delta: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    def name(number: int) -> str:
        return f"chunks/{number // 5}/{number}_0_1"

    blocks = {name(number): 1 for number in wanted}
    source = MemorySide({name(number): b"1" for number in {*wanted, *theirs}}, page_keys=2)
    target = MemorySide({name(number): b"1" for number in theirs}, page_keys=3)
    there, copied = set(target.objects), []
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "BATCH_KEYS", batch)
        for dies_after in [*kills, None]:
            engine = MemoryEngine(source, target, dies_after)
            manifest = ParquetManifest(folder, "00000", {"plan": "plan"})
            with contextlib.suppress(KilledError):
                needed = Metadata(blocks, delta=delta).needed()
                copy_partition(source, target, engine, ALL, manifest, Options(), needed=needed)
            copied += engine.copied
            if (folder / "00000.parquet").exists():
                break
    rows = list(ManifestReader(folder / "00000.parquet").rows(tuple(ObjectOutcome)))
    assert [row.key for row in rows] == sorted({row.key for row in rows})
    assert {row.key for row in rows} >= blocks.keys()
    assert sorted(copied) == sorted(blocks.keys() - there), "each once, and nothing else"


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("length", [1, 100, 70_000])
def test_only_a_whole_block_decompresses_to_its_length(compression: str, length: int) -> None:
    import pyarrow as pa

    content = (bytes(range(256)) * 300)[:length]
    stored = pa.compress(content, codec=CODECS[compression], asbytes=True)
    assert holds(stored, length, compression)
    assert not holds(stored, length + 1, compression)
    assert not holds(stored, length - 1, compression)
    cuts = range(len(stored)) if len(stored) < 2_000 else range(0, len(stored), 37)
    assert [cut for cut in cuts if holds(stored[:cut], length, compression)] == []


def test_a_block_that_does_not_decompress_is_neither_copied_nor_called_the_same(tmp_path: Path) -> None:
    blocks = {key(number, 2): 2 for number in range(4)}
    source = MemorySide(dict.fromkeys(blocks, b"12") | {"meta/dump": b"m"})
    target = MemorySide({key(1, 2): b"12", key(2, 2): b"12"})
    metadata = Metadata(blocks)
    bad = {key(0, 2), key(1, 2)}

    def problems(asked: Sequence[tuple[str, int]]) -> list[str]:
        assert sorted(asked) == sorted(blocks.items())
        return ["cut" if name in bad else "" for name, _ in asked]

    needed = dataclasses.replace(metadata.needed(), problems=problems)
    manifest = ParquetManifest(tmp_path, "00000", {"plan": "plan"})
    engine = MemoryEngine(source, target)
    copy_partition(source, target, engine, ALL, manifest, Options(compare="content"), needed=needed)
    found = {row.key: row.outcome for row in ManifestReader(tmp_path / "00000.parquet").rows(tuple(ObjectOutcome))}
    assert found == {
        key(0, 2): "damaged", key(1, 2): "damaged", key(2, 2): "same", key(3, 2): "copied", "meta/dump": "copied",
    }  # fmt: skip
    assert key(0, 2) not in target.objects


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.sets(st.integers(0, 99), min_size=1),
    cuts=st.sets(st.integers(0, 99), max_size=4),
    per_file=st.integers(1, 30),
)
def test_the_files_give_back_every_block_of_a_range_once(
    numbers: set[int], cuts: set[int], per_file: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from include.juicefs_storage.adapters import needed_files as module

    blocks = [(f"chunks/{number:03}", number) for number in sorted(numbers)]
    folder = tmp_path_factory.mktemp("needed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_FILE_KEYS", per_file)
        patch.setattr(module, "_GROUP_KEYS", 7)
        pages = (Page([name], [length], [""]) for name, length in blocks)
        assert sum(len(page.keys) for page in NeededFiles(folder).write(pages)) == len(blocks)
    bounds = [None, *(f"chunks/{number:03}" for number in sorted(cuts)), None]
    reader = NeededFiles(folder)
    found = [
        (name, length)
        for after, until in pairwise(bounds)
        for page in reader.pages(KeyRange(after, until))
        for name, length in zip(page.keys, page.sizes, strict=True)
    ]
    assert found == blocks


def test_files_that_were_not_written_to_the_end_are_none(tmp_path: Path) -> None:
    next(NeededFiles(tmp_path / "half").write(iter([Page(["a"], [1], [""])])))
    with pytest.raises(PermanentError, match="clear plan_partitions"):
        list(NeededFiles(tmp_path / "half").pages(ALL))


def test_the_next_delta_begins_before_what_live_clients_may_still_use() -> None:
    from datetime import UTC, datetime

    sessions = [Session(number, "1.4.2", "h", "/m", datetime.now(UTC)) for number in range(3)]
    assert watermark(FakeMetadata(setting(), [(100_000, 1)], sessions)) == 100_001 - 3 * 4096
    assert watermark(FakeMetadata(setting(), [(100, 1)], sessions)) == 0


def test_where_the_blocks_lie_below_a_prefix() -> None:
    assert below_prefix(setting(), "") == "myjfs/chunks/"
    assert below_prefix(setting(), "myjfs/") == "chunks/"
    for wrong in ("other/", "myjfs/meta/"):
        with pytest.raises(PermanentError, match="source_prefix"):
            below_prefix(setting(), wrong)


def test_which_shard_a_bucket_is() -> None:
    def at(template: str, bucket: str, endpoint: str = "http://inside:9000", shards: int = 3) -> int | None:
        return shard_at(setting(Bucket=template, Shards=shards), endpoint, bucket)

    assert at("http://old:9000/data", "whatever", shards=1) is None
    buckets = "http://old:9000/data-%d"
    assert [at(buckets, f"data-{number}") for number in range(3)] == [0, 1, 2]
    assert at("http://old:9000/data%02d/", "data01") == 1
    for wrong in ("data", "data-3", "data-%d"):
        with pytest.raises(PermanentError, match="expected `data-0`, `data-1`, `data-2`; found `data"):
            at(buckets, wrong)
    # One name at several endpoints: only there do workers need the endpoint that the clients use.
    hosts = "http://old-%d:80/data"
    assert at(hosts, "data", "http://OLD-2/") == 2
    with pytest.raises(PermanentError, match="expected `data`; found `data` at http://inside:9000"):
        at(hosts, "data")
    for template in ("http://old:9000/data", "http://old:9000/%d-%d", "http://old:9000/100%"):
        with pytest.raises(PermanentError, match="one %d"):
            at(template, "data")


ROW = setting()
METADATA = FakeMetadata(ROW, [(number, 100) for number in range(1, 11)])


def stores() -> tuple[FakeStore, FakeStore]:
    objects = {f"myjfs/chunks/0/0/{number}_0_100": 100 for number in range(1, 11)}
    return FakeStore(dict(objects)), FakeStore(dict(objects))


def test_the_switch_refuses_what_is_lost_already_and_names_the_files() -> None:
    source, target = stores()
    for store in (source, target):
        del store.objects["myjfs/chunks/0/0/3_0_100"]
        store.objects["myjfs/chunks/0/0/4_0_100"] = 3
    (finding,), difference = check_consistency(source, target, ROW, METADATA, mode="metadata", catch_up=True)
    assert (difference.expected, difference.present, difference.lost) == (10, 8, 2)
    assert finding.level == "refusal"
    assert "2 of 10 blocks" in finding.message
    assert "/file-3, /file-4" in finding.message
    assert "a block of 100 bytes, 3 bytes on the source" in finding.message
    (blind,), _ = check_consistency(source, target, ROW, METADATA, mode="listing", catch_up=True)
    assert blind.level == "ok", "a comparison of two listings cannot see it"


def test_the_switch_does_not_care_for_what_no_file_needs() -> None:
    source, target = stores()
    source.objects["myjfs/chunks/0/0/0_0_5"] = 5
    target.objects |= {"myjfs/chunks/0/0/0_1_5": 5}
    del source.objects["myjfs/chunks/0/0/7_0_100"]
    (finding,), difference = check_consistency(source, target, ROW, METADATA, mode="metadata", catch_up=True)
    assert (finding.level, difference.present, difference.extra) == ("ok", 10, 1)
    del target.objects["myjfs/chunks/0/0/8_0_100"]
    target.objects["myjfs/chunks/0/0/9_0_100"] = 99
    found, difference = check_consistency(source, target, ROW, METADATA, mode="metadata", catch_up=True)
    assert [finding.level for finding in found] == ["refusal", "warning"]
    assert (difference.missing, difference.different, difference.lost) == (1, 1, 0)


def test_a_block_uploaded_or_deleted_while_the_stores_are_compared_is_not_lost() -> None:
    source, target = stores()
    del source.objects["myjfs/chunks/0/0/3_0_100"], target.objects["myjfs/chunks/0/0/3_0_100"]
    metadata = FakeMetadata(ROW, list(METADATA.rows))
    metadata.still_needed = lambda ids: set()  # type: ignore[method-assign]
    difference = compare_needed(metadata, ROW, source, target)
    assert (difference.expected, difference.present, difference.lost) == (9, 9, 0)


def refuse(**params: object) -> None:
    given = {"source_conn_id": "a", "source_bucket": "one", "target_conn_id": "b", "target_bucket": "two"}
    SyncParams.model_validate(given | params)


@pytest.mark.parametrize(
    "params",
    [
        {"plan": "metadata"},
        {"since_id": 5},
        {"meta_conn_id": "m"},
        {"plan": "metadata", "meta_conn_id": "m", "engine": "juicefs"},
        {"plan": "metadata", "meta_conn_id": "m", "recut_from": "run"},
    ],
)
def test_params_that_do_not_go_together(params: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="plan"):
        refuse(**params)


def test_lost_blocks_make_the_report_red_and_name_the_files(tmp_path: Path) -> None:
    params = SyncParams(
        source_conn_id="a", source_bucket="one", target_conn_id="b", target_bucket="two", plan="metadata",
        meta_conn_id="m", mode="verify",
    )  # fmt: skip
    blocks = {key(number): 1 for number in range(1, 6)}
    plan = SyncPlan(
        source="one", target="two", params=params, cut_by="the metadata",
        partitions=tuple(cutting.cut([cutting.Segment(key(5), 5, 5)], ALL, 1)),
        needed=NeededPlan(volume="myjfs", folder="needed", chunks="chunks/", sizes=EXACT, next_since_id=77),
    )  # fmt: skip
    both = MemorySide(dict.fromkeys(blocks, b"1") | {key(9): b"1"})
    del both.objects[key(2)]
    both.objects[key(3)] = b"cut"
    folder = tmp_path / plan.id / "verify"
    manifest = ParquetManifest(folder, "00000", about(plan, "verify", plan.partitions[0]))
    verify_partition(both, both, MemoryEngine(both, both), ALL, manifest, Options(), needed=Metadata(blocks).needed())

    written: dict[str, io.StringIO] = {}

    class Kept(io.StringIO):
        def close(self) -> None:
            pass

    report = reconcile(
        plan, "run", lambda phase, partition: ManifestReader(folder / "00000.parquet"),
        lambda name: written.setdefault(name, Kept()), files_of=FakeMetadata(ROW).files_of,
    )  # fmt: skip
    assert report.outcome == "not proven"
    assert report.next_since_id == 77
    assert [problem.partition(" after")[0] for problem in report.problems[:2]] == [
        "1 objects are lost",
        "1 objects are damaged",
    ]
    assert report.problems[2] == "2 files have lost or damaged blocks (`lost_files.csv`), such as `/file-2`, `/file-3`."
    assert written["lost_files.csv"].getvalue().split() == [
        "file,key", f"/file-2,{key(2)}", f"/file-3,{key(3)}",
    ]  # fmt: skip
    assert "1 objects are blocks that no file refers to" in " ".join(report.notes)
    assert "| the next delta | `since_id=77` |" in plan.to_markdown()
    assert plan.needed
    assert plan.needed.scope(0) == []
    sharded = plan.needed.model_copy(update={"shard": "in bucket data-1, one of 3"})
    assert sharded.scope(5) == ["of slices from id 5 on", "in bucket data-1, one of 3"]

"""What the metadata says must exist, beside two listings: nothing needed is missed, nothing else is touched."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.adapters.manifests import ManifestReader, ParquetManifest
from include.juicefs_storage.copy import run
from include.juicefs_storage.copy.run import Options, Transfer
from include.juicefs_storage.objects.model import Compared, Copied, KeyRange, Listed, ObjectOutcome, Page
from include.juicefs_storage.volume.comparison import UNNEEDED, NeededBlocks
from include.juicefs_storage.volume.layout import ObjectSizes
from include.juicefs_storage.volume.needed import to_pages
from tests.support.copy_fakes import KilledError, MemoryBucket, MemoryEngine

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

    def needed(self) -> NeededBlocks:
        def pages(keys: KeyRange) -> Iterator[Page]:
            return to_pages(iter(sorted(self.blocks.items())), keys=keys)

        def still(keys: Collection[str]) -> set[str]:
            return set(keys) & self.blocks.keys() - self.gone

        return NeededBlocks("chunks/", self.sizes, pages, still, delta=self.delta)


def outcomes(
    folder: Path,
    metadata: Metadata,
    source: MemoryBucket,
    target: MemoryBucket,
    *,
    copies: bool = False,
    engine: MemoryEngine | None = None,
    **options: bool | str,
) -> dict[str, str]:
    manifest = ParquetManifest(folder, "00000", {"plan": "plan"})
    engine = engine or MemoryEngine(source, target)
    transfer = Transfer(source, target, engine, Options(**options), needed=metadata.needed())  # type: ignore[arg-type]
    totals = (transfer.copy if copies else transfer.verify)(ALL, manifest)
    rows = list(ManifestReader(folder / "00000.parquet").rows(tuple(ObjectOutcome)))
    assert [row.key for row in rows] == sorted({row.key for row in rows})
    assert totals.objects() == len(rows)
    return {row.key: row.outcome for row in rows}


def test_every_kind_of_block(tmp_path: Path) -> None:
    metadata = Metadata({key(number, 2): 2 for number in range(9)})
    # 0 both, 1 source alone, 2 target alone, 3 neither, 4 source cut, 5 source cut and target whole, 6 target cut,
    # 7 target cut and not on the source, 8 other content.
    source = MemoryBucket(
        {key(number, 2): b"12" for number in (0, 1, 6, 8)} | {key(number, 2): b"1" for number in (4, 5)}
    )
    target = MemoryBucket({key(number, 2): b"12" for number in (0, 2, 5)} | {key(6, 2): b"1", key(7, 2): b"1"})
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
        MemoryBucket({name(number): b"x" * size for number, size in side.items()}, page_keys=page)
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


class Late(MemoryBucket):
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


class Deleting(MemoryEngine):
    """What it is to copy or to compare is deleted before it is read."""

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        self._delete(objects)
        return super().copy(objects, overwrite=overwrite)

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        self._delete(objects)
        return super().compare(objects)

    def _delete(self, objects: Sequence[Listed]) -> None:
        for listed in objects:
            self.source.objects.pop(listed[0], None)


def test_a_block_that_vanishes_is_lost_where_a_file_still_refers_to_it(tmp_path: Path) -> None:
    blocks = {key(number): 1 for number in range(3)}
    source, target = MemoryBucket(dict.fromkeys(blocks, b"1") | {"meta/dump": b"m"}), MemoryBucket({key(2): b"1"})
    metadata, engine = Metadata(blocks, gone={key(0)}), Deleting(source, target)
    found = outcomes(tmp_path, metadata, source, target, copies=True, engine=engine, compare="content")
    # What the target has whole suffices; what is no block is known to no metadata.
    assert found == {key(0): "vanished", key(1): "lost", key(2): "extra", "meta/dump": "vanished"}
    rows = ManifestReader(tmp_path / "00000.parquet").rows((ObjectOutcome.VANISHED,))
    assert [(row.key, row.detail) for row in rows] == [(key(0), UNNEEDED), ("meta/dump", None)]


def test_a_delta_lists_only_where_its_blocks_are(tmp_path: Path) -> None:
    source = MemoryBucket({key(number): b"1" for number in range(20_000)}, page_keys=1000)
    target = MemoryBucket({}, page_keys=1000)
    new = {key(number): 1 for number in range(17_990, 18_010)}
    found = outcomes(tmp_path, Metadata(new, delta=True), source, target, copies=True)
    assert found == dict.fromkeys(new, "copied")
    assert source.lists <= 4, "one, and the end of it, in each of two folders"
    assert target.objects.keys() == new.keys()


@settings(max_examples=60, deadline=None)
@given(
    wanted=SIDE,
    theirs=SIDE,
    kills=st.lists(st.integers(0, 6), max_size=4),
    batch=st.integers(1, 6),
    delta=st.booleans(),
)
def test_a_killed_partition_resumes_behind_its_checkpoint(
    wanted: dict[int, int], theirs: dict[int, int], kills: list[int], batch: int, delta: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:  # fmt: skip
    def name(number: int) -> str:
        return f"chunks/{number // 5}/{number}_0_1"

    blocks = {name(number): 1 for number in wanted}
    source = MemoryBucket({name(number): b"1" for number in {*wanted, *theirs}}, page_keys=2)
    target = MemoryBucket({name(number): b"1" for number in theirs}, page_keys=3)
    there, copied = set(target.objects), []
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "BATCH_KEYS", batch)
        for dies_after in [*kills, None]:
            engine = MemoryEngine(source, target, dies_after)
            manifest = ParquetManifest(folder, "00000", {"plan": "plan"})
            with contextlib.suppress(KilledError):
                needed = Metadata(blocks, delta=delta).needed()
                Transfer(source, target, engine, needed=needed).copy(ALL, manifest)
            copied += engine.copied
            if (folder / "00000.parquet").exists():
                break
    rows = list(ManifestReader(folder / "00000.parquet").rows(tuple(ObjectOutcome)))
    assert [row.key for row in rows] == sorted({row.key for row in rows})
    assert {row.key for row in rows} >= blocks.keys()
    assert sorted(copied) == sorted(blocks.keys() - there), "each once, and nothing else"


def test_a_block_that_does_not_decompress_is_neither_copied_nor_called_the_same(tmp_path: Path) -> None:
    blocks = {key(number, 2): 2 for number in range(4)}
    source = MemoryBucket(dict.fromkeys(blocks, b"12") | {"meta/dump": b"m"})
    target = MemoryBucket({key(1, 2): b"12", key(2, 2): b"12"})
    metadata = Metadata(blocks)
    bad = {key(0, 2), key(1, 2)}

    def problems(asked: Sequence[tuple[str, int]]) -> list[str]:
        assert sorted(asked) == sorted(blocks.items())
        return ["cut" if name in bad else "" for name, _ in asked]

    needed = dataclasses.replace(metadata.needed(), problems=problems)
    manifest = ParquetManifest(tmp_path, "00000", {"plan": "plan"})
    engine = MemoryEngine(source, target)
    Transfer(source, target, engine, Options(compare="content"), needed=needed).copy(ALL, manifest)
    found = {row.key: row.outcome for row in ManifestReader(tmp_path / "00000.parquet").rows(tuple(ObjectOutcome))}
    assert found == {
        key(0, 2): "damaged", key(1, 2): "damaged", key(2, 2): "same", key(3, 2): "copied", "meta/dump": "copied",
    }  # fmt: skip
    assert key(0, 2) not in target.objects

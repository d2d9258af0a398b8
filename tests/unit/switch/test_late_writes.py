"""Blocks that appear on the store that all clients have left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.objects.model import Compared, Copied, Engine, Listed, ObjectOutcome
from include.juicefs_storage.switch.late_writes import LateWrites
from tests.support.fakes import FakeMetadata, FakeStore, setting

LEFT_AT = datetime(2026, 1, 1, tzinfo=UTC)


def key(slice_id: int) -> str:
    return f"myjfs/chunks/{slice_id // 1_000_000}/{slice_id // 1_000}/{slice_id}_0_4096"


@dataclass
class Copier(Engine):
    """Copies sizes from one fake store to the other."""

    source: FakeStore
    target: FakeStore
    calls: list[list[str]] = field(default_factory=list)

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        assert not overwrite
        self.calls.append([name for name, _, _ in objects])
        for name, size, _ in objects:
            self.target.objects[name] = size
        return [Copied(ObjectOutcome.COPIED) for _ in objects]

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        raise AssertionError


@pytest.fixture
def work() -> LateWrites:
    """Ten blocks on both stores from before; nothing since."""
    old, new = FakeStore(), FakeStore()
    for store in (old, new):
        store.objects |= {key(slice_id): 4096 for slice_id in range(1, 11)}
    old.written = {name: LEFT_AT - timedelta(hours=1) for name in old.objects}
    metadata = FakeMetadata(setting(), rows=[(slice_id, 4096) for slice_id in range(1, 11)])
    return LateWrites(metadata, setting(), old, new, Copier(old, new), lambda: None, LEFT_AT, 11)


def write(work: LateWrites, slice_id: int, at: datetime = LEFT_AT + timedelta(minutes=1)) -> None:
    """What a writer does that no session shows; no file refers to the block yet."""
    assert isinstance(work.left, FakeStore)
    work.left.objects[key(slice_id)] = 4096
    work.left.written[key(slice_id)] = at


def test_nothing_is_found_where_nobody_wrote(work: LateWrites) -> None:
    work.run(lambda _: pytest.fail("nothing to wait for"))
    assert (work.found, work.examples) == (0, [])


def test_what_was_written_later_is_copied_and_named_also_before_a_file_refers_to_it(work: LateWrites) -> None:
    write(work, 7_000)
    pauses: list[float] = []
    work.run(pauses.append)
    assert (work.found, work.examples) == (1, [key(7_000)])
    assert work.target.exists(key(7_000))
    assert pauses == [60.0], "it looks once more"


def test_a_block_that_is_new_by_its_date_and_by_its_id_is_found_once(work: LateWrites) -> None:
    assert isinstance(work.metadata, FakeMetadata)
    write(work, 25)
    work.metadata.rows.append((30, 4096))
    assert work.look() == 1


def test_a_block_of_an_id_that_was_given_out_later_is_found_whatever_its_date(work: LateWrites) -> None:
    assert isinstance(work.metadata, FakeMetadata)
    write(work, 25, at=LEFT_AT - timedelta(days=400))
    work.metadata.rows.append((30, 4096))
    assert work.look() == 1


def test_a_writer_that_does_not_stop_makes_the_run_hold(work: LateWrites) -> None:
    ids = iter(range(7_000, 8_000))
    write(work, next(ids))
    with pytest.raises(NeedsHumanError, match="Something keeps writing blocks to fake: 3 since") as held:
        work.run(lambda _: write(work, next(ids)))
    assert "gc --compact" in held.value.next_step
    assert all(work.target.exists(key(slice_id)) for slice_id in (7_000, 7_001, 7_002))


def test_blocks_that_both_stores_have_are_no_late_writes(work: LateWrites) -> None:
    """One store under two names, or one that replicates to the other."""
    assert isinstance(work.target, FakeStore)
    for slice_id in range(5_000, 5_100):
        write(work, slice_id)
        work.target.objects[key(slice_id)] = 4096
    work.run(lambda _: pytest.fail("nothing to wait for"))
    assert work.found == 0

"""Which slices were committed at a moment: what changed since shows in its batch."""

from __future__ import annotations

import pytest

from include.juicefs_storage.volume import slice_batches
from include.juicefs_storage.volume.needed import ID_BATCH
from include.juicefs_storage.volume.slice_batches import SliceBatches


def rows(*slice_ids: int) -> list[tuple[int, int]]:
    return [(slice_id, 1) for slice_id in slice_ids]


@pytest.mark.parametrize("later", [(1, 2, 4), (1, 2), (1, 2, 3, 4), (2, 3), (), (0, 2, 4)])
def test_a_slice_more_or_less_or_another_one_changes_its_batch(later: tuple[int, ...]) -> None:
    assert not SliceBatches.of(rows(1, 2, 3)).unchanged(0, later)


def test_the_same_slices_change_nothing_whatever_their_order() -> None:
    batches = SliceBatches.of(rows(ID_BATCH + 1, 2, 1, ID_BATCH))
    assert batches.unchanged(0, (1, 2))
    assert batches.unchanged(1, (ID_BATCH, ID_BATCH + 1))
    assert batches.unchanged(2, ())
    assert not batches.unchanged(2, (2 * ID_BATCH,))


def test_text_keeps_it() -> None:
    batches = SliceBatches.of(rows(*range(0, 50 * ID_BATCH, 1000)))
    assert SliceBatches.from_text(batches.to_text()) == batches


def test_what_is_too_old_to_be_recorded_counts_as_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slice_batches, "_MOST_BATCHES", 2)
    batches = SliceBatches.of(rows(1, ID_BATCH, 2 * ID_BATCH))
    assert batches.first == 1
    assert batches.unchanged(0, (7, 8))
    assert not batches.unchanged(1, (ID_BATCH + 5,))
    assert SliceBatches.from_text(batches.to_text()) == batches

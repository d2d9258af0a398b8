"""Prove the blocks: one that is missing or cut is named with its file."""

from __future__ import annotations

import pytest

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.switch.prove_blocks import require_all_blocks
from include.juicefs_storage.volume.difference import Difference
from tests.support.fakes import NEW, FakeMetadata, setting

BLOCK = "myjfs/chunks/0/0/7_0_4"


@pytest.fixture
def metadata() -> FakeMetadata:
    return FakeMetadata(setting(NEW), rows=[(7, 4)])


def test_nothing_missing_is_a_proof_whatever_else_is_there(metadata: FakeMetadata) -> None:
    require_all_blocks(Difference(expected=2, present=2, extra=5), NEW.bucket, metadata)


@pytest.mark.parametrize(
    ("difference", "found"),
    [
        (Difference(expected=2, present=1, missing=1, examples=[f"missing: {BLOCK}"]), "1 of 2 blocks"),
        (Difference(expected=2, present=1, different=1, examples=[f"different: {BLOCK}"]), "1 have another length"),
    ],
    ids=["missing", "cut"],
)
def test_a_block_that_files_need_is_named_with_its_file(
    difference: Difference, found: str, metadata: FakeMetadata
) -> None:
    with pytest.raises(NeedsHumanError, match=found) as refused:
        require_all_blocks(difference, NEW.bucket, metadata)
    assert BLOCK in str(refused.value)
    assert "/file-7" in str(refused.value)
    assert NEW.bucket in str(refused.value)
    assert "clear catch_up" in refused.value.next_step


def test_where_nothing_is_copied_no_copy_is_the_remedy(metadata: FakeMetadata) -> None:
    with pytest.raises(NeedsHumanError) as refused:
        require_all_blocks(Difference(expected=2, present=1, missing=1), NEW.bucket, metadata, copied_by="")
    assert "copies nothing" in refused.value.next_step
    assert "catch_up" not in refused.value.next_step

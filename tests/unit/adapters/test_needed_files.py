"""The needed blocks in files."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.adapters.needed_files import NeededFiles
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.model import KeyRange, Page

ALL = KeyRange()


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.sets(st.integers(0, 99), min_size=1),
    cuts=st.sets(st.integers(0, 99), max_size=4),
    per_file=st.integers(1, 30),
)
def test_the_files_give_back_every_block_of_a_range_once(
    numbers: set[int], cuts: set[int], per_file: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    blocks = [(f"chunks/{number:03}", number) for number in sorted(numbers)]
    folder = tmp_path_factory.mktemp("needed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("include.juicefs_storage.adapters.needed_files._FILE_KEYS", per_file)
        patch.setattr("include.juicefs_storage.adapters.needed_files._GROUP_KEYS", 7)
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

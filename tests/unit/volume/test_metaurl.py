"""Which metadata a metaurl names."""

from __future__ import annotations

import pytest

from include.juicefs_storage.volume.metaurl import same_metadata


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("mysql://u:p@(db:3306)/jfs", True),
        ("mysql://v:p@ss@tcp(db:3306)/jfs?charset=utf8", True),
        ("mysql://u:p@(db)/jfs", True),
        ("mysql://u:p@(db:3307)/jfs", False),
        ("mysql://u:p@(db:3306)/other", False),
        ("redis://db:6379/1", False),
        ("", False),
    ],
)
def test_which_metadata_urls_are_the_same(other, same):
    assert same_metadata("mysql://u:p@(db:3306)/jfs", other) is same

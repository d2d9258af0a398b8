"""What several tasks listed is joined whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from include.juicefs_storage.adapters.listing_files import ListingFiles
from include.juicefs_storage.copy.segments import Segment
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.model import KeyRange

ODD = "a\nb\u2028 {{ 1 }} \U0010fffd"


def test_shares_and_segments_come_back_as_they_were(tmp_path: Path) -> None:
    files = ListingFiles(tmp_path / "listing")
    files.write(0, 7, [Segment("m", 2, 20)])
    files.write_shares([[KeyRange(None, "a"), KeyRange("m", ODD)], [KeyRange(ODD, None)]])
    assert files.share(1) == [KeyRange(None, "a"), KeyRange("m", ODD)]
    assert files.share(2) == [KeyRange(ODD, None)]
    files.write(2, 3, [])
    files.write(1, 99, [Segment("killed", 1, 1)])
    files.write(1, 5, [Segment("a", 1, 10), Segment(ODD, 3, 30)])
    assert files.read(2) == (15, sorted([Segment("a", 1, 10), Segment("m", 2, 20), Segment(ODD, 3, 30)]))
    assert files.read(0) == (7, [Segment("m", 2, 20)])


def test_a_share_that_nobody_listed_is_named(tmp_path: Path) -> None:
    files = ListingFiles(tmp_path / "listing")
    files.write(0, 1, [])
    files.write(1, 1, [])
    with pytest.raises(PermanentError, match="clear list_source 1 with Downstream"):
        files.read(2)
    with pytest.raises(PermanentError, match="clear check with Downstream"):
        files.share(1)

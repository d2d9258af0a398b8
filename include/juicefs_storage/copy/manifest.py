"""The manifest of a partition, as it is written and as it is read: what became of each key."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from datetime import datetime
from typing import NamedTuple, Protocol

from include.juicefs_storage.objects.comparison import Rows
from include.juicefs_storage.objects.model import ObjectOutcome
from include.juicefs_storage.objects.totals import Totals

#: The detail of an object that is missing since it was written after the copy was planned.
WRITTEN_SINCE = "written after the copy was planned"


def written_since(modified: str, moment: datetime) -> bool:
    """Return whether an object was written at a moment or later.

    Args:
        modified: Its Last-Modified; of an object without one nothing is known, and it counts as older.
        moment: By the same store's clock, in whole seconds.
    """
    from email.utils import parsedate_to_datetime

    try:
        return parsedate_to_datetime(modified) >= moment
    except (ValueError, TypeError):
        return False


class Manifest(Protocol):
    """Where the rows of one partition go."""

    def resume(self) -> tuple[str | None, Totals]:
        """Return the last key that is written down, None where there is none, and what was counted up to it."""

    def append(self, rows: Rows) -> None:
        """Write rows down: a checkpoint. The try after a kill resumes behind it."""

    def finish(self) -> None:
        """Make one file of all checkpoints. The partition is complete."""


class ManifestRow(NamedTuple):
    """One key of a manifest."""

    key: str
    size: int
    source_etag: str
    target_etag: str
    checksum: str | None
    outcome: str
    comparison: str
    detail: str | None


class Reader(Protocol):
    """A finished manifest."""

    def about(self) -> tuple[dict[str, str], Totals]:
        """Return what it belongs to, and what it says was counted."""

    def count(self) -> Totals:
        """Count its rows again."""

    def rows(self, outcomes: Collection[ObjectOutcome]) -> Iterator[ManifestRow]:
        """Yield the rows with one of these outcomes, ordered by key."""

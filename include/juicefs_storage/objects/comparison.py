"""Stretches of two listings become rows: what became of each key.

Where both sides hold the same keys, which is what a repeated copy finds, whole pages are compared at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from include.juicefs_storage.objects.merge import EMPTY, slice_page
from include.juicefs_storage.objects.model import Comparison, Listed, ObjectOutcome, Page

#: Rows hold outcomes and comparisons as places in these.
OUTCOMES = tuple(ObjectOutcome)
COMPARISONS = tuple(Comparison)
OUTCOME_CODES = {outcome: code for code, outcome in enumerate(OUTCOMES)}
COMPARISON_CODES = {comparison: code for code, comparison in enumerate(COMPARISONS)}

_MD5_HEX = 32


@dataclass(slots=True)
class Rows:
    """What became of a stretch of keys, ordered by key: columns of one length.

    Attributes:
        sizes: In bytes, on the source; of the target where the source has no such key.
        outcomes: One code a row, see OUTCOMES.
        comparisons: One code a row, see COMPARISONS.
        checksums: xxh3-64 in hex, for the rows that have one.
        details: Why it failed, for the rows that have one.
        time_s: When the outcomes were known, in Unix time.
    """

    keys: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    source_etags: list[str] = field(default_factory=list)
    target_etags: list[str] = field(default_factory=list)
    outcomes: bytearray = field(default_factory=bytearray)
    comparisons: bytearray = field(default_factory=bytearray)
    checksums: dict[int, str] = field(default_factory=dict)
    details: dict[int, str] = field(default_factory=dict)
    time_s: float = field(default_factory=time.time)

    def __len__(self) -> int:
        return len(self.keys)

    def add(
        self,
        keys: Sequence[str],
        sizes: Sequence[int],
        source_etags: Sequence[str],
        target_etags: Sequence[str],
        outcome: ObjectOutcome,
        comparison: Comparison,
    ) -> None:
        """Append rows of one outcome.

        Args:
            keys: Their keys, in order.
            sizes: Their sizes in bytes.
            source_etags: Empty where the source has none.
            target_etags: Empty where the target has none.
            outcome: Of all rows.
            comparison: How all rows were compared.
        """
        self.keys += keys
        self.sizes += sizes
        self.source_etags += source_etags
        self.target_etags += target_etags
        self.outcomes += bytes([OUTCOME_CODES[outcome]]) * len(keys)
        self.comparisons += bytes([COMPARISON_CODES[comparison]]) * len(keys)

    def put(
        self, row: int, outcome: ObjectOutcome, comparison: Comparison, *, checksum: str = "", detail: str = ""
    ) -> None:
        """Set the outcome of one row.

        Args:
            row: Its index.
            outcome: The outcome.
            comparison: How it was compared.
            checksum: Of the content; empty: not computed.
            detail: For a person.
        """
        self.outcomes[row], self.comparisons[row] = OUTCOME_CODES[outcome], COMPARISON_CODES[comparison]
        if checksum:
            self.checksums[row] = checksum
        if detail:
            self.details[row] = detail

    def extend(self, other: Rows) -> None:
        """Append rows that follow these."""
        first = len(self)
        self.keys += other.keys
        self.sizes += other.sizes
        self.source_etags += other.source_etags
        self.target_etags += other.target_etags
        self.outcomes += other.outcomes
        self.comparisons += other.comparisons
        self.checksums.update((first + row, text) for row, text in other.checksums.items())
        self.details.update((first + row, text) for row, text in other.details.items())

    def groups(self, places: Sequence[int], group_bytes: int) -> Iterator[list[int]]:
        """Cut places of rows into groups of about so many bytes each, by the sizes of their objects."""
        group: list[int] = []
        size = 0
        for row in places:
            if group and size >= group_bytes:
                yield group
                group, size = [], 0
            group.append(row)
            size += self.sizes[row]
        if group:
            yield group

    def listed(self, row: int) -> Listed:
        """Return the object as the source's listing showed it."""
        return self.keys[row], self.sizes[row], self.source_etags[row]


def plain_md5(etags: Sequence[str]) -> bool:
    """Return whether all ETags have the form of an MD5: those of multipart uploads do not."""
    text = "".join(etags)
    if len(text) != _MD5_HEX * len(etags):
        return False
    try:
        bytes.fromhex(text)
    except ValueError:
        return False
    return True


@dataclass(slots=True)
class Classifier:
    """Turns stretches of two listings into rows; objects that only their contents tell apart stay `unsure`.

    Attributes:
        by_size: Compare sizes alone.
        trusted: Tells whether equal ETags in these two pages prove equal contents.
        rows: Filled by `add`.
        missing: Places of rows that the target lacks (MISSING so far).
        unsure: Places of rows whose contents are to be compared.
        lost: Places of rows that no side has, though the metadata says that one must (LOST so far).
    """

    by_size: bool
    trusted: Callable[[Page, Page], bool] = lambda *_: False
    rows: Rows = field(default_factory=Rows)
    missing: list[int] = field(default_factory=list)
    unsure: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)

    def add(self, source: Page, target: Page) -> None:
        """Add a stretch.

        Args:
            source: From `merge.beside`.
            target: The same range of the other side.
        """
        rows = self.rows
        if source.keys == target.keys:
            self._add_common(source, target)
        elif not target.keys:
            self.missing.extend(range(len(rows), len(rows) + len(source.keys)))
            rows.add(*source, [""] * len(source.keys), ObjectOutcome.MISSING, Comparison.NONE)
        elif not source.keys:
            none = [""] * len(target.keys)
            rows.add(target.keys, target.sizes, none, target.etags, ObjectOutcome.EXTRA, Comparison.NONE)
        else:
            self._add_mixed(source, target)

    def _add_common(self, source: Page, target: Page) -> None:
        """Add keys that both sides have."""
        rows, first = self.rows, len(self.rows)
        if source.etags == target.etags:
            target = target._replace(etags=source.etags)  # one copy of each in memory
        if self.by_size:
            rows.add(*source, target.etags, ObjectOutcome.SAME, Comparison.SIZE)
        else:
            rows.add(*source, target.etags, ObjectOutcome.SAME, Comparison.ETAG)
            trusted = self.trusted(source, target)
            if not (trusted and source.etags == target.etags and plain_md5(source.etags)):
                pairs = enumerate(zip(source.etags, target.etags, strict=True), first)
                unsure = [row for row, (one, other) in pairs if not (trusted and one == other and plain_md5((one,)))]
                self.unsure += unsure
        if source.sizes != target.sizes:
            self._set_different(first, target.sizes)

    def _set_different(self, first: int, target_sizes: Sequence[int]) -> None:
        rows = self.rows
        different = {row: size for row, size in enumerate(target_sizes, first) if size != rows.sizes[row]}
        self.unsure = [row for row in self.unsure if row not in different]
        for row, size in different.items():
            detail = f"{rows.sizes[row]} bytes on the source, {size} on the target"
            rows.put(row, ObjectOutcome.DIFFERENT, Comparison.SIZE, detail=detail)

    def _add_mixed(self, source: Page, target: Page) -> None:
        """Add keys of which some are on one side alone: runs of one kind, one after the other."""
        ours, theirs = frozenset(source.keys), frozenset(target.keys)
        left = right = 0
        for kind, run in groupby(sorted(ours | theirs), lambda key: (key in ours, key in theirs)):
            size = sum(1 for _ in run)
            self.add(
                slice_page(source, left, left + size) if kind[0] else EMPTY,
                slice_page(target, right, right + size) if kind[1] else EMPTY,
            )
            left += size * kind[0]
            right += size * kind[1]

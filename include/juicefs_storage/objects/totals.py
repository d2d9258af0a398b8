"""Counts of objects and bytes by outcome."""

from __future__ import annotations

from dataclasses import dataclass, field

from include.juicefs_storage.objects.comparison import COMPARISONS, OUTCOMES, Rows
from include.juicefs_storage.objects.model import Comparison, ObjectOutcome


@dataclass(slots=True)
class Totals:
    """Objects and bytes by outcome and comparison."""

    counts: dict[tuple[ObjectOutcome, Comparison], tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, outcome: ObjectOutcome, comparison: Comparison, objects: int, size: int) -> None:
        """Count objects of one kind.

        Args:
            outcome: Of all of them.
            comparison: How they were compared.
            objects: How many.
            size: Their size in bytes.
        """
        before = self.counts.get((outcome, comparison), (0, 0))
        self.counts[outcome, comparison] = (before[0] + objects, before[1] + size)

    def add_rows(self, rows: Rows) -> None:
        """Count rows."""
        if not rows:
            return
        outcome, comparison = rows.outcomes[0], rows.comparisons[0]
        if rows.outcomes.count(outcome) == rows.comparisons.count(comparison) == len(rows):  # the usual case
            self.add(OUTCOMES[outcome], COMPARISONS[comparison], len(rows), sum(rows.sizes))
            return
        counts: dict[tuple[int, int], list[int]] = {}
        for outcome, comparison, size in zip(rows.outcomes, rows.comparisons, rows.sizes, strict=True):
            count = counts.setdefault((outcome, comparison), [0, 0])
            count[0] += 1
            count[1] += size
        for (outcome, comparison), (objects, size) in counts.items():
            self.add(OUTCOMES[outcome], COMPARISONS[comparison], objects, size)

    def merge(self, other: Totals) -> None:
        """Add what another partition counted."""
        for (outcome, comparison), (objects, size) in other.counts.items():
            self.add(outcome, comparison, objects, size)
        self.seconds += other.seconds

    def objects(self, *outcomes: ObjectOutcome) -> int:
        """Return how many objects have one of these outcomes; all, where none is named."""
        return sum(count[0] for (outcome, _), count in self.counts.items() if not outcomes or outcome in outcomes)

    def bytes(self, *outcomes: ObjectOutcome) -> int:
        """Return the size of the objects with one of these outcomes; of all, where none is named."""
        return sum(count[1] for (outcome, _), count in self.counts.items() if not outcomes or outcome in outcomes)

    def compared_by(self, comparison: Comparison) -> int:
        """Return how many objects were compared in this way."""
        return sum(count[0] for (_, by), count in self.counts.items() if by == comparison)

    def as_json(self) -> dict[str, list[int]]:
        """Return `outcome/comparison` -> objects, bytes."""
        return {f"{key[0]}/{key[1]}": list(count) for key, count in sorted(self.counts.items())}

    @classmethod
    def from_json(cls, data: dict[str, list[int]]) -> Totals:
        """Reverse `as_json`."""
        totals = cls()
        for name, (objects, size) in data.items():
            outcome, _, comparison = name.partition("/")
            totals.add(ObjectOutcome(outcome), Comparison(comparison), objects, size)
        return totals

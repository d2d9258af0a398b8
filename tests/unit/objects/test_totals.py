"""Counts of objects and bytes by outcome."""

from __future__ import annotations

from include.juicefs_storage.objects.model import Comparison, ObjectOutcome
from include.juicefs_storage.objects.totals import Totals


def test_totals_survive_json() -> None:
    totals = Totals()
    totals.add(ObjectOutcome.COPIED, Comparison.ETAG, 2, 10)
    totals.add(ObjectOutcome.EXTRA, Comparison.NONE, 1, 3)
    assert Totals.from_json(totals.as_json()).counts == totals.counts

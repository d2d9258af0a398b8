"""Progress of a copy, as lines in the log."""

from __future__ import annotations

from include.juicefs_storage.objects.model import Comparison, ObjectOutcome
from include.juicefs_storage.objects.progress import Status
from include.juicefs_storage.objects.totals import Totals


def lines_of(expected: int) -> list[str]:
    lines: list[str] = []
    status, totals = Status("003 chunks/0/", objects=expected, tell=lines.append, every_s=0), Totals()
    status.update(totals, "listing")
    totals.add(ObjectOutcome.COPIED, Comparison.ETAG, 4, 8 * 2**20)
    totals.add(ObjectOutcome.EXTRA, Comparison.NONE, 1, 1)
    status.update(totals, "copying 4 objects")
    return lines


def test_the_status_says_how_far_and_how_much_longer() -> None:
    last = lines_of(4)[-1]
    assert last.startswith("003 chunks/0/: 100.0 %, 4 of 4 objects, 8 MiB copied, ")
    assert last.endswith(", ETA 0 s; copying 4 objects")


def test_without_a_plan_no_share_and_no_eta_are_made_up() -> None:
    last = lines_of(0)[-1]
    assert last.startswith("003 chunks/0/: 4 objects, 8 MiB copied, ")
    assert "ETA" not in last


def test_the_status_is_throttled() -> None:
    lines: list[str] = []
    status = Status("x", tell=lines.append, every_s=60)
    for _ in range(3):
        status.update(Totals(), "listing")
    assert lines == []

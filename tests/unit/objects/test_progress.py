"""Progress of a copy: the line in the log, the record for pages, and what is said of the time that is left."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from include.juicefs_storage.objects.comparison import Rows
from include.juicefs_storage.objects.flow import Flow
from include.juicefs_storage.objects.model import Comparison, ObjectOutcome
from include.juicefs_storage.objects.progress import Progress, Status, duration, estimate_kept
from include.juicefs_storage.objects.totals import Totals
from lab.process import wait_for

MIB = 2**20


@dataclass
class World:
    """A task of 100 objects of 1 MiB, and the time of the test."""

    now: float = 0.0
    objects: int = 100
    bytes: int = 100 * MIB

    def __post_init__(self) -> None:
        self.flow = Flow(clock=self.clock)
        self.status = Status(
            "003 chunks/0/", self.objects, self.bytes, flow=self.flow, clock=self.clock, doing="copying 100 objects"
        )

    def clock(self) -> float:
        return self.now

    def copy(self, objects: int, seconds: float) -> Progress:
        for _ in range(objects):
            self.flow.done(MIB)
        self.now += seconds
        return self.status.progress()


def totals(copied: int, extra: int = 0) -> Totals:
    counted = Totals()
    counted.add(ObjectOutcome.COPIED, Comparison.ETAG, copied, copied * MIB)
    counted.add(ObjectOutcome.EXTRA, Comparison.NONE, extra, extra)
    return counted


def test_the_line_says_how_far_how_fast_how_much_longer_and_what_happens() -> None:
    assert World().copy(25, seconds=5).to_line() == (
        "003 chunks/0/: 25.0 %, 25 of 100 objects, 25.0 MiB of 100.0 MiB; 5 objects/s, 5.0 MiB/s; 5 s so far, "
        "ETA 15 s; copying 100 objects"
    )


def test_what_the_engine_has_done_is_counted_once() -> None:
    world = World()
    world.copy(25, seconds=5)
    world.status.settle(totals(25, extra=3))
    assert world.copy(5, seconds=1).objects == 30
    # Rows whose listings settled it wait for the next checkpoint.
    rows = Rows()
    rows.add(["a", "b"], [MIB, MIB], ["", ""], ["", ""], ObjectOutcome.SAME, Comparison.ETAG)
    world.status.settle(totals(30), rows)
    assert world.status.progress().objects == 32
    world.status.begin("004 chunks/1/")
    world.status.settle(totals(8))
    found = world.status.progress()
    assert (found.label, found.objects, found.bytes) == ("004 chunks/1/", 40, 40 * MIB)


def test_what_is_compared_and_then_copied_is_one_object() -> None:
    world = World()
    world.copy(10, seconds=1)
    world.status.again(4, 4 * MIB)
    assert world.copy(4, seconds=1).objects == 10


def test_an_earlier_try_says_nothing_about_the_rate() -> None:
    world = World()
    world.status.resume(totals(60))
    found = world.copy(20, seconds=10)
    assert (found.objects, found.percent, found.objects_s, found.eta_s) == (80, 80.0, 2.0, 10.0)


def test_nothing_is_made_up_where_nothing_is_known() -> None:
    unplanned = World(objects=0, bytes=0).copy(10, seconds=5)
    assert (unplanned.percent, unplanned.eta_s, unplanned.objects_s) == (None, None, 2.0)
    assert "ETA" not in unplanned.to_line()
    idle = World().copy(0, seconds=5)
    assert (idle.percent, idle.eta_s) == (0.0, None)
    assert World().copy(10, seconds=0.1).eta_s is None, "too soon to tell"
    assert World().copy(100, seconds=5).eta_s is None, "all is done, and it goes on nevertheless"


def test_the_slower_of_objects_and_bytes_decides() -> None:
    world = World(bytes=1000 * MIB)
    found = world.copy(50, seconds=10)
    assert (found.percent, found.eta_s) == (5.0, 190.0)


def test_a_pause_counts_for_nothing_and_says_by_whom() -> None:
    world = World()
    world.copy(10, seconds=5)
    world.flow.because = "by Variable x"
    world.flow.pause()
    paused = world.copy(0, seconds=3600)
    assert (paused.state, paused.eta_s, paused.objects_s) == ("paused", None, 2.0)
    assert paused.to_line().endswith("PAUSED by Variable x")
    world.flow.because = ""
    world.flow.resume()
    found = world.copy(10, seconds=5)
    assert (found.state, found.objects_s, found.eta_s) == ("running", 2.0, 40.0)
    assert (found.elapsed_s, found.paused_s) == (3610.0, 3600.0)


def test_rates_are_those_of_the_last_minute() -> None:
    world = World(objects=10_000, bytes=0)
    for _ in range(60):
        world.copy(1, seconds=5)
    for _ in range(12):
        found = world.copy(50, seconds=5)
    assert found.objects_s == 10.0


def test_the_first_estimate_is_kept() -> None:
    world = World()
    assert world.copy(25, seconds=5).estimated_s == 20.0
    assert world.copy(5, seconds=5).estimated_s == 20.0
    assert estimate_kept(41, 58) == "estimated 41 s, took 58 s (1.4×)"  # noqa: RUF001 - as people read it
    assert estimate_kept(0, 3) == "estimated 0 s, took 3 s"


@dataclass
class Told:
    lines: list[str] = field(default_factory=list)
    records: list[Progress] = field(default_factory=list)
    looks: int = 0

    def look(self) -> None:
        self.looks += 1


def test_it_is_told_while_the_task_works_and_once_at_its_end() -> None:
    told = Told()
    status = Status("x", tell=told.lines.append, publish=told.records.append, every_s=0.01)
    with status.told(told.look):
        wait_for("three lines", lambda: len(told.lines) > 2, deadline_s=10)
    assert told.looks >= len(told.lines)
    assert [record.state for record in told.records[-2:]] == ["running", "ended"]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (119.4, "119 s"), (600, "10 min"), (36_000, "10.0 h")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text

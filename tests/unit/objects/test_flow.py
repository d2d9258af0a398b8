"""What moves through an engine: the bandwidth, by a clock of the test, and the pause."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from include.juicefs_storage.objects.flow import LOOK_S, Bandwidth, Flow

MIB = 2**20


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def move(bandwidth: Bandwidth, clock: Clock, sizes: list[int]) -> float:
    """Move bytes one after the other, as a thread does; return how long that took."""
    begun = clock.now
    for size in sizes:
        place = bandwidth.reserve(size)
        while wait_s := bandwidth.wait_s(place):
            assert wait_s <= LOOK_S, "a change of the limit must be seen soon"
            clock.now += wait_s
    return clock.now - begun


def test_bytes_move_at_the_rate_of_the_limit() -> None:
    clock = Clock()
    bandwidth = Bandwidth(10 * MIB, clock)
    # The last is allowed when all before it have moved.
    assert move(bandwidth, clock, [MIB] * 101) == pytest.approx(10)


def test_an_idle_time_is_caught_up_on_for_a_moment_only() -> None:
    clock = Clock()
    bandwidth = Bandwidth(10 * MIB, clock)
    clock.now = 3600
    assert move(bandwidth, clock, [MIB] * 101) == pytest.approx(10, abs=0.3)


def test_without_a_limit_nothing_waits() -> None:
    clock = Clock()
    assert move(Bandwidth(None, clock), clock, [MIB] * 100) == 0
    assert move(Bandwidth(0, clock), clock, [MIB] * 100) == 0


def test_a_change_is_for_those_that_wait_already() -> None:
    clock = Clock()
    bandwidth = Bandwidth(MIB, clock)
    places = [bandwidth.reserve(MIB) for _ in range(61)]
    clock.now = 10
    assert [bandwidth.wait_s(place) for place in places[:11]] == [0] * 11
    assert bandwidth.wait_s(places[60]) == LOOK_S
    bandwidth.set(50 * MIB)
    clock.now += 0.5
    assert bandwidth.wait_s(places[35]) == 0
    assert bandwidth.wait_s(places[36]) > 0
    bandwidth.set(None)
    assert bandwidth.wait_s(places[60]) == 0
    # A limit that is set again is no debt of what moved without one.
    bandwidth.set(MIB)
    assert bandwidth.wait_s(bandwidth.reserve(MIB)) == 0


def test_the_lower_the_limit_the_less_of_a_large_object_moves_at_once() -> None:
    assert Bandwidth(None).step_bytes == MIB
    assert Bandwidth(2**30).step_bytes == MIB
    assert Bandwidth(MIB).step_bytes == 65536


def test_what_is_on_its_way_counts_as_bytes_and_not_as_an_object() -> None:
    flow = Flow()
    moving = flow.moving()
    flow.done(5)
    moving.bytes = 7
    assert flow.counted() == (1, 12)


def test_pauses_add_up() -> None:
    clock = Clock()
    flow = Flow(clock=clock)
    for _ in range(2):
        flow.pause()
        flow.pause()
        clock.now += 30
        assert flow.paused
        flow.resume()
        flow.resume()
        clock.now += 1
    assert flow.paused_s == 60
    flow.await_resumed()

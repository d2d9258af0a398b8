"""The limit against simulated stores: what they take well, and what they refuse."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from itertools import count

import pytest

from include.juicefs_storage.adapters.s3.engine.concurrency import Concurrency

INF = float("inf")


@dataclass
class Stores:
    """Two sides, one request to each for an object; a client that needs some time of its own for each request.

    Attributes:
        latency_s: Of an answer, give or take a tenth.
        cpu_s: Of the client, one request after the other.
        at_once: Requests that each side takes at once, more are refused.
        per_second: Requests a second that each side takes, with bursts of a tenth of that.
    """

    latency_s: float
    cpu_s: float = 30e-6
    at_once: float = INF
    per_second: float = INF
    made: int = 0
    refused: int = 0
    limits: list[int] = field(default_factory=list)
    now: float = 0.0

    def copy(self, objects: int, concurrency: Concurrency) -> float:
        """Return the seconds that it took."""
        dice, order = random.Random(1), count()  # noqa: S311
        start, free_at, in_flight, begun, done = self.now, self.now, 0, 0, 0
        busy, tokens, since = [0, 0], [self.per_second / 10] * 2, [self.now] * 2
        events: list[tuple[float, int, str, int, float, int]] = []

        def send(side: int, began: float, tries: int) -> None:
            nonlocal free_at
            free_at = max(free_at, self.now) + self.cpu_s
            self.made += 1
            tokens[side] = min(self.per_second / 10, tokens[side] + (self.now - since[side]) * self.per_second)
            since[side] = self.now
            taken = busy[side] < self.at_once and tokens[side] >= 1
            busy[side] += taken
            tokens[side] -= taken
            at = free_at + self.latency_s * dice.uniform(0.9, 1.1)
            heapq.heappush(events, (at, next(order), "answer" if taken else "refusal", side, began, tries))

        while done < objects:
            while begun < objects and in_flight < concurrency.limit:
                in_flight, begun = in_flight + 1, begun + 1
                at = self.now + concurrency.wait_s(self.now)
                heapq.heappush(events, (at, next(order), "send", 0, at, 0))
            self.now, _, what, side, began, tries = heapq.heappop(events)
            if what == "send":
                send(side, began, tries)
            elif what == "refusal":
                self.refused += 1
                concurrency.refused(self.now)
                at = self.now + 0.1 * 2**tries * dice.uniform(0.5, 1)
                heapq.heappush(events, (at, next(order), "send", side, began, tries + 1))
            else:
                busy[side] -= 1
                if side == 0:
                    send(1, began, 0)
                else:
                    concurrency.done(began, self.now, in_flight)
                    in_flight, done = in_flight - 1, done + 1
            self.limits.append(concurrency.limit)
        return self.now - start


def test_a_distant_store_gets_as_many_as_the_client_can_feed() -> None:
    stores = Stores(latency_s=0.020)
    # 40 ms an object and 60 us of the client's own: 667 at once would be all that it can feed.
    took_s = stores.copy(5_000, Concurrency(32, 512))
    assert max(stores.limits) == 512
    # It doubles about as often as an object takes: 32, 64, 128 and 256 at once are over after 160 ms.
    assert took_s < 5_000 / 32 * 0.040 / 11


def test_near_stores_get_few() -> None:
    stores = Stores(latency_s=0.0002)
    concurrency = Concurrency(32, 512)
    took_s = stores.copy(10_000, concurrency)
    assert took_s < 1.05 * 10_000 * 2 * stores.cpu_s
    assert max(stores.limits) <= 128
    assert concurrency.limit < 64


@pytest.mark.parametrize("latency_s", [0.0002, 0.002, 0.020])
@pytest.mark.parametrize(("at_once", "per_second"), [(16, INF), (100, INF), (INF, 1000)])
def test_a_store_that_throttles_is_not_hammered(latency_s: float, at_once: float, per_second: float) -> None:
    stores = Stores(latency_s, at_once=at_once, per_second=per_second)
    stores.copy(5_000, Concurrency(32, 512))
    assert stores.made / (stores.made - stores.refused) < 1.1


def test_it_comes_close_to_what_a_store_that_throttles_gives() -> None:
    stores = Stores(0.020, per_second=1000)
    assert stores.copy(20_000, Concurrency(32, 512)) < 1.1 * 20_000 / 1000
    stores = Stores(0.020, at_once=100)
    assert stores.copy(20_000, Concurrency(32, 512)) < 2 * 20_000 * 0.020 / 100


def test_it_follows_a_store_that_becomes_slow_and_fast_again() -> None:
    stores, concurrency = Stores(latency_s=0.010), Concurrency(32, 512)
    stores.copy(20_000, concurrency)
    before = concurrency.limit
    stores.latency_s = 0.100
    stores.copy(2_000, concurrency)
    assert concurrency.limit < before / 4
    # What is slow for good is no reason to be slow oneself.
    stores.copy(20_000, concurrency)
    assert concurrency.limit > before / 2
    stores.latency_s = 0.010
    stores.copy(50_000, concurrency)
    assert before / 2 < concurrency.limit <= 512


def test_a_bound_is_kept_and_may_move_while_it_runs() -> None:
    stores, concurrency = Stores(latency_s=0.020), Concurrency(32, 40)
    stores.copy(5_000, concurrency)
    assert max(stores.limits) == 40
    concurrency.bound = 6
    assert concurrency.limit == 6
    concurrency.bound = 0
    assert concurrency.limit == 0
    concurrency.bound = 512
    stores.copy(10_000, concurrency)
    assert concurrency.limit > 200


def test_nothing_begins_while_the_store_asks_to_wait() -> None:
    concurrency = Concurrency(32, 512)
    concurrency.refused(100.0, 7.0)
    concurrency.refused(101.0, 0.0)
    assert concurrency.wait_s(103.0) == 4.0
    assert concurrency.wait_s(108.0) == 0.0
    assert concurrency.refusals == 2


def test_one_refusal_of_many_at_once_shrinks_it_once_and_many_in_turn_down_to_one() -> None:
    stores, concurrency = Stores(latency_s=0.010), Concurrency(100, 100)
    stores.copy(1_000, concurrency)
    for _ in range(50):
        concurrency.refused(stores.now + 0.001)
    assert concurrency.limit == 70
    for number in range(50):
        concurrency.refused(stores.now + 1 + number)
    assert concurrency.limit == 1


def test_few_objects_at_a_time_say_nothing_about_many() -> None:
    concurrency, now = Concurrency(32, 512), 0.0
    for _ in range(1_000):
        for number in range(5):
            concurrency.done(now, now + 0.010, number + 1)
        now += 0.010
    assert concurrency.limit == 32

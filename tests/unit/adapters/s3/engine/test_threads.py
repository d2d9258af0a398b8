"""Threads as many as the limit says, whatever moves it."""

from __future__ import annotations

import threading
import time
from collections import deque
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from include.juicefs_storage.adapters.s3.engine.concurrency import Concurrency
from include.juicefs_storage.adapters.s3.engine.threads import Threads
from include.juicefs_storage.adapters.s3.wire.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable

    from include.juicefs_storage.adapters.s3.wire.limits import Steps


class Work:
    """Jobs that note how many of them run at once."""

    def __init__(self, jobs: int, bound: int) -> None:
        self.concurrency = Concurrency(bound, bound)
        self.done: list[int] = []
        self.most = self.made = 0
        self.fails_at: int | None = None
        self.held = threading.Event()
        self.held.set()
        shared: Any = SimpleNamespace(limits=Limits(), stop=threading.Event())
        self.threads = Threads(deque(range(jobs)), self.concurrency, shared, [], self._make, self._treat)

    def _make(self) -> Any:
        self.made += 1
        return object()

    def _treat(self, worker: object, index: int, in_flight: Callable[[], int]) -> Steps[None]:
        assert worker is not None
        if index == self.fails_at:
            raise ValueError("the store is down")
        self.most = max(self.most, in_flight())
        yield 0.001
        self.held.wait(10)
        self.done.append(index)


def test_all_is_done_by_no_more_threads_than_the_limit() -> None:
    work = Work(200, 5)
    with work.threads:
        work.threads.join()
    assert sorted(work.done) == list(range(200))
    assert work.most <= 5
    assert work.made == 5


def test_the_limit_moves_while_they_run() -> None:
    work = Work(40, 2)
    work.held.clear()
    with work.threads:
        assert work.made == 2
        work.concurrency.bound, work.concurrency._limit = 6, 6.0
        work.threads.top_up()
        assert work.made == 6
        work.concurrency.bound = 1
        work.held.set()
        work.threads.join()
    assert sorted(work.done) == list(range(40))
    assert work.made == 6


def test_nothing_begins_at_a_bound_of_none_until_it_is_raised() -> None:
    work = Work(3, 0)
    with work.threads:
        time.sleep(0.01)
        assert not work.done
        work.concurrency.bound = 2
        work.threads.join()
    assert sorted(work.done) == [0, 1, 2]


def test_one_that_fails_ends_all_and_is_raised() -> None:
    work = Work(10_000, 3)
    work.fails_at = 20
    with pytest.raises(ValueError, match="the store is down"), work.threads:
        work.threads.join()
    assert len(work.done) < 1_000

"""When the write fence comes down for a client that has not moved, and when it stays."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.switch.checks import check_fence
from include.juicefs_storage.switch.write_fence import FenceWatch
from tests.support.fakes import FakeWriteFence


@pytest.mark.parametrize(
    ("fence", "catch_up", "levels"),
    [
        (None, False, []),
        (FakeWriteFence(), True, ["ok"]),
        (FakeWriteFence(), False, ["refusal"]),
        (FakeWriteFence(raised=True), True, ["refusal"]),
    ],
)
def test_a_fence_is_checked_before_anything_is_touched(fence: Any, catch_up: bool, levels: list[str]) -> None:
    assert [finding.level for finding in check_fence(fence, catch_up=catch_up)] == levels


@pytest.mark.parametrize(("seconds", "behind"), [(10, ["pod-0"]), (250, [])])
def test_it_stays_while_clients_have_time_or_have_moved(seconds: float, behind: list[str]) -> None:
    fence = FakeWriteFence(raised=True)
    FenceWatch(fence, lambda: behind).check(seconds)
    assert fence.raised


def test_it_comes_down_before_a_client_that_has_not_moved_gives_up_on_a_flush() -> None:
    fence = FakeWriteFence(raised=True)
    with pytest.raises(NeedsHumanError, match="pod-1"):
        FenceWatch(fence, lambda: ["pod-1"]).check(201)
    assert not fence.raised


def test_clients_that_have_all_moved_are_asked_once() -> None:
    asked: list[int] = []

    def behind() -> list[str]:
        asked.append(1)
        return []

    watch = FenceWatch(FakeWriteFence(raised=True), behind)
    watch.check(201)
    watch.check(202)
    assert asked == [1]


@pytest.mark.parametrize(("seconds", "stays"), [(210, True), (251, False)])
def test_where_the_clients_cannot_be_asked_it_comes_down_in_time(seconds: float, stays: bool) -> None:
    fence = FakeWriteFence(raised=True)

    def away() -> list[str]:
        raise TransientError("away")

    with nullcontext() if stays else pytest.raises(NeedsHumanError, match="away"):
        FenceWatch(fence, away).check(seconds)
    assert fence.raised is stays

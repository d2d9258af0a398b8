"""When the write fence goes up, when it comes down, and when it stays."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.switch.checks import check_fence
from include.juicefs_storage.tasks.switch import finalize as finish
from include.juicefs_storage.tasks.switch import move
from include.juicefs_storage.tasks.switch.move import Move
from tests.support.fakes import NEW, OLD


class Fence:
    def __init__(self, *, raised: bool = False) -> None:
        self.raised = raised

    def is_up(self) -> bool:
        return self.raised

    def up(self) -> None:
        self.raised = True

    def down(self) -> None:
        self.raised = False


@pytest.mark.parametrize(
    ("fence", "catch_up", "levels"),
    [
        (None, False, []),
        (Fence(), True, ["ok"]),
        (Fence(), False, ["refusal"]),
        (Fence(raised=True), True, ["refusal"]),
    ],
)
def test_a_fence_is_checked_before_anything_is_touched(fence: Any, catch_up: bool, levels: list[str]) -> None:
    assert [finding.level for finding in check_fence(fence, catch_up=catch_up)] == levels


@pytest.fixture
def fenced(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A move whose fence went up some seconds ago, with one client on each of these buckets."""

    def make(seconds: float | None, *buckets: str) -> Move:
        at = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat() if seconds is not None else None
        monkeypatch.setattr(move, "pull", lambda task, key: at)
        mounts = [SimpleNamespace(name=f"pod-{number}", bucket=bucket) for number, bucket in enumerate(buckets)]
        monkeypatch.setattr(move, "find_mount_pods", lambda cluster, setting: mounts)
        made = Move(SimpleNamespace(cluster=None))  # type: ignore[arg-type]
        before = SimpleNamespace(bucket=OLD.bucket)
        made.backup, made.new = SimpleNamespace(setting=before), SimpleNamespace(config=NEW)
        made.write_fence = Fence(raised=True)
        return made

    return make


@pytest.mark.parametrize(
    ("seconds", "buckets"), [(None, (OLD.bucket,)), (10, (OLD.bucket,)), (250, (NEW.bucket, NEW.bucket))]
)
def test_it_stays_while_clients_have_time_or_have_moved(
    fenced: Any, seconds: float | None, buckets: tuple[str, ...]
) -> None:
    made = fenced(seconds, *buckets)
    made._mind_fence()
    assert made.write_fence.raised


def test_it_comes_down_before_a_client_that_has_not_moved_gives_up_on_a_flush(fenced: Any) -> None:
    made = fenced(201, NEW.bucket, OLD.bucket)
    with pytest.raises(NeedsHumanError, match="pod-1"):
        made._mind_fence()
    assert not made.write_fence.raised


@pytest.mark.parametrize(("seconds", "stays"), [(210, True), (251, False)])
def test_where_nobody_can_be_asked_it_comes_down_in_time(
    fenced: Any, monkeypatch: pytest.MonkeyPatch, seconds: float, stays: bool
) -> None:
    made = fenced(seconds, NEW.bucket)

    def away(*_: object) -> None:
        raise TransientError("away")

    monkeypatch.setattr(move, "find_mount_pods", away)
    with nullcontext() if stays else pytest.raises(NeedsHumanError, match="away"):
        made._mind_fence()
    assert made.write_fence.raised is stays


def test_a_way_back_goes_on_where_the_fence_cannot_be_reached(fenced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = fenced(10)

    def away() -> None:
        raise TransientError("away")

    monkeypatch.setattr(made.write_fence, "down", away)
    made.lower_fence()


@pytest.mark.parametrize(
    ("outcome", "pods", "stays"),
    [
        ("switched", ["pod-1"], True),
        ("switched", [], False),
        ("reverted", ["pod-1"], True),
        ("reverted", [], False),
        ("held", ["pod-1"], False),
    ],
)
def test_at_the_end_it_stays_up_as_long_as_a_mount_pod_carries_the_old_values_and_not_where_the_run_holds(
    fenced: Any, monkeypatch: pytest.MonkeyPatch, outcome: str, pods: list[str], stays: bool
) -> None:
    made = fenced(250, NEW.bucket)
    monkeypatch.setattr(finish, "mount_pods_naming", lambda cluster, bucket: pods if bucket == OLD.bucket else [])
    (line,) = finish._fence(made, outcome)
    assert made.write_fence.raised is stays
    assert ("`pod-1`" in line) is stays
    made.write_fence = None
    assert finish._fence(made, outcome) == []


@pytest.mark.parametrize("outcome", ["planned", "refused", "rolled back", "half rolled back"])
def test_the_end_of_any_other_run_leaves_it_alone(fenced: Any, outcome: str) -> None:
    made = fenced(250, NEW.bucket)
    assert finish._fence(made, outcome) == []
    assert made.write_fence.raised

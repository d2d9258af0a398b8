"""The end of a run: what becomes of its write fence."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest

from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch import finalize
from include.juicefs_storage.tasks.switch.run import SwitchRun
from tests.support.fakes import OLD, FakeWriteFence, backup


@pytest.fixture
def run() -> SwitchRun:
    made = SwitchRun(cast("Runtime", SimpleNamespace(clusters=None)))
    made.backup = backup("myjfs.run", datetime(2026, 1, 1, tzinfo=UTC))
    made.write_fence = FakeWriteFence(raised=True)
    return made


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
def test_a_fence_stays_up_while_a_mount_pod_carries_the_old_values_and_never_where_the_run_holds(
    run: SwitchRun, monkeypatch: pytest.MonkeyPatch, outcome: str, pods: list[str], stays: bool
) -> None:
    monkeypatch.setattr(finalize, "mount_pods_naming", lambda cluster, bucket: pods if bucket == OLD.bucket else [])
    (line,) = finalize._fence(run, outcome)
    assert run.write_fence
    assert run.write_fence.is_up() is stays
    assert ("`pod-1`" in line) is stays
    run.write_fence = None
    assert finalize._fence(run, outcome) == []


@pytest.mark.parametrize("outcome", ["planned", "refused", "rolled back", "half rolled back"])
def test_the_end_of_any_other_run_leaves_the_fence_alone(run: SwitchRun, outcome: str) -> None:
    assert finalize._fence(run, outcome) == []
    assert run.write_fence
    assert run.write_fence.is_up()

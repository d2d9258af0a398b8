"""The write fence during a run: who is behind it, and a fence that cannot be reached."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import cast

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch import write_fence
from include.juicefs_storage.tasks.switch.run import SwitchRun
from tests.support.fakes import NEW, OLD, FakeStore, FakeWriteFence, backup


@pytest.fixture
def run() -> SwitchRun:
    made = SwitchRun(cast("Runtime", SimpleNamespace(cluster=None)))
    made.backup = backup("myjfs.run", datetime(2026, 1, 1, tzinfo=UTC))
    made.new = Location(NEW, cast("Bucket", FakeStore()))
    made.write_fence = FakeWriteFence(raised=True)
    return made


@pytest.mark.parametrize(
    ("seconds", "buckets", "behind"),
    [
        (None, [OLD.bucket], []),
        (10, [OLD.bucket], []),
        (250, [NEW.bucket, NEW.bucket], []),
        (201, [NEW.bucket, OLD.bucket], ["pod-1"]),
    ],
)
def test_clients_on_the_old_store_are_behind_once_the_fence_is_old(
    run: SwitchRun, monkeypatch: pytest.MonkeyPatch, seconds: float | None, buckets: list[str], behind: list[str]
) -> None:
    at = (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat() if seconds is not None else None
    monkeypatch.setattr(write_fence, "pull", lambda task, key: at)
    mounts = [SimpleNamespace(name=f"pod-{number}", bucket=bucket) for number, bucket in enumerate(buckets)]
    recorded = {mount.uid for mount in run.carried_out.mount_pods}
    pods = SimpleNamespace(mounts=lambda among: mounts if among == recorded else [])
    monkeypatch.setattr(run, "runtime", SimpleNamespace(volume_pods=lambda setting: pods))
    check = write_fence.watch(run)
    if behind:
        with pytest.raises(NeedsHumanError, match=behind[0]):
            check()
    else:
        check()
    assert run.write_fence
    assert run.write_fence.is_up() is not bool(behind)


def test_a_run_without_a_fence_has_nothing_to_watch(run: SwitchRun) -> None:
    run.write_fence = None
    write_fence.watch(run)()
    assert write_fence.put_up(run) is False


def test_a_way_back_continues_where_the_fence_cannot_be_reached(
    run: SwitchRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> None:
        raise TransientError("away")

    monkeypatch.setattr(run.write_fence, "down", away)
    write_fence.take_down(run)

"""The Lease of a volume: who may have it, when it lapses, and what a write that did not come through means."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.ports import Lease, LeaseStore
from include.juicefs_storage.switch.lease import VolumeLease, VolumeLeases, check_leases, lease_name
from include.juicefs_storage.volume.clusters import FIRST

NAME = "juicefs-storage-uuid"
MINUTE = timedelta(minutes=1)


@dataclass
class FakeLeases(LeaseStore):
    """One Lease with a resourceVersion, as the API server keeps it. `trouble` happens to the next writes, in order."""

    namespace: str = "juicefs"
    kept: Lease | None = None
    trouble: list[Callable[[Lease], bool]] = field(default_factory=list)
    writes: int = 0

    @property
    def held(self) -> Lease:
        assert self.kept
        return self.kept

    def lease(self, name: str) -> Lease | None:
        assert name == NAME
        return self.kept

    def write_lease(self, lease: Lease) -> bool:
        self.writes += 1
        if self.trouble:
            return self.trouble.pop(0)(lease)
        return self.put(lease)

    def put(self, lease: Lease) -> bool:
        version = self.kept.resource_version if self.kept else ""
        if lease.resource_version != version:
            return False
        self.kept = replace(lease, resource_version=str(int(version or 0) + 1))
        return True

    def lose_answer(self, lease: Lease) -> bool:
        self.put(lease)
        raise TransientError("no answer")

    def lose_request(self, _: Lease) -> bool:
        raise TransientError("no connection")


@dataclass
class Clock:
    time: datetime = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.time


#: A run's Lease, by the name of its holder.
TakeAs: TypeAlias = Callable[[str], VolumeLease]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def leases() -> FakeLeases:
    return FakeLeases()


@pytest.fixture
def run(leases: FakeLeases, clock: Clock) -> TakeAs:
    return lambda holder: VolumeLease(leases, NAME, holder, clock, duration_s=600, sleep=lambda seconds: None)


def test_the_name_derives_from_the_volume() -> None:
    assert lease_name("ABCDEF01-2222-3333-4444-555555555555") == "juicefs-storage-abcdef01-2222-3333-4444-555555555555"


def test_the_second_run_is_refused_with_the_holder_and_its_expiry(run: TakeAs, clock: Clock) -> None:
    run("dag/first").acquire()
    clock.time += 3 * MINUTE
    run("dag/first").confirm()
    with pytest.raises(NeedsHumanError) as refused:
        run("dag/second").acquire()
    assert "dag/first" in refused.value.problem
    assert "since 2026-05-04 12:00:00 UTC" in refused.value.problem
    assert "until 2026-05-04 12:13:00 UTC" in refused.value.problem
    assert f"delete lease {NAME}" in refused.value.next_step


def test_tasks_of_one_run_share_the_hold(run: TakeAs, leases: FakeLeases, clock: Clock) -> None:
    run("dag/first").acquire()
    clock.time += MINUTE
    run("dag/first").acquire()
    assert leases.held.renewed_at - leases.held.acquired_at == MINUTE
    assert leases.held.transitions == 0


def test_an_expired_lease_is_taken_over(run: TakeAs, leases: FakeLeases, clock: Clock) -> None:
    run("dag/dead").acquire()
    clock.time += 10 * MINUTE - timedelta(seconds=1)
    with pytest.raises(NeedsHumanError):
        run("dag/second").acquire()
    clock.time += timedelta(seconds=1)
    run("dag/second").acquire()
    assert (leases.held.holder, leases.held.transitions, leases.held.acquired_at) == ("dag/second", 1, clock.time)


def test_a_run_that_lost_its_lease_stops_before_its_next_write(run: TakeAs, clock: Clock) -> None:
    run("dag/slow").acquire()
    clock.time += 11 * MINUTE
    run("dag/second").acquire()
    with pytest.raises(NeedsHumanError, match="dag/second"):
        run("dag/slow").confirm()
    # Also when the other run has ended meanwhile: what was planned may be out of date.
    run("dag/second").release()
    with pytest.raises(NeedsHumanError, match="no longer holds"):
        run("dag/slow").confirm()


def test_an_expired_lease_that_nobody_took_is_renewed(run: TakeAs, leases: FakeLeases, clock: Clock) -> None:
    run("dag/slow").acquire()
    clock.time += 60 * MINUTE
    run("dag/slow").confirm()
    assert leases.held.renewed_at == clock.time


def test_only_the_holder_gives_it_back(run: TakeAs, leases: FakeLeases) -> None:
    run("dag/first").acquire()
    assert run("dag/second").release() is False
    assert leases.held.holder == "dag/first"
    assert run("dag/first").release() is True
    assert run("dag/first").release() is False
    run("dag/second").acquire()
    assert leases.held.holder == "dag/second"


def test_a_lease_that_was_deleted_stops_its_holder(run: TakeAs, leases: FakeLeases) -> None:
    run("dag/first").acquire()
    leases.kept = None
    with pytest.raises(NeedsHumanError, match="given back or deleted"):
        run("dag/first").confirm()
    assert leases.kept is None
    run("dag/first").acquire()
    run("dag/first").confirm()


@pytest.mark.parametrize("trouble", ["lose_answer", "lose_request"])
def test_a_write_without_an_answer_is_looked_up(run: TakeAs, leases: FakeLeases, trouble: str) -> None:
    leases.trouble = [getattr(leases, trouble)]
    run("dag/first").acquire()
    assert leases.held.holder == "dag/first"
    assert leases.writes == (1 if trouble == "lose_answer" else 2)
    leases.trouble = [getattr(leases, trouble)]
    assert run("dag/first").release() is True
    assert leases.held.holder == ""


def test_who_loses_the_race_is_refused(run: TakeAs, leases: FakeLeases, clock: Clock) -> None:
    """Both find no Lease; the other one's write comes first."""

    def other_was_faster(lease: Lease) -> bool:
        leases.put(replace(lease, holder="dag/other"))
        return leases.put(lease)

    leases.trouble = [other_was_faster]
    with pytest.raises(NeedsHumanError, match="dag/other"):
        run("dag/first").acquire()
    assert leases.held.holder == "dag/other"


def test_a_lease_that_cannot_be_written_is_not_taken_for_held(run: TakeAs, leases: FakeLeases) -> None:
    leases.trouble = [leases.lose_request] * 99
    with pytest.raises(TransientError):
        run("dag/first").acquire()
    assert leases.writes < 10
    leases.trouble = [lambda lease: False] * 99
    with pytest.raises(TransientError, match="written by others"):
        run("dag/first").acquire()


def test_a_long_task_renews_on_the_way(
    run: TakeAs, leases: FakeLeases, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("dag/first").acquire()
    clock.time += MINUTE
    renewed = threading.Event()
    write = leases.write_lease

    def write_and_say(lease: Lease) -> bool:
        written = write(lease)
        renewed.set()
        return written

    monkeypatch.setattr(leases, "write_lease", write_and_say)
    with run("dag/first").kept_renewed(every_s=0.01):
        assert renewed.wait(10)
    assert leases.held.renewed_at == clock.time
    leases.kept = replace(leases.held, holder="dag/second")
    before = leases.kept
    with run("dag/first").kept_renewed(every_s=0.001):
        threading.Event().wait(0.05)
    assert leases.kept == before


def alone(lease: VolumeLease) -> VolumeLeases:
    return VolumeLeases({FIRST: lease}, needs_all=True)


def test_the_check_refuses_where_another_run_is_at_work(run: TakeAs, clock: Clock) -> None:
    assert [finding.level for finding in check_leases(alone(run("dag/first")))] == ["ok"]
    run("dag/first").acquire()
    assert [finding.level for finding in check_leases(alone(run("dag/first")))] == ["ok"]
    (finding,) = check_leases(alone(run("dag/second")))
    assert (finding.level, "dag/first" in finding.message) == ("refusal", True)
    assert "delete lease" in finding.remedy
    clock.time += 10 * MINUTE
    assert [finding.level for finding in check_leases(alone(run("dag/second")))] == ["ok"]


class Away(FakeLeases):
    """A cluster that does not answer."""

    def lease(self, name: str) -> Lease | None:
        self.writes += 1
        raise TransientError("The Kubernetes API cannot be reached.")


def in_both(holder: str, west: FakeLeases, east: FakeLeases, clock: Clock, *, needs_all: bool = True) -> VolumeLeases:
    leases = {FIRST: west, "east": east}
    made = {
        name: VolumeLease(kept, NAME, holder, clock, sleep=lambda _: None, cluster=name)
        for name, kept in leases.items()
    }
    return VolumeLeases(made, needs_all=needs_all)


def test_two_runs_whose_first_clusters_are_not_the_same_meet(leases: FakeLeases, clock: Clock) -> None:
    east = FakeLeases()
    in_both("dag/of-the-west", leases, east, clock).acquire()
    with pytest.raises(NeedsHumanError, match="dag/of-the-west holds this volume"):
        in_both("dag/of-the-east", east, leases, clock).acquire()
    (finding,) = check_leases(in_both("dag/of-the-north", FakeLeases(), east, clock))
    assert (finding.level, "(in cluster east)" in finding.remedy) == ("refusal", True)
    ours = in_both("dag/of-the-west", leases, east, clock)
    ours.confirm()
    ours.release()
    assert (leases.held.holder, east.held.holder) == ("", "")


def test_a_cluster_that_is_away_stops_a_run_forward_and_no_way_back(leases: FakeLeases, clock: Clock) -> None:
    with pytest.raises(TransientError, match="Cluster east: "):
        in_both("dag/first", leases, Away(), clock).acquire()
    away = Away()
    back = in_both("dag/first", leases, away, clock, needs_all=False)
    back.acquire()
    back.confirm()
    back.release()
    assert away.writes == 1, "it is not asked again"
    with pytest.raises(TransientError):
        in_both("dag/first", Away(), leases, clock, needs_all=False).acquire()

"""What one store has and the other lacks is copied, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.objects.model import Compared, Comparison, Copied, Listed, ObjectOutcome
from include.juicefs_storage.switch.catch_up import CatchUp
from tests.support.fakes import FakeMetadata, FakeStore, setting

ROW = setting()


def key(slice_id: int) -> str:
    return f"myjfs/chunks/0/0/{slice_id}_0_100"


@dataclass
class FakeEngine:
    """Copies between two stores; `outcomes` says how the copy of a key ends instead."""

    source: FakeStore
    target: FakeStore
    outcomes: dict[str, ObjectOutcome] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    then: Callable[[], object] = int
    calls: list[list[str]] = field(default_factory=list)

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        assert not overwrite
        self.calls.append([name for name, _, _ in objects])
        done = [self._copy(name) for name, _, _ in objects]
        self.then()
        return done

    def _copy(self, name: str) -> Copied:
        if outcome := self.outcomes.get(name):
            return Copied(outcome, detail="refused")
        self.target.objects[name] = self.source.objects[name]
        return Copied(ObjectOutcome.COPIED, comparison=Comparison.ETAG, detail=self.damaged.get(name, ""))

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        raise NotImplementedError


@dataclass
class World:
    """Ten blocks that files need; the old store has them and one that no file needs, the new one has some."""

    metadata: FakeMetadata = field(default_factory=lambda: FakeMetadata(ROW, [(number, 100) for number in range(10)]))
    source: FakeStore = field(default_factory=lambda: FakeStore({key(number): 100 for number in range(11)}))
    target: FakeStore = field(default_factory=lambda: FakeStore({key(number): 100 for number in range(6)}))
    time: float = 0.0
    confirmed: int = 0
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.engine = FakeEngine(self.source, self.target)

    def confirm(self) -> None:
        self.confirmed += 1
        if self.error:
            raise self.error

    def catch_up(self, timeout_s: float = 60) -> CatchUp:
        return CatchUp(
            self.metadata, ROW, self.source, self.target, self.engine, self.confirm, lambda: self.time, timeout_s
        )


def test_what_the_target_lacks_is_copied_and_nothing_else_is_touched() -> None:
    world = World()
    world.target.objects |= {key(2): 7, key(99): 5}
    before = dict(world.target.objects)
    work = world.catch_up()
    difference = work.run()
    assert (work.copied, work.copied_bytes) == (5, 500), "the block that no file needs yet as well"
    assert world.target.objects == before | {key(number): 100 for number in range(6, 11)}
    assert (difference.missing, difference.different) == (0, 1)
    assert world.confirmed == len(world.engine.calls) == 1


def test_a_copy_that_is_complete_writes_nothing() -> None:
    world = World()
    world.target.objects = dict(world.source.objects)
    work = world.catch_up()
    assert work.run().missing == 0
    assert (work.copied, world.confirmed) == (0, 0)


def test_an_upload_that_lands_during_a_pass_is_copied_by_the_next() -> None:
    world = World()

    def upload() -> None:
        world.engine.then = int
        world.metadata.rows.append((50, 100))
        world.source.objects[key(50)] = 100

    world.engine.then = upload
    work = world.catch_up()
    assert work.run().missing == 0
    assert work.copied == 6
    assert key(50) in world.target.objects


def test_a_block_that_was_damaged_before_is_copied_and_named() -> None:
    world = World()
    world.engine.damaged = {key(7): "its content has the CRC32C 1, JuiceFS wrote 2"}
    work = world.catch_up()
    assert work.run().missing == 0
    assert work.damaged == [key(7)]


def test_a_block_that_no_store_has_is_reported_as_missing() -> None:
    world = World()
    del world.source.objects[key(8)]
    difference = world.catch_up().run()
    assert difference.missing == 1
    assert difference.examples == [f"missing: {key(8)}"]


def test_a_run_that_lost_its_lease_writes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("include.juicefs_storage.switch.catch_up._CALL_BYTES", 200)
    world = World()

    def lose() -> None:
        world.error = NeedsHumanError("another run holds the volume")

    world.engine.then = lose
    with pytest.raises(NeedsHumanError, match="another run"):
        world.catch_up().run()
    assert world.engine.calls == [[key(10), key(6)]], "ordered as the store lists them"


def test_a_pass_that_takes_too_long_ends_between_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("include.juicefs_storage.switch.catch_up._CALL_BYTES", 100)
    world = World()

    def late() -> None:
        world.time += 40

    world.engine.then = late
    with pytest.raises(TransientError, match=r"did not end within 60 s; 2 blocks are copied"):
        world.catch_up().run()


@pytest.mark.parametrize("outcome", [ObjectOutcome.FAILED, ObjectOutcome.CHANGED, ObjectOutcome.DIFFERENT])
def test_a_block_that_cannot_be_copied_fails_the_task_when_the_others_are_copied(outcome: ObjectOutcome) -> None:
    world = World()
    world.engine.outcomes = {key(7): outcome}
    work = world.catch_up()
    with pytest.raises(TransientError, match=rf"1 blocks could not be copied, such as {key(7)} \({outcome} refused\)"):
        work.run()
    assert work.copied == 4


def test_a_block_that_another_copied_or_a_client_deleted_meanwhile_is_no_failure() -> None:
    world = World()
    world.engine.outcomes = {key(6): ObjectOutcome.SAME, key(7): ObjectOutcome.VANISHED}
    world.metadata.rows = [(number, 100) for number in range(6)]
    work = world.catch_up()
    assert work.run().missing == 0
    assert work.copied == 3

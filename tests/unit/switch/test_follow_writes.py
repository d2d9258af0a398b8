"""What clients commit while they move: what of it is copied, and when."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.objects.model import Copied, Listed, ObjectOutcome
from include.juicefs_storage.ports import Session
from include.juicefs_storage.switch import follow_writes
from include.juicefs_storage.switch.follow_writes import Follower
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.needed import ID_BATCH
from include.juicefs_storage.volume.slice_batches import SliceBatches
from tests.support.fakes import FakeMetadata, FakeStore, setting

ROW = setting()
MIB = 1 << 20


class World:
    """Two stores and a volume whose clients write to the first."""

    def __init__(self, last_id: int = 1) -> None:
        client = Session(1, "1.4.2", "h", "/m", datetime.now(UTC))
        self.metadata, self.source, self.target = FakeMetadata(ROW, live=[client]), FakeStore(), FakeStore()
        self.confirmed = 0
        self.asked: list[int] = []
        ticks = itertools.count(step=0.001)
        self.commit(last_id, on=[self.source, self.target])
        self.follower = Follower(
            self.metadata, ROW, self.source, self.target, self.copy, self.confirm_lease, lambda: next(ticks)
        )

    def commit(self, slice_id: int, size: int = 100, on: Sequence[FakeStore] = ()) -> list[str]:
        """A slice, whose blocks are on these stores."""
        self.metadata.rows.append((slice_id, size))
        keys = dict(block_objects(ROW, slice_id, size))
        for store in on:
            store.objects |= keys
        return list(keys)

    def look(self) -> int:
        self.follower.look()
        return self.follower.waiting

    def copy(self, objects: Sequence[Listed]) -> list[Copied]:
        self.asked.append(len(objects))
        self.target.objects |= {key: size for key, size, _ in objects}
        return [Copied(ObjectOutcome.COPIED) for _ in objects]

    def confirm_lease(self) -> None:
        self.confirmed += 1


def test_what_is_committed_to_the_old_store_is_copied_and_what_is_on_the_new_one_is_left() -> None:
    world = World()
    assert world.look() == 0
    stray, moved = world.commit(2, 5 * MIB, on=[world.source]), world.commit(3, on=[world.target])
    assert world.look() == 0
    assert {*stray, *moved} <= world.target.objects.keys()
    assert (world.follower.copied, world.follower.copied_bytes, world.asked) == (2, 5 * MIB, [2])
    assert world.follower.slowest_s > 0
    assert world.look() == 0
    assert world.asked == [2], "nothing is looked at twice"


def test_a_block_on_neither_store_is_waited_for_until_its_slice_is_gone() -> None:
    world = World()
    late, gone = world.commit(2), world.commit(3)
    assert world.look() == 2
    world.source.objects |= dict.fromkeys(late, 100)
    world.metadata.rows.remove((3, 100))
    assert world.look() == 0
    assert late[0] in world.target.objects
    assert gone[0] not in world.target.objects


def test_a_client_that_writes_with_ids_of_an_old_batch_is_followed_too() -> None:
    """The others have taken many batches since it took its own."""
    world = World(last_id=10 * ID_BATCH)
    before = world.commit(ID_BATCH, on=[world.source])
    world.look()
    assert world.asked == [], "what was committed before is not its business"
    recent, old = (world.commit(slice_id, on=[world.source]) for slice_id in (10 * ID_BATCH - 9, ID_BATCH + 7))
    for _ in range(2):  # the pass under way may be beyond it
        world.look()
    assert {*recent, *old} <= world.target.objects.keys()
    assert before[0] not in world.target.objects
    assert world.look() == 0


def test_many_blocks_are_looked_up_by_listing_and_the_newest_come_first() -> None:
    world = World()
    for slice_id in range(2, 2502):
        world.commit(slice_id, on=[world.source])
    for slice_id in range(2502, 2602):
        world.commit(slice_id, on=[world.source, world.target])
    left = world.look()
    assert world.asked == [1900]
    assert left == 601
    assert world.look() == 0


def test_a_failure_is_reported_and_the_next_poll_makes_up_for_it() -> None:
    world = World()
    world.commit(2, on=[world.source])
    copy, world.follower.copy = (
        world.follower.copy,
        lambda objects: [Copied(ObjectOutcome.FAILED, detail="no") for _ in objects],
    )
    assert world.look() == 1

    def down(key: str) -> bool:
        raise TransientError("down")

    world.target.exists = down  # type: ignore[method-assign]
    with pytest.raises(TransientError):
        world.follower.look()
    del world.target.exists
    world.follower.copy = copy
    assert world.look() == 0
    assert world.follower.copied == 1


def test_nothing_is_copied_by_a_run_that_lost_its_lease() -> None:
    world = World()
    world.commit(2, on=[world.source])

    def lost() -> None:
        raise NeedsHumanError("lost")

    world.follower.confirm_lease = lost
    with pytest.raises(NeedsHumanError):
        world.follower.look()
    assert world.asked == []


def test_it_looks_once_more_when_all_have_moved_and_a_failed_look_does_not_end_it() -> None:
    world = World()
    asked = iter([False, False, True])
    polls: list[str] = []
    exists = world.target.exists

    def down(key: str) -> bool:
        raise TransientError("down")

    def sleep(seconds: float) -> None:
        polls.append(f"{world.follower.copied} copied {world.follower.problem}".strip())
        world.commit(1 + len(polls), on=[world.source])
        world.target.exists = down if len(polls) == 2 else exists  # type: ignore[method-assign]

    world.follower.follow(lambda: next(asked), lambda: polls.append("begun"), sleep)
    assert polls == ["begun", "0 copied", "0 copied down"]
    assert (world.follower.copied, world.follower.problem) == (2, "")


@pytest.mark.parametrize("cancelled", [False, True])
def test_the_last_look_is_left_out_where_what_follows_waits(cancelled: bool) -> None:
    world = World()
    overs = iter([False, True])

    def sleep(_: float) -> None:
        world.commit(2, on=[world.source])

    world.follower.follow(lambda: next(overs), lambda: None, sleep, cancelled=lambda: cancelled)
    assert world.follower.copied == (0 if cancelled else 1)


def test_a_store_that_fails_is_not_asked_for_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.look()
    for slice_id in range(2, 32):
        world.commit(slice_id, on=[world.source])
    asked: list[str] = []

    def hang(key: str) -> bool:
        asked.append(key)
        time.sleep(0.05)  # so that one fails while others wait to be asked
        raise TransientError("away")

    monkeypatch.setattr(world.target, "exists", hang)
    with pytest.raises(TransientError):
        world.look()
    assert 1 <= len(asked) < 30


def test_what_was_committed_since_the_copy_before_is_copied_too() -> None:
    """With ids of old batches, before the follower has looked for the first time."""
    world = World(last_id=10 * ID_BATCH)
    for slice_id in (ID_BATCH + 1, 2 * ID_BATCH, 3 * ID_BATCH + 5):
        world.commit(slice_id, on=[world.source, world.target])
    untouched = world.commit(4 * ID_BATCH, on=[world.source])
    world.follower.compared = SliceBatches.from_text(SliceBatches.of(world.metadata.slices()).to_text())
    late = [key for slice_id in (ID_BATCH + 9, 3 * ID_BATCH) for key in world.commit(slice_id, on=[world.source])]
    empty = world.commit(7 * ID_BATCH + 1, on=[world.source])
    assert world.look() == 0
    assert {*late, *empty} <= world.target.objects.keys()
    assert untouched[0] not in world.target.objects, "the copy before has seen it"
    assert world.follower.copied == 3
    for _ in range(2):
        world.look()
    assert world.follower.copied == 3


def test_a_first_pass_that_was_broken_off_continues_at_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow_writes, "_OLD_ROWS", 3)
    world = World(last_id=10 * ID_BATCH)
    for slice_id in range(ID_BATCH, ID_BATCH + 8):
        world.commit(slice_id, on=[world.source])
    world.follower.compared = SliceBatches.of(world.metadata.slices())
    read, broken = world.metadata.slices, iter([True])

    def slices(first_id: int = 0, end_id: int | None = None) -> Iterator[tuple[int, int]]:
        for number, row in enumerate(read(first_id, end_id)):
            if number == 4 and next(broken, False):
                raise TransientError("away")
            yield row

    monkeypatch.setattr(world.metadata, "slices", slices)
    with pytest.raises(TransientError):
        world.follower.look()
    assert world.look() == 0
    assert world.follower.copied == 0, "no batch has changed"


def test_a_canary_is_left_where_its_client_put_it() -> None:
    """Copied to the new store it would prove a client that is stuck on the old one."""
    world = World()
    world.look()
    (canary,) = world.commit(2, on=[world.source])
    world.metadata.canaries = [2]
    world.look()
    world.look()
    assert canary not in world.target.objects
    # Removed, it is a file of the trash like any other.
    world.metadata.canaries = []
    assert world.look() == 0
    assert canary in world.target.objects

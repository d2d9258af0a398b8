"""A door is closed only where a probe proves it; a rehearsal of switching off ends at the first trouble."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.finish.door import Door
from include.juicefs_storage.objects.bucket import StoredObject
from tests.support.fakes import FakeStore

KEY = "myjfs/.storage-switch-door"


@dataclass
class Store(FakeStore):
    """A store that an administrator can close."""

    writable: bool | None = True
    readable: bool = True

    def takes_writes(self, key: str) -> bool | None:
        return self.writable

    def head(self, key: str) -> StoredObject | None:
        if not self.readable:
            raise PermanentError("403")
        return None


@dataclass
class Fence:
    """Closes the old store some polls after it was told, and perhaps more than that."""

    left: Store
    closes: Callable[[Fence], None]
    calls: list[str] = field(default_factory=list)

    def is_up(self) -> bool:
        return self.calls[-1:] == ["up"]

    def up(self) -> None:
        self.calls.append("up")
        self.closes(self)

    def down(self) -> None:
        self.calls.append("down")
        self.left.writable = self.left.readable = True


class World:
    def __init__(self) -> None:
        self.left, self.own, self.time = Store(name="left"), Store(name="own"), 0.0
        self.later: list[Callable[[], None]] = []
        self.door = Door(self.left, self.own, KEY, lambda: self.time, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        for do in self.later:
            do()

    def fence(self, closes: Callable[[Fence], None]) -> Fence:
        return Fence(self.left, closes)

    def refuse_writes(self, _: Fence | None = None) -> None:
        self.left.writable = False

    def refuse_all(self, _: Fence | None = None) -> None:
        self.left.writable = self.left.readable = False


@pytest.fixture
def world() -> World:
    return World()


def test_a_door_is_closed_and_stays_closed(world: World) -> None:
    fence = world.fence(lambda _: world.later.append(world.refuse_writes))
    assert world.door.close(fence) == "left refuses the old key's writes: the fence is up, and stays up"
    assert (fence.calls, world.time) == (["up"], 0.5)


@pytest.mark.parametrize("told", [True, None], ids=["it goes on to take writes", "it cannot be told"])
def test_a_door_that_is_not_seen_to_close_fails(world: World, told: bool | None) -> None:
    def close(_: Fence) -> None:
        world.left.writable = told

    with pytest.raises(NeedsHumanError, match="is not seen to refuse"):
        world.door.close(world.fence(close))


def test_a_fence_that_shuts_the_volume_out_comes_down_at_once(world: World) -> None:
    def close(_: Fence) -> None:
        world.left.writable = world.own.writable = False

    fence = world.fence(close)
    with pytest.raises(NeedsHumanError, match="own, which the volume is on, refused"):
        world.door.close(fence)
    assert (fence.calls, world.time) == (["up", "down"], 0.0)


@pytest.mark.parametrize("writable", [True, None])
def test_without_an_administrator_a_person_is_told_how(world: World, writable: bool | None) -> None:
    world.left.writable = writable
    with pytest.raises(NeedsHumanError, match="mc admin user disable"):
        world.door.close(None)
    world.left.writable = False
    assert "closed by hand" in world.door.close(None)


def test_a_rehearsal_of_switching_off_ends_by_itself(world: World) -> None:
    fence = world.fence(world.refuse_all)
    seen = world.door.rehearse_off(fence, list, lambda: 0, for_s=60)
    assert (seen.denied_s, seen.looks, seen.errors) == (60, 60, 0)
    assert fence.calls == ["up", "down"]


def test_the_first_trouble_ends_it(world: World) -> None:
    fence = world.fence(world.refuse_all)

    def trouble() -> list[str]:
        return ["3 requests of pod a failed"] if world.time >= 10 else []

    with pytest.raises(NeedsHumanError, match=r"Switched off for 10\.0 s.*pod a failed") as error:
        world.door.rehearse_off(fence, trouble, lambda: 3, for_s=60)
    assert "3 requests of clients failed" in error.value.state
    assert (fence.calls, world.time) == (["up", "down"], 10.0)


def away() -> list[str]:
    raise TransientError("The API does not answer.")


@pytest.mark.parametrize(
    ("closes", "trouble", "words"),
    [
        (lambda _: None, list, "serves the old key 20 s"),
        (lambda fence: setattr(fence.left, "readable", False), away, "could not be looked at"),
    ],
    ids=["it is not denied", "nobody can look"],
)
def test_a_rehearsal_that_shows_nothing_fails_and_is_undone(
    world: World, closes: Callable[[Fence], None], trouble: Callable[[], list[str]], words: str
) -> None:
    fence = world.fence(closes)
    with pytest.raises(StorageSwitchError, match=words):
        world.door.rehearse_off(fence, trouble, lambda: 0, for_s=60)
    assert fence.calls == ["up", "down"]


def test_it_is_undone_where_the_volume_itself_is_shut_out(world: World) -> None:
    def close(_: Fence) -> None:
        world.left.readable = world.own.readable = False

    fence = world.fence(close)
    with pytest.raises(PermanentError):
        world.door.rehearse_off(fence, list, lambda: 0, for_s=60)
    assert fence.calls == ["up", "down"]

"""A watch ends when nothing was found for long enough; whatever is found begins the time again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import cast

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.finish.watch import Watch, Watched, WatchRecord
from include.juicefs_storage.objects.model import Compared, Copied, Engine, Listed, ObjectOutcome
from include.juicefs_storage.ports import Pod, Session
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods
from tests.support.fakes import MOUNT, NEW, FakeMetadata, FakeStore, FakeVault, setting

MOVED = datetime(2026, 11, 28, 3, 0, tzinfo=UTC)
BLOCK = "myjfs/chunks/0/0/9_0_4096"
DAY_S = 86_400.0
HOST = Session(7, "1.4.0", "host-1", "/mnt/jfs", MOVED)
POD = Pod("juicefs", MOUNT.name, MOUNT.uid, "node-1", True, 0, "", {}, (f"mount.juicefs x {MOUNT.mount_path}",), ())


@dataclass
class Pods:
    """The mount pods of a volume, with their clients as a test says."""

    live: list[MountPod]

    @property
    def clusters(self) -> Pods:
        return self

    def pods(self, label_selector: str = "") -> list[Pod]:
        return [POD]

    def mounts(self) -> list[MountPod]:
        return self.live


@dataclass
class Copier(Engine):
    """Copies sizes, unless it fails."""

    source: FakeStore
    target: FakeStore
    fails: bool = False

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        assert not overwrite
        if self.fails:
            return [Copied(ObjectOutcome.FAILED) for _ in objects]
        self.target.objects |= {name: size for name, size, _ in objects}
        return [Copied(ObjectOutcome.COPIED) for _ in objects]

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        raise AssertionError


@dataclass
class World:
    """A volume that was moved to NEW, with one mount pod, and a clock."""

    left: FakeStore = field(default_factory=lambda: FakeStore(name="left"))
    target: FakeStore = field(default_factory=lambda: FakeStore(name="target"))
    metadata: FakeMetadata = field(default_factory=lambda: FakeMetadata(setting(NEW), rows=[(9, 4096)]))
    pods: Pods = field(default_factory=lambda: Pods([replace_mount()]))
    at: datetime = MOVED + timedelta(hours=1)
    renews: bool = True

    def __post_init__(self) -> None:
        self.copier = Copier(self.left, self.target)
        self.watch = Watch(
            self.metadata, cast("VolumePods", self.pods), setting(NEW), self.left, self.target, self.copier,
            lambda: None, lambda: self.at, self.sleep,
        )  # fmt: skip
        self.seen = self.watch.begin("manual__9", MOVED)

    def sleep(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)
        if self.renews:
            self.metadata.live = [replace(row, expires=self.at) for row in self.metadata.live]

    def look(self, after: timedelta = timedelta(minutes=5)) -> Watched:
        self.at += after
        self.left.time = self.at
        self.seen = self.watch.look(self.seen)
        return self.seen


def replace_mount(errors: float = 0, bucket: str = NEW.bucket) -> MountPod:
    return MOUNT.model_copy(update={"bucket": bucket, "request_errors": errors})


@pytest.fixture
def world() -> World:
    return World()


def test_nothing_is_found_and_the_time_runs(world: World) -> None:
    began = world.at
    for _ in range(3):
        seen = world.look()
    assert (seen.looks, seen.found, seen.copied) == (3, (), 0)
    assert seen.ends_at(DAY_S) == began + timedelta(days=1)
    assert seen.line == f"quiet since {began:%Y-%m-%d %H:%M:%S} UTC: 3 looks, 0 findings"


def test_a_block_that_came_to_the_left_store_is_copied_and_begins_the_time_again(world: World) -> None:
    world.look()
    world.left.objects[BLOCK] = 4096
    world.left.written[BLOCK] = world.at
    seen = world.look()
    assert world.target.objects == {BLOCK: 4096}
    assert seen.quiet_since == world.at
    assert (seen.copied, len(seen.found)) == (1, 1)
    assert f"1 block came to left that target lacked, such as {BLOCK}; copied, and looked at once more" in seen.found[0]
    quiet = world.look()
    assert (quiet.quiet_since, quiet.copied) == (seen.quiet_since, 1)


def test_what_came_between_the_move_and_the_first_look_is_found(world: World) -> None:
    world.left.objects[BLOCK] = 4096
    world.left.written[BLOCK] = MOVED + timedelta(minutes=1)
    assert world.look().copied == 1


def test_a_block_that_could_not_be_copied_is_tried_again(world: World) -> None:
    world.left.objects[BLOCK] = 4096
    world.left.written[BLOCK] = MOVED + timedelta(minutes=1)
    world.copier.fails = True
    world.look()
    assert world.target.objects == {}
    world.copier.fails = False
    world.look()
    assert world.target.objects == {BLOCK: 4096}


def test_a_block_that_clients_delete_afterwards_is_found_once(world: World) -> None:
    world.left.objects[BLOCK] = 4096
    world.left.written[BLOCK] = MOVED + timedelta(minutes=1)
    world.look()
    quiet_since = world.look().quiet_since
    del world.target.objects[BLOCK]
    assert world.look().quiet_since == quiet_since
    assert world.target.objects == {}


def test_a_client_that_is_no_mount_pod_is_found_while_it_lives(world: World) -> None:
    world.look()
    world.metadata.live = [HOST]
    seen = world.look()
    assert seen.quiet_since == world.at
    assert "client host-1:/mnt/jfs has a session and is no mount pod" in seen.found[-1]
    world.renews = False
    assert world.look().quiet_since == seen.quiet_since, "a session that nobody renews is left from a killed client"


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        (replace_mount(errors=3), "3 object requests of mount pod"),
        (replace_mount(bucket="http://old:9000/data"), "uses http://old:9000/data"),
    ],
    ids=["failed requests", "another bucket"],
)
def test_a_client_with_trouble_is_found(world: World, mount: MountPod, words: str) -> None:
    world.look()
    world.pods.live = [mount]
    seen = world.look()
    assert seen.quiet_since == world.at
    assert words in seen.found[-1]


def test_failures_from_before_the_watch_do_not_count(world: World) -> None:
    world.pods.live = [replace_mount(errors=3)]
    began = world.at
    world.look()
    assert world.look().quiet_since == began


def test_a_store_that_is_not_looked_at_stops_no_watch(world: World) -> None:
    seen = replace(world.watch, left=None).look(world.seen)
    assert (seen.looks, seen.found, seen.seen_to) == (1, (), MOVED)


def test_a_watch_is_kept_for_its_own_run_alone(world: World) -> None:
    vault = FakeVault()
    own = WatchRecord(vault, "myjfs.manual__1", "manual__9")
    assert own.load() is None
    own.save(world.look())
    assert own.load() == world.seen
    assert WatchRecord(vault, "myjfs.manual__1", "manual__10").load() is None
    assert vault.ids() == ["myjfs.manual__1.watch"]


def test_a_look_that_fails_ends_no_watch_and_is_made_up_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.look()

    def away(*_: object) -> None:
        raise TransientError("The store does not answer.")

    world.left.objects[BLOCK] = 4096
    world.left.written[BLOCK] = world.at
    with monkeypatch.context() as broken:
        broken.setattr(world.left, "now", away)
        world.seen = world.watch.try_to_look(world.seen)
        assert (world.seen.looks, world.seen.problem) == (1, "The store does not answer.")
        world.at += timedelta(hours=2)
        with pytest.raises(TransientError):
            world.watch.try_to_look(world.seen)
    assert world.look().copied == 1
    assert world.seen.problem == ""

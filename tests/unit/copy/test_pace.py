"""The pace of a copy, as its params and a Variable say, while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from include.juicefs_storage.copy.pace import Pace, Steering
from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.names import PACE
from include.juicefs_storage.objects.flow import Flow

MIB = 2**20


@dataclass
class World:
    """A task of a run, the Variable, and how many tasks of the run work."""

    bandwidth_mib_s: int | None = None
    most_tasks: int = 4
    variable: str | None = None
    running: int = 4
    down: bool = False
    now: float = 0.0
    lines: list[str] = field(default_factory=list)
    bounds: list[int | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        params = SyncParams(
            source_conn_id="old", source_bucket="from", target_conn_id="new", target_bucket="into",
            concurrency=16, bandwidth_mib_s=self.bandwidth_mib_s,
        )  # fmt: skip
        self.steering = Steering(
            params, Flow(), self.read, self.tasks, self.most_tasks, self.lines.append, self.bounds.append,
            clock=lambda: self.now,
        )  # fmt: skip

    def read(self) -> str | None:
        if self.down:
            raise ConnectionError("no answer")
        return self.variable

    def tasks(self) -> int:
        if self.down:
            raise ConnectionError("no answer")
        return self.running

    def look(self) -> Flow:
        self.now += self.steering.every_s
        self.steering.look()
        return self.steering.flow

    def mib_s(self) -> float | None:
        bytes_s = self.look().bandwidth.bytes_s
        return bytes_s and bytes_s / MIB


def test_without_a_variable_the_params_say_it() -> None:
    assert World().mib_s() is None
    world = World(bandwidth_mib_s=40)
    assert world.mib_s() == 10
    assert world.lines == ["From now on limited to 10 MiB/s, a share of 4 in 40 MiB/s by the run's params."]
    assert world.steering.concurrency == 16


def test_the_variable_comes_before_the_params_and_0_is_no_limit() -> None:
    world = World(bandwidth_mib_s=40, variable='{"bandwidth_mib_s": 0, "concurrency": 4}')
    assert world.mib_s() is None
    assert (world.steering.concurrency, world.bounds[-1]) == (4, 4)
    world.variable = '{"bandwidth_mib_s": 100}'
    assert (world.mib_s(), world.steering.concurrency) == (25, 16)
    for world.variable in (None, "", "{}", '{"bandwidth_mib_s": ""}'):
        assert world.mib_s() == 10


def test_the_bandwidth_is_shared_by_the_tasks_that_work_now() -> None:
    world = World(bandwidth_mib_s=40, running=1)
    assert world.mib_s() == 10, "the others are about to begin"
    assert world.mib_s() == 40
    world.running = 2
    assert world.mib_s() == 20
    world.running = 99
    assert world.mib_s() == 10, "of this phase there are four"


def test_a_pause_begins_and_ends_and_says_who_may_end_it() -> None:
    world = World(variable='{"paused": true}')
    assert world.look().paused
    assert f"by Variable {PACE}. Whoever may change Variables resumes it" in world.steering.flow.because
    world.variable = '{"paused": false}'
    assert not world.look().paused
    assert world.lines[-1] == "From now on without a limit."


def test_what_cannot_be_read_changes_nothing_and_is_said_once() -> None:
    world = World(variable='{"paused": true, "bandwidth_mib_s": 8}')
    assert world.mib_s() == 2
    world.down = True
    for _ in range(3):
        assert world.mib_s() == 2
        assert world.steering.flow.paused, "a server that does not answer must not end a pause"
    world.down, world.variable = False, "half"
    assert world.look().paused
    assert len(world.lines) == 3
    assert world.lines[1] == f"Variable {PACE} cannot be read (ConnectionError). The copy goes on as before."
    assert world.lines[2].startswith(f"Variable {PACE}: expected JSON such as")


def test_airflow_is_not_asked_more_often_than_agreed() -> None:
    world = World(variable='{"paused": true}')
    world.look()
    world.variable = None
    world.steering.look()
    assert world.steering.flow.paused
    assert not world.look().paused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("50", "expected JSON such as"),
        ('{"bandwith_mib_s": 5}', "`bandwith_mib_s` is not a param"),
        ('{"bandwidth_mib_s": -1}', "`bandwidth_mib_s`"),
        ('{"concurrency": 0}', "`concurrency`"),
        ('{"paused": "maybe"}', "`paused`"),
    ],
)
def test_what_makes_no_sense_is_named(text: str, said: str) -> None:
    with pytest.raises(PermanentError, match=PACE) as refused:
        Pace.of_text(text)
    assert said in str(refused.value)

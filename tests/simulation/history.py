"""Histories: what happens to a run and its world, from a seed; what must be true afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

from include.juicefs_storage.volume.setting import StorageConfig
from tests.simulation.clients import write_on
from tests.simulation.events import END, EVENTS, Event, draw_event, draw_setup
from tests.simulation.patches import HERE
from tests.simulation.run import FIRST, REVERT, SWITCH, SimulatedRun
from tests.simulation.stores import Store
from tests.simulation.world import SECRET, Setup, World, key_pair

PARAMS = {
    "secret_name": SECRET, "target_conn_id": "minio_new", "target_bucket": "data2", "require_approval": False,
    "dry_run": False, "late_commit_s": 120, "settle_s": 10, "client_timeout_s": 60, "consistency": "metadata",
}  # fmt: skip
#: The outcomes that say of the volume that it was moved, and is whole.
GREEN = frozenset({"switched", "reverted"})
#: The outcomes after which nobody needs to do anything for the volume: it is on one store, and whole.
ENDS = GREEN | {"rolled back", "refused", "rejected", "failed"}
#: How often a person does something at most until all is well.
_PATIENCE = 8
#: How often a person clears a run at most before starting another one.
_CLEARS = 3
#: How long in-flight writes may take after a run's end, in seconds.
_IN_FLIGHT_S = 90.0


@dataclass
class History:
    """A run with its world and what happens to them.

    Attributes:
        seed: Of everything that is left open.
        events: What happens beside.
        setup: What the world is like.
        wrong: What was found to be wrong.
        outcomes: How runs ended, one after the other.
    """

    seed: int
    events: Sequence[Event]
    setup: Setup = field(default_factory=Setup)

    def __post_init__(self) -> None:
        random = Random(self.seed)
        self.world = World(random, self.setup)
        self.wrong: list[str] = []
        self.outcomes: list[str] = []
        self.runs: list[SimulatedRun] = []
        self._begun = self._clears = 0
        self._add_run(SWITCH, self._params)
        #: A run that was deleted after it had made its backup, and that no other one has made good yet.
        self._half: SimulatedRun | None = None
        self.wanted: dict[str, Any] = {}
        self.lost = {key for path in self.world.lost_files for key in self.world.acknowledged[path]}
        for event in self.events:
            self.world.scheduler.strikes.setdefault((event.task, event.turn), []).append(partial(self._strike, event))
        for client in self.world.clients:
            write_on(self.world, client, random, until=self.world.scheduler.now + self.setup.busy_s, every_s=3)

    def _strike(self, event: Event) -> None:
        if event.after_s:
            self.world.scheduler.after(event.after_s, lambda: self._happen(event))
        else:
            self._happen(event)

    def _happen(self, event: Event) -> None:
        if self.over and event.task != END:
            return  # what comes after is no part of the run
        self.world.note(f"* {event}")
        EVENTS[event.kind](self, event)

    def side(self, event: Event) -> StorageConfig:
        """Return the storage that an event concerns."""
        return (self.world.old, self.world.new)[event.number % 2]

    def store(self, event: Event) -> Store:
        """Return the store that an event concerns."""
        return self.world.store_of(self.side(event))

    @property
    def run(self) -> SimulatedRun:
        """The run that began last."""
        return self.runs[-1]

    @property
    def _unfinished(self) -> list[SimulatedRun]:
        """The runs that did not come to a good end."""
        found = [run for run in self.runs if run.outcome not in ENDS]
        return found or ([self.run] if self._half else [])

    @property
    def over(self) -> bool:
        """Whether all runs have ended."""
        for run in self.runs:  # noqa: SIM110  asked at every turn: faster than `all`
            if not run.ended:
                return False
        return True

    def start_run(self) -> None:
        """Start another run of the same switch."""
        self._add_run(SWITCH, self._params)
        self.run.schedule()

    def start_revert(self, run_id: str = FIRST) -> None:
        """Start a run that goes back to the backup of a run."""
        backup = {"backup_id": f"myjfs.{run_id}", "require_approval": False, "dry_run": False}
        self._add_run(REVERT, backup)
        self.run.schedule()

    def delete_run(self) -> None:
        """Delete the run that began last, unless it came to a good end."""
        if self.run.outcome not in ENDS:
            self._half = self._half or (self.run if self.run.backup else None)
            self.run.delete()

    @property
    def _params(self) -> dict[str, Any]:
        setup = self.setup
        return PARAMS | {
            "consistency": "target" if setup.moved else "metadata",
            "fence_conn_id": "minio_admin" if setup.fenced else None,
            "accept_lost_blocks": setup.lost,
        }

    def _add_run(self, dag_id: str, params: Mapping[str, Any]) -> None:
        self._begun += 1
        self.runs.append(SimulatedRun(self.world, f"run-{self._begun}", dict(params), self._judge, dag_id))

    def go(self) -> list[str]:
        """Let it happen; return what is wrong in the end."""
        HERE.begin(self.world)
        self.run.schedule()
        self._let_end()
        for event in self.events:
            if event.task == END:
                self._happen(event)
                self._let_end()
        self._go_on()
        return self.wrong

    def _let_end(self) -> None:
        """Let all runs end, and the writes that are in flight then."""
        world = self.world
        world.scheduler.run(lambda: self.over)
        # No client is killed any more: a started container writes its old values, whatever the run has proven.
        world.scheduler.strikes.clear()
        end = world.scheduler.now + _IN_FLIGHT_S
        world.scheduler.after(_IN_FLIGHT_S, lambda: None)
        world.scheduler.run(lambda: world.scheduler.now >= end)
        if not self._unfinished and (missing := set(world.unreadable()) - self.lost):
            ended = ", ".join(run.outcome for run in self.runs)
            self.wrong.append(f"{ended}, and acknowledged blocks cannot be read: {sorted(missing)[:3]}")
        self.wrong += [f"{store.name}: {harm}" for store in world.stores.values() for harm in store.harm]

    def _judge(self, run: SimulatedRun) -> None:
        """Note what is not as a run says that has just ended."""
        world, outcome, backup = self.world, run.outcome, run.backup
        self.outcomes.append(outcome)
        if outcome in GREEN or (outcome == "refused" and self._is_made_good()):
            self._half = None
        world.note(f"{run.run_id} ended: {outcome}")
        if outcome in {*GREEN, "rolled back"} and backup:
            expected = backup.new if outcome in GREEN else backup.setting.config
            secret = expected.bucket if outcome in GREEN else backup.secrets[SECRET]["bucket"]
        elif outcome in ENDS and self._begun == 1:
            expected, secret = world.old, world.old.bucket
        else:
            return
        if not world.row.uses(expected):
            self.wrong.append(f"{outcome}, and the setting names {world.row.bucket}")
        if (found := world.secrets[SECRET].data["bucket"]) != secret:
            self.wrong.append(f"{outcome}, and the Secret names {found}")
        if outcome in {*GREEN, "rolled back"} and (fields := self._fields_lost(run)):
            self.wrong.append(f"{outcome}, and another administrator's values are lost: {fields}")
        if outcome in GREEN and (left := [client.name for client in world.clients if client.used != expected]):
            self.wrong.append(f"{outcome}, and clients are elsewhere: {left}")
        if self._begun == 1 and expected.access_key.get_secret_value() in world.store_of(expected).denied:
            self.wrong.append(f"{outcome}, and the fence refuses what the clients write")
        report = json.dumps(run.xcom("finalize", "report"))
        if outcome in GREEN and (unnamed := [path for path in world.lost_files if path not in report]):
            self.wrong.append(f"{outcome}, and files that have lost blocks are not named: {unnamed}")
        if self.setup.moved and outcome == "rolled back" and world.store_of(expected) is world.store_of(world.old):
            self.wrong.append("rolled back to a store that is gone")

    def _is_made_good(self) -> bool:
        """Whether a run that was deleted has left nothing to do: all is on the store where it was, or on the other."""
        world, backup = self.world, self._half.backup if self._half else None
        return (
            backup is not None
            and (world.row.uses(backup.setting.config) or world.row.uses(backup.new))
            and world.secrets[SECRET].data["bucket"] == world.row.bucket
            and set(world.unreadable()) <= self.lost
        )

    def _fields_lost(self, run: SimulatedRun) -> list[str]:
        fields = json.loads(self.world.row.raw)
        report = json.dumps(run.xcom("finalize", "report"))
        return [name for name, value in self.wanted.items() if fields.get(name) != value and name not in report]

    def _go_on(self) -> None:
        """Do what a person does in the end: repair the world, clear what failed. A run must come to a good end."""
        world = self.world
        if not self._unfinished:
            return
        world.metadata_up = world.cluster_up = world.vault_up = True
        world.loses_answers = False
        for store in world.stores.values():
            store.up = not (self.setup.moved and store is world.store_of(world.old))
            store.hidden, store.slow_s = frozenset(), 0.0
        for config in (world.old, world.new):
            world.store_of(config).keys.add(key_pair(config))
        for client in world.clients:
            client.breaks = client.asleep = False
        for _ in range(_PATIENCE):
            self._act(self._unfinished[0])
            self._let_end()
            if not self._unfinished:
                return
        self.wrong.append(f"no way on was found: {self._unfinished[0].outcome}")

    def _act(self, run: SimulatedRun) -> None:
        """Do what a person does about a run that did not come to a good end."""
        failed = [task_id for task_id in run.tasks if run.states.get(task_id) == "failed"]
        if run.outcome not in ENDS | {"deleted", "moved on", "superseded"} and self._clears < _CLEARS:
            self._clears += 1
            self.world.note(f"+ a person clears {failed[0]} of {run.run_id} with Downstream")
            run.clear(failed[0], downstream=True)
            run.schedule()
            return
        # Nobody goes on with this one.
        self.runs.remove(run)
        self.world.leases = {
            name: lease for name, lease in self.world.leases.items() if lease.holder != f"{run.dag_id}/{run.run_id}"
        }
        for store in self.world.stores.values():
            store.denied.clear()  # see docs/fine-print.md
        # Where one of the two refuses, since there is nothing to switch, the other is the way.
        if self._half and (self._begun + self.seed) % 2:
            self.world.note(f"+ a person goes back to the backup of {self._half.run_id}")
            self.start_revert(self._half.run_id)
        else:
            self.world.note("+ a person starts another run")
            self.start_run()


def draw(seed: int) -> History:
    """Draw a history: most have one to three events."""
    random = Random(f"events {seed}")
    events = [draw_event(random) for _ in range(random.choice((0, 1, 1, 2, 2, 2, 3, 3, 4)))]
    return History(seed, events, draw_setup(random))


def shrink(history: History, fails: Callable[[History], bool]) -> History:
    """Leave out the events without which a history still fails."""
    events = list(history.events)
    for event in list(events):
        fewer = [other for other in events if other is not event]
        if fails(replace(history, events=fewer)):
            events = fewer
    return replace(history, events=events)

"""Histories: what happens to a run and its world, from a seed; what must be true afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from include.juicefs_storage.volume.setting import Setting, StorageConfig
from tests.simulation.clients import Client, write_on
from tests.simulation.patches import HERE
from tests.simulation.run import FIRST, SimulatedRun
from tests.simulation.scheduler import Process
from tests.simulation.stores import Store
from tests.simulation.world import SECRET, World, key_pair

PARAMS = {
    "secret_name": SECRET, "target_conn_id": "minio_new", "target_bucket": "data2", "require_approval": False,
    "dry_run": False, "late_commit_s": 120, "settle_s": 10, "client_timeout_s": 60, "consistency": "metadata",
}  # fmt: skip
#: Where most faults strike: the tasks from the backup on.
_TASKS = (
    "backup", "copy_ahead", "follow_writes", "write_setting", "patch_secret", "settle", "restart_csi",
    "wait_for_rollouts", "prove_clients", "catch_up", "prove_blocks", "prove_fresh_mount", "prove_no_restarts",
    "catch_up_late", "decide", "finalize",
)  # fmt: skip
_BACK = (
    "collect_diagnostics", "copy_back", "follow_writes_back", "restore_secret", "restore_setting", "settle_again",
    "restart_csi_again", "prove_clients_on_old", "copy_back_again", "prove_blocks_on_old", "copy_back_late",
)  # fmt: skip
#: The outcomes after which nobody needs to do anything for the volume: it is on one store, and whole.
ENDS = frozenset({"switched", "rolled back", "refused", "rejected", "failed"})
#: The task of an event that happens when all runs have ended.
END = "end"
#: How long the setting must have been so that a run has certainly read it once, in seconds.
_SEEN_AFTER_S = 0.5
#: How long in-flight writes may take after a run's end, in seconds.
_IN_FLIGHT_S = 90.0


@dataclass(frozen=True)
class Event:
    """Something that happens.

    Attributes:
        kind: Which of `EVENTS`.
        task: It begins with this task ...
        turn: ... when the task has its turn of this number ...
        after_s: ... or so many seconds later.
        number: What it concerns, where there are several.
        for_s: How long it lasts, in seconds.
    """

    kind: str
    task: str
    turn: int
    after_s: float = 0.0
    number: int = 0
    for_s: float = 0.0

    def __str__(self) -> str:
        when = f"{self.after_s:.1f} s after turn {self.turn} of {self.task}"
        return f"{self.kind} {self.number} for {self.for_s:g} s, {when}"


@dataclass
class History:
    """A run with its world and what happens to them.

    Attributes:
        seed: Of everything that is left open.
        events: What happens beside.
        wrong: What was found to be wrong.
        outcomes: How runs ended, one after the other.
    """

    seed: int
    events: Sequence[Event]

    def __post_init__(self) -> None:
        random = Random(self.seed)
        self.world = World(
            random,
            clients=random.choice((1, 2, 3)),
            heartbeat_s=random.choice((1.0, 5.0, 12.0)),
            keys_only=random.random() < 0.2,
        )
        self.wrong: list[str] = []
        self.outcomes: list[str] = []
        self.runs = [SimulatedRun(self.world, FIRST, PARAMS, self._judge)]
        self._begun = 1
        self.wanted: dict[str, Any] = {}
        self.lost: set[str] = set()
        self._waiting = list(self.events)
        self.world.scheduler.on_turn = self._turn
        for client in self.world.clients:
            write_on(self.world, client, random, until=self.world.scheduler.now + 90, every_s=3)

    def _turn(self, process: Process) -> None:
        for event in [event for event in self._waiting if (event.task, event.turn) == (process.name, process.turns)]:
            self._waiting.remove(event)
            if event.after_s:
                self.world.scheduler.after(event.after_s, lambda event=event: self._happen(event))  # type: ignore[misc]
            else:
                self._happen(event)

    def _happen(self, event: Event) -> None:
        if self._over and event.task != END:
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
        return [run for run in self.runs if run.outcome not in ENDS]

    @property
    def _over(self) -> bool:
        return all(run.ended for run in self.runs)

    def start_run(self) -> None:
        """Start another run of the same switch."""
        self._begun += 1
        self.runs.append(SimulatedRun(self.world, f"run-{self._begun}", PARAMS, self._judge))
        self.run.schedule()

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
        world.scheduler.run(lambda: self._over)
        # No client is killed any more: a started container writes its old values, whatever the run has proven.
        self._waiting.clear()
        end = world.scheduler.now + _IN_FLIGHT_S
        world.scheduler.after(_IN_FLIGHT_S, lambda: None)
        world.scheduler.run(lambda: world.scheduler.now >= end)
        if not self._unfinished and (missing := set(world.unreadable()) - self.lost):
            ended = ", ".join(run.outcome for run in self.runs)
            self.wrong.append(f"{ended}, and acknowledged blocks cannot be read: {sorted(missing)[:3]}")
        self.wrong += [f"{store.name}: {harm}" for store in world.stores.values() for harm in store.harm]

    def _judge(self, run: SimulatedRun) -> None:
        """Note what is not as a run says that has just ended."""
        world, outcome = self.world, run.outcome
        self.outcomes.append(outcome)
        world.note(f"{run.run_id} ended: {outcome}")
        secret = world.secrets[SECRET].data["bucket"]
        if outcome in {"switched", "rolled back"} or (outcome in ENDS and self._begun == 1):
            expected = world.new if outcome == "switched" else world.old
            if not world.row.uses(expected):
                self.wrong.append(f"{outcome}, and the setting names {world.row.bucket}")
            if secret != expected.bucket:
                self.wrong.append(f"{outcome}, and the Secret names {secret}")
        if outcome in {"switched", "rolled back"} and (fields := self._fields_lost(run)):
            self.wrong.append(f"{outcome}, and another administrator's values are lost: {fields}")
        if outcome == "switched" and (left := [c.name for c in world.clients if c.used != world.new]):
            self.wrong.append(f"switched, and clients are elsewhere: {left}")

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
        for store in world.stores.values():
            store.up = True
        for config in (world.old, world.new):
            world.store_of(config).keys.add(key_pair(config))
        for client in world.clients:
            client.breaks = client.asleep = False
        for _ in range(4):
            run = self._unfinished[0]
            failed = [task.task_id for task in run.tasks if run.states.get(task.task_id) == "failed"]
            if run.outcome in {"moved on", "superseded"}:
                # Nobody goes on with this one.
                self.runs.remove(run)
                world.note("+ a person starts another run")
                self.start_run()
            else:
                world.note(f"+ a person clears {failed[0]} of {run.run_id} with Downstream")
                run.clear(failed[0], downstream=True)
                run.schedule()
            self._let_end()
            if not self._unfinished:
                return
        self.wrong.append(f"no way on was found: {self._unfinished[0].outcome}")


def _kill(history: History, event: Event) -> None:
    if event.task in history.runs[0].running:
        history.runs[0].kill(event.task)


def _pause(history: History, event: Event) -> None:
    if process := history.runs[0].running.get(event.task):
        history.world.scheduler.pause(process, event.for_s)


def _for_a_time(change: Callable[[History, Event, bool], None]) -> Callable[[History, Event], None]:
    def happen(history: History, event: Event) -> None:
        change(history, event, True)
        history.world.scheduler.after(event.for_s, lambda: change(history, event, False))

    return happen


def _store_down(history: History, event: Event, begins: bool) -> None:
    history.store(event).up = not begins


def _key_refused(history: History, event: Event, begins: bool) -> None:
    keys = history.store(event).keys
    (keys.discard if begins else keys.add)(key_pair(history.side(event)))


def _down(name: str) -> Callable[[History, Event, bool], None]:
    def change(history: History, event: Event, begins: bool) -> None:
        setattr(history.world, name, not begins)

    return change


def _client(history: History, event: Event) -> Client:
    return history.world.clients[event.number % len(history.world.clients)]


def _breaks(history: History, event: Event, begins: bool) -> None:
    _client(history, event).breaks = begins


def _asleep(history: History, event: Event, begins: bool) -> None:
    _client(history, event).asleep = begins


def _restart(history: History, event: Event) -> None:
    _client(history, event).restart(min(event.for_s, 10.0))


def _administrator(history: History, event: Event) -> None:
    world = history.world
    if not world.metadata_up:
        return
    fields = json.loads(world.row.raw) | {"TrashDays": 7 + event.number}

    def seen() -> None:
        # What `juicefs config` takes back sooner, nobody can have seen.
        if json.loads(world.row.raw)["TrashDays"] == fields["TrashDays"]:
            history.wanted["TrashDays"] = fields["TrashDays"]

    world.scheduler.after(_SEEN_AFTER_S, seen)
    world.write_row(Setting(json.dumps(fields, indent=0).encode()), "another administrator")


def _hidden_writer(history: History, event: Event) -> None:
    """`juicefs gc --compact`, or a machine that was suspended: no session, and the old storage for ever."""
    world, run = history.world, history.runs[0]
    writer = Client(world, "hidden", "hidden", 0.0, world.old, world.row)
    before = len(world.attempted)
    path = f"/file-{before}"
    writer.write(path, 1 + event.number % 2, gap_s=min(event.for_s, 20))

    def note() -> None:
        if run.states.get("catch_up_late") in {"running", "success"}:
            history.lost |= set(world.acknowledged.get(path, ()))  # later than a run looks: its plan says so

    world.scheduler.after(min(event.for_s, 20) + 30, note)


def _clear(history: History, event: Event) -> None:
    tasks = [task for task in history.run.states if task in {*_TASKS, *_BACK}]
    if tasks:
        task = tasks[event.number % len(tasks)]
        history.world.note(f"+ a person clears {task}")
        history.run.clear(task, downstream=event.for_s > 60)
        history.run.schedule()


def _mark(history: History, event: Event) -> None:
    tasks = [task for task in history.run.states if task in {*_TASKS, *_BACK} - {"finalize"}]
    if tasks:
        task = tasks[event.number % len(tasks)]
        state = "success" if event.for_s > 60 else "failed"
        history.world.note(f"+ a person marks {task} {state}")
        history.run.mark(task, state)
        history.run.schedule()


EVENTS: dict[str, Callable[[History, Event], None]] = {
    "kill": _kill,
    "pause": _pause,
    "store down": _for_a_time(_store_down),
    "key refused": _for_a_time(_key_refused),
    "metadata down": _for_a_time(_down("metadata_up")),
    "cluster down": _for_a_time(_down("cluster_up")),
    "backups away": _for_a_time(_down("vault_up")),
    "client breaks": _for_a_time(_breaks),
    "client sleeps": _for_a_time(_asleep),
    "client restarts": _restart,
    "another administrator": _administrator,
    "hidden writer": _hidden_writer,
    "another run": lambda history, _: history.start_run(),
    "clear": _clear,
    "mark": _mark,
}


#: How many events happen after the end, and how many of the others begin on the way forward.
_AFTERWARDS, _FORWARD = 0.15, 0.8


def draw(seed: int) -> History:
    """Draw a history: most have one to three events."""
    random = Random(f"events {seed}")
    events = [_draw_event(random) for _ in range(random.choice((0, 1, 1, 2, 2, 2, 3, 3, 4)))]
    return History(seed, events)


def _draw_event(random: Random) -> Event:
    kind, number = random.choice(list(EVENTS)), random.randrange(100)
    for_s = random.choice((2, 20, 90, 700, 4000))
    if random.random() < _AFTERWARDS:
        return Event(random.choice(("clear", "clear", "mark")), END, 0, 0.0, number, for_s)
    task = random.choice(_TASKS if random.random() < _FORWARD else _BACK)
    later = kind not in {"kill", "pause"} and random.random() < 0.5
    after_s = random.uniform(0, random.choice((5, 30, 100, 3700))) if later else 0.0
    return Event(kind, task, 1 + int(random.expovariate(0.12)), after_s, number, for_s)


def shrink(history: History, fails: Callable[[History], bool]) -> History:
    """Leave out the events without which a history still fails."""
    events = list(history.events)
    for event in list(events):
        fewer = [other for other in events if other is not event]
        if fails(replace(history, events=fewer)):
            events = fewer
    return replace(history, events=events)

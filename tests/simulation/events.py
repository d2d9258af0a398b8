"""What may happen beside a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import TYPE_CHECKING

from include.juicefs_storage.volume.setting import Setting
from tests.simulation.clients import Client
from tests.simulation.world import Setup, key_pair

if TYPE_CHECKING:
    from tests.simulation.history import History

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
#: The task of an event that happens when all runs have ended.
END = "end"
#: How long the setting must have been so that a run has certainly read it once, in seconds.
_SEEN_AFTER_S = 0.5


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


def _kill(history: History, event: Event) -> None:
    if event.task in history.runs[0].running:
        history.runs[0].kill(event.task)


def _pause(history: History, event: Event) -> None:
    if event.task in history.runs[0].running:
        history.runs[0].pause(event.task, event.for_s)


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


def _store_slow(history: History, event: Event, begins: bool) -> None:
    history.store(event).slow_s = 5.0 if begins else 0.0


def _store_forgets(history: History, event: Event, begins: bool) -> None:
    store = history.store(event)
    keys = sorted(store.objects)
    store.hidden = frozenset(history.world.random.sample(keys, len(keys) // 2) if begins else ())


def _down(name: str) -> Callable[[History, Event, bool], None]:
    def change(history: History, event: Event, begins: bool) -> None:
        setattr(history.world, name, not begins)

    return change


def _answers_lost(history: History, _: Event, begins: bool) -> None:
    history.world.loses_answers = begins


def _client(history: History, event: Event) -> Client:
    return history.world.clients[event.number % len(history.world.clients)]


def _breaks(history: History, event: Event, begins: bool) -> None:
    _client(history, event).breaks = begins


def _asleep(history: History, event: Event, begins: bool) -> None:
    _client(history, event).asleep = begins


def _restart(history: History, event: Event) -> None:
    # What a container writes after a run's last look, the run cannot know: see docs/fine-print.md.
    _client(history, event).restart(min(event.for_s, 10.0), writes=lambda: not history.over)


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
    world = history.world
    writer = Client(world, "hidden", "hidden", 0.0, world.old, world.row)
    if world.setup.moved:
        return
    before = len(world.attempted)
    path = f"/file-{before}"
    writer.write(path, 1 + event.number % 2, gap_s=min(event.for_s, 20))

    def note() -> None:
        if any(run.states.get("catch_up_late") in {"running", "success"} for run in history.runs):
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


def _mark_success(history: History, event: Event) -> None:
    history.runs[0].mark(event.task, "success")
    history.runs[0].schedule()


EVENTS: dict[str, Callable[[History, Event], None]] = {
    "kill": _kill,
    "pause": _pause,
    "store down": _for_a_time(_store_down),
    "key refused": _for_a_time(_key_refused),
    "store slow": _for_a_time(_store_slow),
    "store forgets": _for_a_time(_store_forgets),
    "answers lost": _for_a_time(_answers_lost),
    "metadata down": _for_a_time(_down("metadata_up")),
    "cluster down": _for_a_time(_down("cluster_up")),
    "backups away": _for_a_time(_down("vault_up")),
    "client breaks": _for_a_time(_breaks),
    "client sleeps": _for_a_time(_asleep),
    "client restarts": _restart,
    "another administrator": _administrator,
    "hidden writer": _hidden_writer,
    "another run": lambda history, _: history.start_run(),
    "revert": lambda history, _: history.start_revert(),
    "run deleted": lambda history, _: history.delete_run(),
    "clear": _clear,
    "mark": _mark,
}
#: What is drawn; `mark success` concerns the task at whose turn it happens.
_DRAWN = tuple(EVENTS)
EVENTS["mark success"] = _mark_success
#: What may happen after the end of a run.
_LATER = ("clear", "clear", "mark", "revert", "run deleted")


#: How many events happen after the end, and how many of the others begin on the way forward.
_AFTERWARDS, _FORWARD = 0.15, 0.8
#: In how many worlds where only the keys change the old key can be refused.
_BOTH = 0.5


def draw_setup(random: Random) -> Setup:
    """Draw what a world is like: most are plain."""
    kind = random.choice(("", "", "", "", "keys_only", "keys_only", "moved", "fenced", "fenced", "lost", "skewed"))
    setup = Setup(clients=random.choice((1, 2, 3)), heartbeat_s=random.choice((1.0, 5.0, 12.0)))
    return replace(
        setup,
        keys_only=kind == "keys_only",
        moved=kind == "moved",
        fenced=kind == "fenced" or (kind == "keys_only" and random.random() < _BOTH),
        lost=random.choice((1, 2)) if kind == "lost" else 0,
        skew_s=30.0 if kind == "skewed" else 0.0,
    )


def draw_event(random: Random) -> Event:
    """Draw what happens, and when."""
    kind, number = random.choice(_DRAWN), random.randrange(100)
    for_s = random.choice((2, 20, 90, 700, 4000))
    if random.random() < _AFTERWARDS:
        return Event(random.choice(_LATER), END, 0, 0.0, number, for_s)
    task = random.choice(_TASKS if random.random() < _FORWARD else _BACK)
    later = kind not in {"kill", "pause"} and random.random() < 0.5
    after_s = random.uniform(0, random.choice((5, 30, 100, 3700))) if later else 0.0
    return Event(kind, task, 1 + int(random.expovariate(0.12)), after_s, number, for_s)

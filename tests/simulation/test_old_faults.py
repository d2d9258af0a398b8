"""Faults of earlier versions: each history goes well, and goes wrong on a product without the mend."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from include.juicefs_storage.switch.evidence import Evidence
from include.juicefs_storage.switch.settle import _Guard
from include.juicefs_storage.switch.write_setting import WriteSetting, Written
from include.juicefs_storage.tasks.context import task_states
from include.juicefs_storage.tasks.switch import judgement, rollback
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume import canary
from include.juicefs_storage.volume.canary import ClientState, Move, Reload
from tests.simulation.adapters import SimulatedMetadata
from tests.simulation.events import Event
from tests.simulation.history import History
from tests.simulation.world import Setup

#: For longer than any run takes, in seconds.
_LONG = 4000.0


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        what: In words.
        events: What brings it about.
        ends: How the run ends with the mend.
        mend: Owner, name, and what takes its place in a product without the mend.
        setup: What the world is like.
    """

    what: str
    events: tuple[Event, ...]
    ends: str
    mend: tuple[tuple[object, str, object], ...]
    setup: Setup = field(default_factory=lambda: Setup(clients=2, heartbeat_s=1.0))


def _by_clock(own: Evidence, _: str, other: Evidence) -> bool:
    return own.ended_at >= other.ended_at


def _by_states(run: Any, tasks: tuple[str, ...]) -> dict[str, str]:
    return {task: "failed" for task, state in task_states(*tasks).items() if state == "failed"}


def _no_log(*_: object) -> Reload:
    return Reload()


FAULTS = [
    Fault(
        "a client that cannot use the new store is proven by its block, which was copied there",
        (Event("client breaks", "write_setting", 1, for_s=_LONG),),
        "rolled back",
        (
            (SimulatedMetadata, "slices_of_files", lambda *_: set()),
            (Move, "left_has", lambda *_: False),
            (canary, "_read_reload", _no_log),
        ),
        Setup(clients=2, heartbeat_s=1.0, busy_s=5.0),
    ),
    Fault(
        "a client that keeps the old key is proven by its block, which it wrote with that key",
        (Event("client breaks", "write_setting", 1, for_s=_LONG),),
        "half rolled back",
        (
            (canary, "_read_reload", _no_log),
            (canary, "_judge_log", lambda *_: ClientState(by="log")),
        ),
        Setup(clients=2, heartbeat_s=1.0, keys_only=True),
    ),
    Fault(
        "a late failure sends the clients back to a store that is dead",
        (Event("store down", "prove_blocks", 1, for_s=_LONG), Event("store down", "prove_blocks", 1, 0.0, 1, 60.0)),
        "held",
        ((rollback, "_held", lambda _: False), (rollback, "_require_way_back", lambda _: None)),
    ),
    Fault(
        "a proof that a person has marked as success counts",
        (
            Event("store forgets", "catch_up", 1, for_s=_LONG),
            Event("mark success", "catch_up", 1),
            Event("mark success", "prove_blocks", 1),
            Event("mark success", "prove_fresh_mount", 1),
            Event("mark success", "catch_up_late", 1),
        ),
        "half rolled back",
        ((judgement, "missing_proofs", _by_states), (rollback, "missing_proofs", _by_states)),
    ),
    Fault(
        "`juicefs config` takes back what another administrator changes meanwhile",
        (Event("another administrator", "write_setting", 1, 2.2, 1),),
        "switched",
        ((WriteSetting, "_put_right", lambda *_: Written(written=True)),),
    ),
    Fault(
        "a block that was lost long ago fails a move of a healthy volume",
        (),
        "switched",
        ((SwitchRun, "lost_before", frozenset()),),
        Setup(lost=1),
    ),
    Fault(
        "a worker whose clock is ahead has a healthy volume rolled back",
        (),
        "switched",
        ((Evidence, "began_after", _by_clock),),
        Setup(skew_s=60.0),
    ),
    Fault(
        "a mount pod that starts with the old values sends every client back",
        (Event("client restarts", "settle", 4, for_s=2.0),),
        "switched",
        ((_Guard, "_put_right", lambda *_: None),),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_fault_that_was_mended_is_found_where_its_mend_is_gone(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    history = History(3, fault.events, fault.setup)
    assert history.go() == []
    assert history.outcomes[0] == fault.ends
    for owner, name, without in fault.mend:
        monkeypatch.setattr(owner, name, without)
    again = replace(history)
    wrong = again.go()
    assert wrong or again.outcomes[0] != fault.ends

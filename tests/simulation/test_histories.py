"""Runs in a simulated world, with faults that a seed draws: what a run says of its volume is true."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable

import pytest

from include.juicefs_storage.tasks.switch import apply, copies, proofs
from tests.simulation.history import History, draw
from tests.simulation.kills import explore
from tests.simulation.world import Setup

_FIXED, _RANDOM = 40, 20


def _tell(history: History, wrong: list[str]) -> str:
    return "\n".join([f"python -m tests.simulation --replay {history.seed}", *history.world.lines, *wrong])


def test_no_run_of_the_fixed_seeds_says_what_is_not_so() -> None:
    ended: Counter[str] = Counter()
    for seed in range(_FIXED):
        history = draw(seed)
        assert not (wrong := history.go()), _tell(history, wrong)
        ended.update(history.outcomes[:1])
    # Where nothing goes right, little can go wrong.
    assert ended["switched"] > _FIXED / 3, ended
    assert ended["rolled back"], ended


def test_no_run_of_new_seeds_says_what_is_not_so(record_property: Callable[[str, object], None]) -> None:
    first = secrets.randbelow(10**9)
    record_property("seed", first)
    for seed in range(first, first + _RANDOM):
        history = draw(seed)
        assert not (wrong := history.go()), _tell(history, wrong)


def test_a_seed_replays_to_the_letter() -> None:
    first, second = draw(11), draw(11)
    first.go()
    second.go()
    assert len(first.world.lines) > 20
    assert first.world.lines == second.world.lines


def test_a_product_that_copies_nothing_and_proves_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "copy", lambda *_, **__: {"copied": 0})
    monkeypatch.setattr(copies, "follow", lambda *_, **__: {"copied": 0})
    monkeypatch.setattr(proofs, "require_all_blocks", lambda *_, **__: None)
    monkeypatch.setattr(apply, "use_fresh_mount", lambda *_: 0)
    assert any("cannot be read" in line for line in History(1, []).go())


def test_old_values_that_return_while_a_run_ends_are_not_called_a_success() -> None:
    """`finalize` read the setting, asked the clients, which may take long, and judged by what it had read first."""
    history = History(7, [])
    world = history.world

    def return_old_values(request: str) -> None:
        if world.scheduler.current.name == "finalize" and request.startswith("kubernetes: exec"):
            world.format(world.old)

    world.on_request = return_old_values
    history.go()
    assert history.outcomes[0] == "moved on", _tell(history, history.wrong)


def test_workers_whose_clocks_differ_move_a_healthy_volume() -> None:
    """Evidence was compared by the clocks of two workers: 13 of 15 such runs were rolled back."""
    history = History(3, [], Setup(skew_s=60))
    history.go()
    assert history.outcomes == ["switched"], _tell(history, history.wrong)


@pytest.mark.slow
def test_no_pair_of_kills_in_the_cut_over_leaves_what_is_not_so(record_property: Callable[[str, object], None]) -> None:
    """Every turn of its tasks for the first kill, each fifth one for the second: all of them take five minutes."""
    for explored in explore(every=5):
        assert not explored.wrong
    record_property("states", len(explored.states))
    assert explored.histories > 200

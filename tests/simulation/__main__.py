"""Simulate many histories: `python -m tests.simulation --histories 10000`. Each is replayed by its seed."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from tests.simulation.history import History, draw, shrink
from tests.simulation.kills import Explored, explore
from tests.simulation.patches import simulated

_CHUNK = 50


class Ended(NamedTuple):
    """How a history ended, and what is wrong with that."""

    seed: int
    outcome: str
    wrong: list[str]


def play(seeds: range) -> list[Ended]:
    """Play the histories of some seeds."""
    logging.disable(logging.CRITICAL)
    with simulated():
        return [Ended(seed, history.run.outcome, wrong) for seed in seeds for history, wrong in [_play(draw(seed))]]


def _play(history: History) -> tuple[History, list[str]]:
    try:
        return history, history.go()
    except Exception as error:  # noqa: BLE001  a history that cannot be played is a failure like others
        return history, [f"{type(error).__name__}: {error}"]


def explain(seed: int) -> str:
    """Replay a history with as few events as still go wrong, and tell it."""
    logging.disable(logging.CRITICAL)
    with simulated():
        whole, wrong = _play(draw(seed))
        if wrong:
            whole, wrong = _play(shrink(whole, lambda fewer: bool(_play(fewer)[1])))
    return "\n".join([f"seed {seed}", *(f"  {event}" for event in whole.events), *whole.world.lines, *wrong])


def main() -> int:
    """Play histories on every core; print how they ended, and the first that went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=main.__doc__)
    parser.add_argument("--histories", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**9), help="of the first one")
    parser.add_argument("--replay", type=int, help="tell the history of this seed, and play no other")
    parser.add_argument("--kills", action="store_true", help="every pair of kills in the cut-over instead")
    given = parser.parse_args()
    if given.kills:
        return _every_pair_of_kills()
    if given.replay is not None:
        print(explain(given.replay))
        return 0
    began, outcomes, wrong = time.monotonic(), Counter[str](), list[Ended]()
    print(f"{given.histories} histories from seed {given.seed}", flush=True)
    end = given.seed + given.histories
    chunks = [range(first, min(first + _CHUNK, end)) for first in range(given.seed, end, _CHUNK)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for chunk in pool.map(play, chunks):
            outcomes.update(ended.outcome for ended in chunk)
            wrong += [ended for ended in chunk if ended.wrong]
    took_s = time.monotonic() - began
    print(f"{took_s:.0f} s, {given.histories / took_s:.0f} histories a second: {dict(outcomes.most_common())}")
    for ended in wrong[:20]:
        print(f"WRONG: seed {ended.seed}: {'; '.join(ended.wrong)}")
    if wrong:
        print(explain(wrong[0].seed))
    return bool(wrong)


def _every_pair_of_kills() -> int:
    logging.disable(logging.CRITICAL)
    explored = Explored()
    with simulated():
        for explored in explore():
            print(f"{explored.histories} histories, {len(explored.states)} states", flush=True)
    print(explored.outcomes)
    for kills, wrong in explored.wrong:
        print(f"WRONG: {'; '.join(map(str, kills))}: {'; '.join(wrong)}")
    return bool(explored.wrong)


if __name__ == "__main__":
    sys.exit(main())

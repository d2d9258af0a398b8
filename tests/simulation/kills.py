"""Every pair of kills in the cut-over: one at each turn of its tasks, another at each turn that comes after it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.simulation.history import History
from tests.simulation.world import SECRET, Setup

#: Between the first write of the setting and the last one of the Secret.
CUT_OVER = ("write_setting", "patch_secret")
#: What undoes them.
_BACK = ("restore_secret", "restore_setting")
#: Two clients that follow within a second, and write.
_SETUP = Setup(clients=2, heartbeat_s=1.0)


class Turn(NamedTuple):
    """A turn of a task: the process of its try is killed right before it goes on."""

    task: str
    number: int


@dataclass
class Explored:
    """What was gone through.

    Attributes:
        histories: How many.
        states: The different states of world and run in which the product asked the world for something.
        wrong: Kills, and what went wrong after them.
        outcomes: How the runs ended.
    """

    histories: int = 0
    states: set[int] = field(default_factory=set)
    wrong: list[tuple[tuple[Turn, ...], list[str]]] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)

    def play(self, *kills: Turn) -> list[Turn]:
        """Play a history with kills, one after the other; return the turns after the last of them.

        Args:
            kills: The next one waits until the one before it has happened.
        """
        history, later = History(1, [], _SETUP), list[Turn]()
        world, run, left = history.world, history.runs[0], list(kills)
        scheduler = world.scheduler

        def arm() -> None:
            if left:
                scheduler.strikes[left[0]] = [strike]

        def strike() -> None:
            kill = left.pop(0)
            arm()
            if kill.task in run.running:
                run.kill(kill.task)

        def look(request: str) -> None:
            process, states = scheduler.current, tuple(sorted(run.states.items()))
            used = tuple(client.used.bucket for client in world.clients)
            secret = world.secrets[SECRET].data["bucket"]
            self.states.add(hash((process.name, request, states, world.row.bucket, secret, used, len(left))))
            if not left and process.name in (*CUT_OVER, *_BACK):
                later.append(Turn(process.name, process.turns + 1))

        world.on_request = look
        arm()
        wrong = history.go()
        self.histories += 1
        self.outcomes[history.outcomes[0]] = self.outcomes.get(history.outcomes[0], 0) + 1
        if wrong:
            self.wrong.append((kills, wrong))
        return list(dict.fromkeys(later))


def explore(*, every: int = 1) -> Iterator[Explored]:
    """Go through every pair of kills.

    Args:
        every: Only each so many-th turn, for the second kill.

    Yields:
        What was gone through so far, after each first kill.
    """
    explored = Explored()
    for first in [turn for turn in explored.play() if turn.task in CUT_OVER]:
        for second in explored.play(first)[::every]:
            explored.play(first, second)
        yield explored

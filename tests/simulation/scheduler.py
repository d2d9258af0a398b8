"""Virtual time. Processes take turns; nothing else happens while one has its turn, and a seed decides who is next."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from greenlet import getcurrent, greenlet


class Killed(BaseException):
    """The process is dead: its code unwinds, and whatever it calls has no effect."""


@dataclass(eq=False)
class Process:
    """Code that runs in turns.

    Attributes:
        name: For the log of a history.
        children: Its threads: they die and stop with it.
        dead: It was killed.
        ended: It has run to its end, or was killed.
        paused_until: It gets no turn before.
        turns: How many it had.
    """

    name: str
    children: list[Process] = field(default_factory=list)
    dead: bool = False
    ended: bool = False
    paused_until: float = 0.0
    turns: int = 0
    _code: greenlet = field(init=False)


class Scheduler:
    """Runs processes and events in the order of virtual time.

    Attributes:
        random: Decides everything that is left open.
        now: The time, in seconds since the epoch.
    """

    def __init__(self, random: Random, now: float) -> None:
        self.random, self.now = random, now
        self._due: list[tuple[float, int, Process | Callable[[], object]]] = []
        self._numbers = itertools.count()
        self._hub = getcurrent()
        self._processes: dict[greenlet, Process] = {}
        self._turns_left = 0
        #: A process's name and the number of a turn -> what happens then, before it continues; faults strike here.
        self.strikes: dict[tuple[str, int], list[Callable[[], object]]] = {}

    @property
    def current(self) -> Process:
        """The process that has its turn."""
        return self._processes[getcurrent()]

    def at(self, when: float, what: Process | Callable[[], object]) -> None:
        """Give a process its turn, or call a function, at a time."""
        heapq.heappush(self._due, (when, next(self._numbers), what))

    def after(self, delay_s: float, what: Callable[[], object]) -> None:
        """Call a function after so many seconds."""
        self.at(self.now + delay_s, what)

    def spawn(self, name: str, function: Callable[[], object], parent: Process | None = None) -> Process:
        """Start a process; its first turn comes at once.

        Args:
            name: For the log.
            function: What it runs.
            parent: The process whose thread it is.
        """
        process = Process(name)

        def run() -> None:
            try:
                function()
            except Killed:
                pass
            finally:
                process.ended = True
                self._processes.pop(process._code, None)

        process._code = greenlet(run, self._hub)
        self._processes[process._code] = process
        if parent:
            parent.children.append(process)
        self.at(self.now, process)
        return process

    def sleep(self, seconds: float) -> None:
        """End the turn of the current process for so long.

        Raises:
            Killed: It was killed meanwhile.
        """
        process = self.current
        if process.dead:
            raise Killed
        when = self.now + max(0.0, seconds)
        if self._is_next(when, process):
            self._turns_left -= 1
            self.now = when
            process.turns += 1
        else:
            self.at(when, process)
            self._hub.switch()
        if process.dead:
            raise Killed

    def _is_next(self, when: float, process: Process) -> bool:
        """Whether nothing else happens before: then a process goes on without a switch to the hub, which costs more."""
        return (
            (not self._due or when < self._due[0][0])
            and process.paused_until <= when
            and self._turns_left > 0
            and (process.name, process.turns + 1) not in self.strikes
        )

    def wait_for(self, condition: Callable[[], bool], every_s: float = 0.2) -> None:
        """Sleep until a condition holds."""
        while not condition():
            self.sleep(every_s)

    def kill(self, process: Process) -> None:
        """Kill a process with its threads, at once: it has no more effect on anything."""
        for child in process.children:
            self.kill(child)
        if process.ended:
            return
        process.dead = True
        if process._code is getcurrent():
            raise Killed
        if process._code:  # it has begun
            process._code.parent = getcurrent()
            process._code.throw(Killed)
        process.ended = True

    def pause(self, process: Process, seconds: float) -> None:
        """Give a process and its threads no turn for so long, as SIGSTOP does."""
        process.paused_until = self.now + seconds
        for child in process.children:
            self.pause(child, seconds)

    def run(self, done: Callable[[], bool], *, limit: int = 200_000) -> None:
        """Let time pass until something is so.

        Args:
            done: Asked before each turn.
            limit: How many turns at most.

        Raises:
            TimeoutError: It is not so after all of these, or nothing is left that could make it so.
        """
        self._turns_left = limit
        while self._turns_left > 0:
            if done():
                return
            self._turns_left -= 1
            if not self._due:
                raise TimeoutError("nothing is left to happen")
            when, _, what = heapq.heappop(self._due)
            if isinstance(what, Process):
                self._turn(when, what)
            else:
                self.now = max(self.now, when)
                what()
        raise TimeoutError(f"not ended after {limit} turns")

    def _turn(self, when: float, process: Process) -> None:
        if process.ended:
            return
        if process.paused_until > when:
            self.at(process.paused_until, process)
            return
        self.now = max(self.now, when)
        process.turns += 1
        for strike in self.strikes.pop((process.name, process.turns), ()):
            strike()
        if not process.ended:
            process._code.switch()

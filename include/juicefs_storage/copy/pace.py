"""How fast a copy goes while it runs: what a person set meanwhile, before the params of the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from pydantic import Field

from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.names import PACE
from include.juicefs_storage.objects.flow import Flow
from include.juicefs_storage.objects.progress import EVERY_S
from include.juicefs_storage.params import Params

_EXAMPLE = '{"bandwidth_mib_s": 50, "concurrency": 16, "paused": false}'


class Pace(Params):
    """What Variable `juicefs_storage_sync_pace` may say. What it does not say is as the run's params say.

    Attributes:
        bandwidth_mib_s: Of all tasks of the run together; 0: no limit.
        concurrency: Objects at once in each task.
        paused: Nothing new begins.
    """

    bandwidth_mib_s: float | None = Field(default=None, ge=0, le=1_000_000)
    concurrency: int | None = Field(default=None, ge=1, le=512)
    paused: bool = False

    @classmethod
    def of_text(cls, text: str | None) -> Pace:
        """Read the Variable; None or empty: it says nothing.

        Raises:
            PermanentError: It is not JSON, or says what is not known.
        """
        if not text or not text.strip():
            return cls()
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise PermanentError(
                f"Variable {PACE}: expected JSON such as {_EXAMPLE}, found {text[:80]!r}.", next_step="correct it"
            )
        try:
            return cls.validated(found)
        except PermanentError as error:
            raise PermanentError(f"Variable {PACE}: {error.problem}", next_step="correct it") from None


@dataclass
class Steering:
    """Sets a flow to what the params and the Variable say, again and again.

    Attributes:
        params: Of the run.
        flow: Of the task.
        read: Reads the Variable; None where there is none. It may raise where Airflow does not answer.
        tasks: Counts the tasks of the run that work now, this one included. It may raise as well.
        most_tasks: How many there may be at most.
        tell: Gets a line for each change, and for each problem.
        set_bound: Gets the most objects at once in this task; None: as many as the stores take well.
        every_s: Between two looks, in seconds.
        clock: A monotonic clock.
        pace: The last that could be read.
    """

    params: SyncParams
    flow: Flow
    read: Callable[[], str | None]
    tasks: Callable[[], int]
    most_tasks: int
    tell: Callable[[str], None]
    set_bound: Callable[[int | None], None] = lambda _: None
    every_s: float = EVERY_S
    clock: Callable[[], float] = time.monotonic
    pace: Pace = field(default_factory=Pace)
    _looked_at: float = float("-inf")
    _said: str = ""
    _problem: str = ""
    _begun: bool = False

    def look(self) -> None:
        """Read the Variable, unless that was just done, and set the flow.

        Where it cannot be read, or makes no sense, all stays as it is.
        """
        if self.clock() < self._looked_at + 0.9 * self.every_s:
            return
        self._looked_at, problem = self.clock(), ""
        try:
            self.pace = Pace.of_text(self.read())
        except PermanentError as error:
            problem = error.problem
        except Exception as error:  # noqa: BLE001 - of whatever kind Airflow has for a server that does not answer
            problem = f"Variable {PACE} cannot be read ({type(error).__name__})."
        if problem and problem != self._problem:
            self.tell(f"{problem} The copy goes on as before.")
        self._problem = problem
        self._set()
        now = f"{'paused ' if self.flow.paused else ''}{self.flow.because}" or "without a limit"
        if now != (self._said or "without a limit"):
            self.tell(f"From now on {now}.")
        self._said = now

    @property
    def concurrency(self) -> int | None:
        """The most objects at once in this task; None: as many as the stores take well."""
        return self.pace.concurrency or self.params.concurrency

    def _set(self) -> None:
        pace, flow = self.pace, self.flow
        set_here = pace.bandwidth_mib_s is not None
        self.set_bound(self.concurrency)
        total_mib_s = pace.bandwidth_mib_s if set_here else self.params.bandwidth_mib_s
        at_once = self._at_once() if total_mib_s else 1
        flow.bandwidth.set(total_mib_s * 2**20 / at_once if total_mib_s else None)
        by, limits = f"by Variable {PACE}", []
        if total_mib_s:
            share = f", a share of {at_once} in {total_mib_s:g} MiB/s" if at_once > 1 else ""
            of_whom = by if set_here else "by the run's params"
            limits.append(f"limited to {total_mib_s / at_once:.3g} MiB/s{share} {of_whom}")
        if pace.concurrency:
            limits.append(f"at most {pace.concurrency} objects at once {by}")
        if pace.paused:
            flow.because = (
                f"{by}. Whoever may change Variables resumes it: in Admin, Variables set paused to false in it, or "
                f"`airflow variables delete {PACE}`"
            )
            flow.pause()
        else:
            flow.because = ", ".join(limits)
            flow.resume()

    def _at_once(self) -> int:
        """Return how many tasks share the bandwidth. At first as many as may come: the others are about to begin."""
        if not self._begun:
            self._begun = True
            return self.most_tasks
        try:
            return max(1, min(self.tasks(), self.most_tasks))
        except Exception:  # noqa: BLE001 - as above
            return self.most_tasks

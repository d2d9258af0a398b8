"""Where a long task is: a line in its log every few seconds, and XCom `progress` for the pages.

XCom and not a file: a worker anywhere can write it through Airflow, one query reads it of all tasks of a run, and
who may see it is settled. It stays when the task has ended.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

from include.juicefs_storage.names import PROGRESS
from include.juicefs_storage.objects.progress import EVERY_S, Progress
from include.juicefs_storage.tasks.context import log, push


@dataclass
class Shown:
    """An XCom for the pages. That it cannot be pushed is no failure of the task."""

    key: str
    _failed: bool = False

    def push(self, value: object) -> None:
        """Push it; that it cannot be pushed is logged once."""
        try:
            push(self.key, value)
        except Exception as error:  # noqa: BLE001 - of whatever kind Airflow has for a server that does not answer
            if not self._failed:
                log.warning("The progress cannot be shown for now: %s: %s", type(error).__name__, error)
            self._failed = True
        else:
            self._failed = False


@dataclass
class Publisher:
    """Pushes XCom `progress`, some hundred bytes, not too often. A failure is no failure of the task.

    Attributes:
        every_s: Between two of them, in seconds.
    """

    every_s: float = EVERY_S
    _at: float = field(default=float("-inf"))
    _shown: Shown = field(default_factory=lambda: Shown(PROGRESS))

    def __call__(self, progress: Progress) -> None:
        """Push it, unless one was pushed just now; the last one in any case."""
        if time.monotonic() < self._at + 0.9 * self.every_s and progress.state != "ended":
            return
        self._at = time.monotonic()
        self._shown.push(asdict(progress))

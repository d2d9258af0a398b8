"""Where a long task is: a line in its log every few seconds, and XCom `progress` or `clients` for the pages.

XCom and not a file: a worker anywhere can write it through Airflow, one query reads it of all tasks of a run, and
who may see it is settled. It stays when the task has ended.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from include.juicefs_storage.names import CLIENTS, PROGRESS
from include.juicefs_storage.objects.progress import EVERY_S, Progress
from include.juicefs_storage.switch.prove_clients import ClientProof
from include.juicefs_storage.switch.report import PROVEN_BY
from include.juicefs_storage.tasks.context import log, push


@dataclass
class _Shown:
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
    _shown: _Shown = field(default_factory=lambda: _Shown(PROGRESS))

    def __call__(self, progress: Progress) -> None:
        """Push it, unless one was pushed just now; the last one in any case."""
        if time.monotonic() < self._at + 0.9 * self.every_s and progress.state != "ended":
            return
        self._at = time.monotonic()
        self._shown.push(asdict(progress))


@dataclass
class ClientPublisher:
    """Pushes XCom `clients` when it has changed: a row for each client. A failure is no failure of the task.

    Attributes:
        side: Which store they are proven on: `new` or `old`.
    """

    side: str
    _last: list[dict[str, Any]] = field(default_factory=list)
    _shown: _Shown = field(default_factory=lambda: _Shown(CLIENTS))

    def __call__(self, proven: Collection[ClientProof], waiting: Mapping[str, str]) -> None:
        """Push it, those that are waited for first.

        Args:
            proven: The clients that are proven.
            waiting: The others' names -> what they show.
        """
        rows: list[dict[str, Any]] = [
            {"name": name, "node": "", "proven": False, "seen": seen, "at": None}
            for name, seen in sorted(waiting.items())
        ]
        for proof in sorted(proven, key=lambda proof: proof.pod):
            seen = PROVEN_BY[proof.by].format(side=self.side).rstrip(",:")
            rows.append({"name": proof.pod, "node": proof.node, "proven": True, "seen": seen, "at": proof.at})
        if rows != self._last:
            self._last = rows
            self._shown.push(rows)

"""Which clients are proven so far: XCom `clients` for the page of a run, see tasks/progress.py."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from include.juicefs_storage.names import CLIENTS
from include.juicefs_storage.switch.prove_clients import ClientProof
from include.juicefs_storage.switch.report import PROVEN_BY
from include.juicefs_storage.tasks.progress import Shown


@dataclass
class ClientPublisher:
    """Pushes XCom `clients` when it has changed: a row for each client. A failure is no failure of the task.

    Attributes:
        side: Which store they are proven on: `new` or `old`.
    """

    side: str
    _last: list[dict[str, Any]] = field(default_factory=list)
    _shown: Shown = field(default_factory=lambda: Shown(CLIENTS))

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

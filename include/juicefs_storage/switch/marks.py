"""How the runs on a volume ended, recorded beside their backups. XComs go when their task is cleared."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from include.juicefs_storage.ports import Vault

End = Literal["switched", "rolled-back"]


@dataclass(frozen=True)
class Marks:
    """The marks of one run, and those of the other runs on its volume.

    Attributes:
        vault: Holds the backups and the marks.
        backup_id: The run's backup, whether it is written yet or not.
        volume: The volume's name.
    """

    vault: Vault
    backup_id: str
    volume: str

    def record(self, end: End, at: datetime) -> None:
        """Record how this run ended; the first record of a kind stays."""
        name = f"{self.backup_id}.{end}"
        if not self.vault.load(name):
            self.vault.save(name, at.isoformat().encode())

    def at(self, end: End) -> str:
        """When this run ended so, in ISO 8601; the empty string where it did not."""
        return (self.vault.load(f"{self.backup_id}.{end}") or b"").decode()

    def superseded_by(self, backed_up_at: datetime) -> str:
        """The backup of a run that moved the volume since this run backed it up; empty where there is none."""
        for name in self.vault.ids():
            other = name.removesuffix(".switched")
            if other in {name, self.backup_id} or not name.startswith(f"{self.volume}."):
                continue
            if datetime.fromisoformat((self.vault.load(name) or b"").decode()) > backed_up_at:
                return other
        return ""

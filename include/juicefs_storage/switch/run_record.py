"""What a run keeps in the folder of backups: its backup, and how it ended."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.ports import Vault
from include.juicefs_storage.switch.backup import Backup, backup_id, backup_ids, foreign_to, read_backup
from include.juicefs_storage.switch.marks import End, Mark, Supersession, mark_id, read_mark, superseded_by
from include.juicefs_storage.switch.plan import Plan

log = logging.getLogger(__name__)


def backup_of_run(vault: Vault, run_id: str, triggered_at: datetime | None) -> Backup | None:
    """Find the backup of a run whose plan has gone with its XComs, as after a clear; None where it has none.

    Args:
        vault: The folder of backups.
        run_id: Its id in Airflow.
        triggered_at: When it was triggered; without that no backup can be told to be its own.

    Raises:
        StorageSwitchError: The folder, or a backup under this id, cannot be read.
    """
    ends = tuple(backup_id("", name) for name in (run_id, f"revert-{run_id}"))
    for name in backup_ids(vault):
        if name.endswith(ends):
            found = read_backup(vault, name)
            if found.run_id == run_id and triggered_at and found.triggered_at == triggered_at:
                return found
    return None


@dataclass(frozen=True)
class RunRecord:
    """The files of one run.

    Attributes:
        vault: The folder of backups.
        keys: Those that the plan's fingerprint may have been made with.
        plan: What the run planned.
        run_id: Its id in Airflow.
        triggered_at: When it was triggered; None where that is not known.
    """

    vault: Vault
    keys: Sequence[bytes]
    plan: Plan
    run_id: str
    triggered_at: datetime | None = None

    @property
    def backup_id(self) -> str:
        """The id of the run's backup, whether it is written yet or not."""
        # Runs of two DAGs may have the same id.
        return backup_id(self.plan.volume, f"revert-{self.run_id}" if self.plan.backup_id else self.run_id)

    @cached_property
    def _lying_there(self) -> tuple[Backup | None, str]:
        """What lies under the run's id, and why it is not this run's."""
        content = self.vault.load(self.backup_id)
        if content is None:
            return None, ""
        backup = Backup.from_bytes(content, self.backup_id)
        return backup, foreign_to(backup, self.plan, self.keys, self.triggered_at)

    def find(self) -> Backup | None:
        """Find the run's backup; None where it has made none, and so has changed nothing.

        Raises:
            StorageSwitchError: What lies under the run's id cannot be read.
        """
        backup, foreign = self._lying_there
        return None if foreign else backup

    def existing(self) -> Backup | None:
        """Find the run's backup; None where nothing lies under its id.

        Raises:
            NeedsHumanError: What lies there is not this run's.
            StorageSwitchError: It cannot be read.
        """
        backup, foreign = self._lying_there
        if foreign:
            raise NeedsHumanError(
                f"Backup {self.backup_id} is not of this run: {foreign}.",
                state="this task changed nothing",
                next_step="start a new run with another run id",
            )
        return backup

    def backup(self) -> Backup:
        """Read the run's backup, which must be there.

        Raises:
            PermanentError: There is none.
            NeedsHumanError: What lies under the run's id is not this run's.
        """
        backup = self.existing()
        if backup is None:
            raise PermanentError(f"There is no backup {self.backup_id}.", next_step="clear backup with Downstream")
        return backup

    def mark(self, how: End) -> str:
        """Record how the run ended, for good: XComs go when their task is cleared.

        Returns:
            Why it could not be recorded; empty where it is. No step depends on it: the volume comes first.
        """
        try:
            if self.vault.load(mark_id(self.backup_id, how)) is None:
                mark = Mark(self.plan.uuid, datetime.now(UTC))
                self.vault.save(mark_id(self.backup_id, how), mark.to_bytes())
        except StorageSwitchError as error:
            log.warning("That this run is %s cannot be recorded: %s", how, error)
            return error.problem
        return ""

    def ended(self, how: End) -> str:
        """Return when the run ended so (UTC, ISO 8601); empty where it did not, or where that cannot be read."""
        try:
            mark = read_mark(self.vault, self.backup_id, how) if self.find() else None
        except StorageSwitchError as error:
            log.warning("Whether this run is %s cannot be read: %s", how, error)
            return ""
        return mark.at.isoformat() if mark and mark.uuid == self.plan.uuid else ""

    def superseded(self) -> Supersession:
        """Return whether another run moved the volume after this run had made its backup.

        Raises:
            StorageSwitchError: This run's own backup cannot be read.
        """
        backup = self.find()
        found = superseded_by(self.vault, self.backup_id, backup) if backup else Supersession()
        for problem in found.unreadable:
            log.warning("Ignored: it may be another volume's. %s", problem)
        return found

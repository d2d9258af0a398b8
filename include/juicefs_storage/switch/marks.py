"""How runs ended: marks beside their backups, so that no run undoes what a later one did.

A mark is a hint, never a lock: one that cannot be read is reported and not obeyed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.ports import Vault
from include.juicefs_storage.switch.backup import Backup

End = Literal["switched", "rolled-back"]


@dataclass(frozen=True)
class Mark:
    """One mark.

    Attributes:
        uuid: Of the volume.
        at: When the run ended so (UTC).
    """

    uuid: str
    at: datetime

    def to_bytes(self) -> bytes:
        """Serialise for the vault."""
        return json.dumps({"uuid": self.uuid, "at": self.at.isoformat()}).encode()


def mark_id(backup_id: str, how: End) -> str:
    """Return the id under which the mark of a run lies."""
    return f"{backup_id}.{how}"


def read_mark(vault: Vault, backup_id: str, how: End) -> Mark | None:
    """Read the mark of a run.

    A mark of an early version is its time alone: whose it is, its backup says.

    Args:
        vault: The folder of backups.
        backup_id: The run's backup.
        how: Which mark.

    Returns:
        The mark; None where there is none.

    Raises:
        StorageSwitchError: It cannot be decrypted, is no mark, or nothing tells whose it is.
    """
    content = vault.load(mark_id(backup_id, how))
    if content is None:
        return None
    try:
        text = content.decode()
        if text.startswith("{"):
            fields = json.loads(text)
            return Mark(str(fields["uuid"]), _utc(fields["at"]))
        at = _utc(text)
    except (ValueError, KeyError, TypeError):
        raise _no_mark(backup_id, how, "is no mark") from None
    backup = vault.load(backup_id)
    if backup is None:
        raise _no_mark(backup_id, how, "names no volume, and its backup is not there")
    return Mark(Backup.from_bytes(backup, backup_id).setting.uuid, at)


def _utc(text: str) -> datetime:
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(text)
    return at


def _no_mark(backup_id: str, how: End, problem: str) -> PermanentError:
    return PermanentError(
        f"{mark_id(backup_id, how)} {problem}.", next_step="move the file out of the folder of backups"
    )


@dataclass(frozen=True)
class Supersession:
    """Which run moved a volume after another one had begun.

    Attributes:
        backup_id: The later run's backup; empty where there is none.
        unreadable: What could not be read, one line each. It may be another volume's.
    """

    backup_id: str = ""
    unreadable: tuple[str, ...] = ()


def superseded_by(vault: Vault, backup_id: str, backup: Backup) -> Supersession:
    """Find a run that moved the volume after a run had made its backup.

    Args:
        vault: Where the marks lie.
        backup_id: The backup of the run that asks.
        backup: Its content.
    """
    setting, unreadable = backup.setting, list[str]()
    try:
        others = moved_by(vault, setting.name)
    except StorageSwitchError as error:
        return Supersession("", (error.problem,))
    for other in others:
        # By its time alone a mark would count that was made before on a worker whose clock was ahead.
        if other == backup_id or other in backup.moved_before:
            continue
        try:
            mark = read_mark(vault, other, "switched")
        except StorageSwitchError as error:
            unreadable.append(error.problem)
            continue
        if mark and mark.uuid == setting.uuid and mark.at > backup.created_at:
            return Supersession(other, tuple(unreadable))
    return Supersession("", tuple(unreadable))


def moved_by(vault: Vault, volume: str) -> list[str]:
    """List the backups whose runs are marked as having moved a volume of this name.

    Raises:
        StorageSwitchError: The folder cannot be listed.
    """
    names = vault.ids()
    ended = {name: name.removesuffix(".switched") for name in names if name.startswith(f"{volume}.")}
    return [other for name, other in ended.items() if other != name]

"""What a switch records before it touches anything, so that everything can be put back at any later time."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.ports import Vault
from include.juicefs_storage.switch.plan import Plan
from include.juicefs_storage.volume.setting import Setting, StorageConfig

#: What is kept beside a backup, under its id, a dot and this name.
KEPT_BESIDE = ("switched", "rolled-back", "diagnostics")
#: Begins the names of what fleets keep in the same folder; no volume's name can.
FLEET_PREFIX = "_fleet."
_EXAMPLES = 5


class Backup(BaseModel):
    """The state before a switch. Holds secrets: it exists in memory and in the vault, nowhere else.

    Attributes:
        setting_hex: The exact bytes of the row `format`.
        secrets: Name of a Secret -> the values in it that a switch may change.
        templates: The pod templates of the CSI workloads.
        target: The storage that the run moves to, keys included: what was approved stays what is done, and what is
            undone, whatever becomes of the connection.
        params: The params of the run: names and flags, no secret. Empty in backups of early versions.
    """

    model_config = ConfigDict(frozen=True)

    backup_id: str
    run_id: str
    created_at: datetime
    setting_hex: str = Field(repr=False)
    secrets: dict[str, dict[str, str]] = Field(repr=False)
    templates: dict[str, Any] = Field(repr=False)
    target: tuple[str, str, str, str] = Field(repr=False)
    plan: Plan
    params: dict[str, Any] = Field(default_factory=dict)

    @property
    def new(self) -> StorageConfig:
        """The storage that the run moves to."""
        storage, bucket, access_key, secret_key = self.target
        return StorageConfig(storage, bucket, SecretStr(access_key), SecretStr(secret_key))

    @property
    def setting(self) -> Setting:
        """The setting as it was."""
        return Setting(bytes.fromhex(self.setting_hex))

    def to_bytes(self) -> bytes:
        """Serialise for the vault."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Backup:
        """Read what `to_bytes` wrote."""
        return cls.model_validate_json(content)


def backup_id(volume: str, run_id: str) -> str:
    """The id of a run's backup: one per run, so that a repeated task finds what it wrote before."""
    return f"{volume}.{re.sub(r'[^A-Za-z0-9._-]+', '-', run_id)}"


def backup_ids(vault: Vault, volume: str | None = None) -> list[str]:
    """The ids of the backups in a vault, without what else lies beside them, such as how a run ended.

    Args:
        vault: Where they lie.
        volume: Only those of this volume.
    """
    names = set(vault.ids())
    beside = {f"{name}.{what}" for name in names for what in KEPT_BESIDE}
    own = {name for name in names - beside if not name.startswith(FLEET_PREFIX)}
    return sorted(name for name in own if volume is None or name.startswith(f"{volume}."))


def read_backup(vault: Vault, backup_id: str) -> Backup:
    """A backup that must be there.

    Raises:
        PermanentError: There is none of this id, or it cannot be read.
    """
    content = vault.load(backup_id)
    if content is None:
        volume = backup_id.partition(".")[0]
        known = ", ".join(backup_ids(vault, volume)[-_EXAMPLES:]) or "none"
        raise PermanentError(
            f"There is no backup {backup_id!r}; backups of volume {volume!r}: {known}.",
            next_step="trigger the DAG without `backup_id`: it offers those that are there",
        )
    try:
        return Backup.from_bytes(content)
    except ValueError:
        # Without the validator's text: it quotes what it found.
        raise PermanentError(
            f"{backup_id} can be decrypted and is not a backup.",
            next_step="trigger the DAG without `backup_id`: it offers those that are there",
        ) from None

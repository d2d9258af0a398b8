"""What a switch records before it touches anything, so that everything can be put back at any later time."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr

from include.juicefs_storage.core.plan import Plan
from include.juicefs_storage.core.setting import Setting, StorageConfig


class Backup(BaseModel):
    """The state before a switch. Holds secrets: it exists in memory and in the vault, nowhere else.

    Attributes:
        setting_hex: The exact bytes of the row `format`.
        secrets: Name of a Secret -> the values in it that a switch may change.
        templates: The pod templates of the CSI workloads.
        target: The storage that the run moves to, keys included: what was approved stays what is done, and what is
            undone, whatever becomes of the connection.
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

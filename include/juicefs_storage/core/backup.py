"""What a switch records before it touches anything, so that everything can be put back at any later time."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from include.juicefs_storage.core.plan import Plan
from include.juicefs_storage.core.setting import Setting


class Backup(BaseModel):
    """The state before a switch. Holds secrets: it exists in memory and in the vault, nowhere else.

    Attributes:
        setting_hex: The exact bytes of the row `format`.
        secrets: Name of a Secret -> the values in it that a switch may change.
        templates: The pod templates of the CSI workloads.
    """

    model_config = ConfigDict(frozen=True)

    backup_id: str
    run_id: str
    created_at: datetime
    setting_hex: str = Field(repr=False)
    secrets: dict[str, dict[str, str]] = Field(repr=False)
    templates: dict[str, Any] = Field(repr=False)
    plan: Plan

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

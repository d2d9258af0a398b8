"""Base of the values that travel between tasks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of the values that travel between tasks as XCom: plain data, never a secret."""

    model_config = ConfigDict(frozen=True)

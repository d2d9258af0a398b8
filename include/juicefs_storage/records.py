"""Base of the values that travel between tasks."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of the values that travel between tasks as XCom: frozen, plain data, never a secret."""

    # Built when first used: a DAG file needs the class alone.
    model_config = ConfigDict(frozen=True, defer_build=True)

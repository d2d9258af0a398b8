"""Refuse params: each that is unknown or has a value that is not allowed is named."""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel, ValidationError

from include.juicefs_storage.errors import PermanentError

BUCKET_NAME = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")


def refused(error: ValidationError, model: type[BaseModel]) -> PermanentError:
    """The refusal that names every param that is unknown or has a value that is not allowed."""
    lines = [_explain(dict(detail), model) for detail in error.errors(include_url=False)]
    return PermanentError(
        "Params refused:\n" + "\n".join(f"- {line}" for line in lines),
        next_step="trigger the DAG again with the values corrected",
    )


def _explain(detail: dict[str, Any], model: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"`{field}` is not a param of this DAG; params: {', '.join(model.model_fields)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not field:  # several params together; the message names them
        return message
    info = model.model_fields.get(field)
    example = f", for example {json.dumps(info.examples[0])}" if info and info.examples else ""
    found = "nothing" if detail["type"] == "missing" else json.dumps(detail["input"], default=str)
    return f"`{field}`: {message}; found {found}{example}"

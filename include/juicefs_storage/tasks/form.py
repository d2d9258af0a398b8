"""The fields of the trigger form."""

from __future__ import annotations

from typing import Any

from airflow.sdk import Param


def text(default: str | None, title: str, description: str, section: str, **schema: Any) -> Param:
    """A line of text; optional where the default is None."""
    kind = ["null", "string"] if default is None else "string"
    return Param(default, type=kind, title=title, description_md=description, section=section, **schema)


def seconds(default: int | None, title: str, description: str, minimum: int, maximum: int) -> Param:
    """A number of seconds; optional where the default is None."""
    return number(default, title, description, "Advanced", minimum, maximum)


def flag(default: bool, title: str, description: str, section: str) -> Param:
    """A switch."""
    return Param(default, type="boolean", title=title, description_md=description, section=section)


def number(default: int | None, title: str, description: str, section: str, minimum: int, maximum: int) -> Param:
    """A whole number; optional where the default is None."""
    kind = ["null", "integer"] if default is None else "integer"
    return Param(
        default,
        type=kind,
        title=title,
        description_md=description,
        section=section,
        minimum=minimum,
        maximum=maximum,
    )


def texts(title: str, description: str, section: str) -> Param:
    """Texts, one a line; none by default."""
    return Param([], type="array", items={"type": "string"}, title=title, description_md=description, section=section)

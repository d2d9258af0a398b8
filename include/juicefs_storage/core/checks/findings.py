"""The three answers of a check."""

from __future__ import annotations

from include.juicefs_storage.core.plan import Finding


def ok(check: str, message: str) -> Finding:
    """A check that passed."""
    return Finding(check=check, level="ok", message=message)


def warning(check: str, message: str, remedy: str) -> Finding:
    """Something the person should know, which does not forbid the switch."""
    return Finding(check=check, level="warning", message=message, remedy=remedy)


def refusal(check: str, message: str, remedy: str) -> Finding:
    """Something that forbids the switch."""
    return Finding(check=check, level="refusal", message=message, remedy=remedy)

"""The three answers of a check."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from include.juicefs_storage.core.errors import StorageSwitchError
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


def gather(check: str, *parts: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Make each part of a check, whatever becomes of the others; one that could not be made is a refusal."""
    findings: list[Finding] = []
    for part in parts:
        try:
            findings += part()
        except StorageSwitchError as error:
            findings.append(refusal(check, error.problem, error.next_step))
    return findings

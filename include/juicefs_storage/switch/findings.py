"""What a check found: that all is well, a warning, or a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from include.juicefs_storage.errors import StorageSwitchError, TransientError
from include.juicefs_storage.markdown import bullets
from include.juicefs_storage.records import Record


class Finding(Record):
    """What one check found. A refusal stops the run before anything is touched."""

    check: str
    level: Literal["ok", "warning", "refusal"]
    message: str
    remedy: str = ""


def ok(check: str, message: str) -> Finding:
    """Make a finding of a check that passed."""
    return Finding(check=check, level="ok", message=message)


def warning(check: str, message: str, remedy: str) -> Finding:
    """Make a finding that the operator must know and that does not forbid the switch.

    Args:
        check: The check's name.
        message: What was expected and what was found.
        remedy: What to do next.
    """
    return Finding(check=check, level="warning", message=message, remedy=remedy)


def refusal(check: str, message: str, remedy: str) -> Finding:
    """Make a finding that forbids the switch.

    Args:
        check: The check's name.
        message: What was expected and what was found.
        remedy: What to do next.
    """
    return Finding(check=check, level="refusal", message=message, remedy=remedy)


def gather(check: str, *parts: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Make each part of a check, also where another one fails. A part that could not be made is a refusal.

    Raises:
        TransientError: Nothing else is refused, so that trying again may help.
    """
    findings: list[Finding] = []
    errors: list[StorageSwitchError] = []
    for part in parts:
        try:
            findings += part()
        except StorageSwitchError as error:
            errors.append(error)
    refused = any(finding.level == "refusal" for finding in findings)
    if not refused and errors and all(isinstance(error, TransientError) for error in errors):
        raise errors[0]
    return [*findings, *(refusal(check, error.problem, error.next_step) for error in errors)]


def findings_markdown(findings: Sequence[Finding]) -> list[str]:
    """Render findings as a Markdown list, refusals first."""
    order = {"refusal": 0, "warning": 1, "ok": 2}
    marks = {"refusal": "**refused**", "warning": "**warning**", "ok": "ok"}
    return bullets(
        [
            f"{marks[finding.level]} `{finding.check}`: {finding.message}"
            + (f" Remedy: {finding.remedy}" if finding.remedy else "")
            for finding in sorted(findings, key=lambda finding: order[finding.level])
        ]
    )

"""What the plugin writes into a run's note, beside what people write there. Imports nothing heavy."""

from __future__ import annotations

import re
from typing import NamedTuple

from include.juicefs_storage.markdown import one_line

#: As many characters as Airflow's table takes.
LENGTH = 1000
_NOW, _OUTCOME = "**[Now](", "**[Outcome]("
#: Of a failure's line this much is kept, or nothing: the link to the task, and the beginning of its error.
_LEAST_OF_A_FAILURE = 250
_FAILED = re.compile(r"^\*\*\[\w+\]\([^)]*\) failed\*\*: .*$", re.MULTILINE)
_ENDED = re.compile(rf"^{re.escape(_OUTCOME)}[^)]*\)\*\*: (.*)$", re.MULTILINE)
_OURS = re.compile(rf"(?:{_FAILED.pattern}|^(?:{re.escape(_NOW)}|{re.escape(_OUTCOME)}).*$)\n*", re.MULTILINE)


class End(NamedTuple):
    """What a note says of a run's end; empty where it says nothing.

    Attributes:
        outcome: How the run ended.
        cause: The line of the task that failed first.
    """

    outcome: str
    cause: str


def with_now(note: str, page: str) -> str:
    """Say in a note where to look at the run while it works, in place of an earlier end.

    Args:
        note: As it is.
        page: The URL of the run's page.
    """
    return _with(note, f"{_NOW}{page})**: what the run does, and whether it is safe to abort")


def with_end(note: str, outcome: str, report: str, failure: str = "") -> str:
    """Say in a note how the run ended, in place of an earlier end, else below the rest.

    Where all together is too long for Airflow's table, the failure is cut.

    Args:
        note: As it is.
        outcome: How the run ended, in a line.
        report: The URL of its report.
        failure: The task that failed first, with its error and next command, in a line.
    """
    return _with(note, f"{_OUTCOME}{report})**: {one_line(outcome)}", failure)


def read_end(note: str) -> End:
    """Read from a note how its run ended."""
    ended, cause = _ENDED.search(note), _FAILED.search(note)
    return End(ended[1] if ended else "", cause[0] if cause else "")


def _with(note: str, line: str, failure: str = "") -> str:
    """Put our lines into a note. What a person wrote is never cut: where there is no room the note stays as it is."""
    others = _OURS.sub("", note).strip()
    room = LENGTH - len(others) - len(line) - len("\n\n\n\n")
    if len(failure) > room:
        failure = f"{failure[: room - 1]}…" if room > _LEAST_OF_A_FAILURE else ""
    added = "\n\n".join(part for part in (others, failure, line) if part)
    return added if len(added) <= LENGTH else note

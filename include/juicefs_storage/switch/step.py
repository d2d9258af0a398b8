"""What the steps that change something have in common.

Every step has the same verbs: `observe` reads the current state, `plan` says what would be done, `apply` does it,
`verify` reads it back. `undo` goes back; where a step has none, `apply` with the old storage as its target is its undo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from include.juicefs_storage.errors import (
    TransientError,
)

_TRIES = 3


Fence = Callable[[], None]


T = TypeVar("T")


def no_fence() -> None:
    """For whoever needs no lock."""


def carry_out(plan: Callable[[], list[T]], write: Callable[[T], None], fence: Fence) -> list[T]:
    """Write what is planned. Where a write fails the plan is made again, from the world as it is then.

    An answer may be lost on its way back, or somebody else may have written first: only a new look tells.

    Returns:
        What was planned at first.

    Raises:
        TransientError: A write did not come through.
    """
    first = pending = plan()
    for left in reversed(range(_TRIES)):
        problem: TransientError | None = None
        for item in pending:
            fence()
            try:
                write(item)
            except TransientError as error:
                problem = error
        if problem is None or not (pending := plan()):
            break
        if not left:
            raise problem
    return first

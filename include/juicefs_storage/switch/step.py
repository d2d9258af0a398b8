"""What the steps that change something have in common.

Every step has the same verbs: `observe` reads the current state, `plan` says what would be done, `apply` does it,
`verify` reads it back. `undo` goes back; where a step has none, `apply` with the old storage as its target is its undo.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from include.juicefs_storage.errors import TransientError

_TRIES = 3


#: Confirms right before a write that this run still holds the volume's Lease; raises NeedsHumanError otherwise.
LeaseCheck = Callable[[], None]

T = TypeVar("T")


def no_lease() -> None:
    """Confirm nothing, for a caller that needs no Lease."""


def carry_out(plan: Callable[[], list[T]], write: Callable[[T], None], confirm_lease: LeaseCheck) -> list[T]:
    """Write what is planned. Re-plan from observed state and retry where a write fails.

    The answer of a write may have been lost, or another client may have written first: only the observed state tells.

    Args:
        plan: Observes and lists what is left to write.
        write: Writes one item.
        confirm_lease: Called before each write.

    Returns:
        The first plan.

    Raises:
        TransientError: A write kept failing.
    """
    first = pending = plan()
    for left in reversed(range(_TRIES)):
        problem: TransientError | None = None
        for item in pending:
            confirm_lease()
            try:
                write(item)
            except TransientError as error:
                problem = error
        if problem is None or not (pending := plan()):
            break
        if not left:
            raise problem
    return first

"""Errors for the person at three in the morning: what was expected, what was found, what to do next."""

from __future__ import annotations


class StorageSwitchError(Exception):
    """Base of every error that the project raises on purpose. Its text never holds a secret.

    Args:
        problem: What was expected and what was found.
        state: What state things are in now; omitted where nothing was changed.
        next_step: What to do next: a command, a setting, a task to clear.
    """

    def __init__(self, problem: str, *, state: str = "", next_step: str = "") -> None:
        self.problem, self.state, self.next_step = problem, state, next_step
        parts = (problem, f"State now: {state}" if state else "", f"Next: {next_step}" if next_step else "")
        super().__init__("\n".join(part for part in parts if part))


class TransientError(StorageSwitchError):
    """May go away by itself: Airflow retries the task."""


class LostAnswerError(TransientError):
    """No answer came: the request may have been carried out, or may still be in flight."""


class UnreachableError(TransientError):
    """Nothing answered there: no route, no name, nobody listening, or a firewall."""


class StillAwayError(TransientError):
    """Retry budget exhausted: a human clears the task."""


class PermanentError(StorageSwitchError):
    """A permanent error: the task fails at once."""


class NoBucketError(PermanentError):
    """The store has no bucket of this name."""


class NeedsHumanError(StorageSwitchError):
    """A state that only a human may resolve: the task fails at once."""

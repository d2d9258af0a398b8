"""Labs for fixtures, and what a test does on a machine that lacks what it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import pytest

from lab.environment import Lab
from lab.process import LabUnavailableError

if TYPE_CHECKING:
    from pathlib import Path


def lacking(reason: str) -> NoReturn:
    """Skip the test, or fail it where `CI` is set: nothing passes in CI by being skipped.

    Args:
        reason: What this machine lacks, and how to install it.
    """
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (skipped where CI is not set)", pytrace=False)
    pytest.skip(reason)


@contextmanager
def lab_required() -> Iterator[None]:
    """Skip where this machine cannot run a lab; fail in CI."""
    try:
        yield
    except LabUnavailableError as error:
        lacking(str(error))


def up(state: Path, *, airflow: bool, heartbeat_s: int = 3, keeps_fuse: bool = False) -> Iterator[Lab]:
    """Run a lab for as long as a fixture lives."""
    with lab_required():
        lab = Lab.up(state, airflow=airflow, heartbeat_s=heartbeat_s, keeps_fuse=keeps_fuse)
    try:
        yield lab
    finally:
        lab.down()

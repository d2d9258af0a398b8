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


def up_with_objects(state: Path, prefix: str, count: int, size: int) -> Iterator[Lab]:
    """Run a lab with a volume on the old store, and objects beside it that a copy takes.

    Args:
        state: The lab's folder.
        prefix: What their keys begin with.
        count: How many.
        size: Of each, in bytes; a multiple of 4.
    """
    with contextmanager(up)(state, airflow=False) as lab:
        lab.seed(30)
        client = lab.old_store.client()
        for number in range(count):
            body = number.to_bytes(4, "big") * (size // 4)
            client.put_object(Bucket=lab.old_store.bucket, Key=f"{prefix}{number:04}.bin", Body=body)
        yield lab

"""Fixtures that several folders of tests use: the lab, started once a session and only where a test asks for it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from lab.environment import Lab
from lab.process import LabUnavailableError

if TYPE_CHECKING:
    from pathlib import Path


@contextmanager
def skipped_without_lab() -> Iterator[None]:
    """Skips where this machine cannot run a lab, except in CI."""
    try:
        yield
    except LabUnavailableError as error:
        if os.environ.get("CI"):
            raise  # nothing passes in CI by being skipped
        pytest.skip(str(error))


def up(state: Path, *, airflow: bool, heartbeat_s: int = 3) -> Iterator[Lab]:
    """A lab for as long as a fixture lives."""
    with skipped_without_lab():
        lab = Lab.up(state, airflow=airflow, heartbeat_s=heartbeat_s)
    try:
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab without Airflow, its volume on the old store and seeded with nothing."""
    yield from up(tmp_path_factory.mktemp("lab"), airflow=False)


@pytest.fixture(scope="session")
def airflow_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab with Airflow: for e2e."""
    yield from up(tmp_path_factory.mktemp("lab"), airflow=True)

"""Fixtures that several folders of tests use: the lab, started once a session and only where a test asks for it.

Nothing that a session starts outlives it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lab.environment import Lab
from lab.kube.client import unmount_below
from tests.support import reaper
from tests.support.labs import up


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    reaper.watch(tmp_path_factory.getbasetemp())
    yield
    # Before another session may remove the folder.
    unmount_below(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab without Airflow, its volume on the old store and seeded with nothing."""
    yield from up(tmp_path_factory.mktemp("lab"), airflow=False)


@pytest.fixture(scope="session")
def airflow_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab with Airflow: for e2e."""
    yield from up(tmp_path_factory.mktemp("lab"), airflow=True)

"""A lab for the faults: one volume that goes to and fro between the two stores, and the table of what was tried."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from lab.environment import Lab
from lab.writer import Writer
from tests.conftest import up
from tests.faults.harness import SHORT, Run
from tests.faults.worker import Fault
from tests.faults.world import Sides, writing

_rows: list[tuple[str, str, str, str]] = []
_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def fault_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Heartbeat one second; both stores hold the volume's first files."""
    for lab in up(tmp_path_factory.mktemp("faults"), airflow=False, heartbeat_s=1):
        lab.seed(20)
        lab.copy_to_new_store()
        yield lab


@pytest.fixture
def sides(fault_lab: Lab) -> Sides:
    """Where the volume is and where it goes."""
    return Sides.of(fault_lab)


@pytest.fixture
def start(fault_lab: Lab, sides: Sides, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Make a run from `source` to `target` with some faults in it."""

    def make(*faults: Fault, **params: Any) -> Run:
        number = next(_numbers)
        folder = tmp_path_factory.mktemp(f"run-{number}")
        return Run(fault_lab, folder, f"faults__{number}", sides.params | SHORT | params, faults)

    return make


@pytest.fixture
def writer(fault_lab: Lab) -> Iterator[Writer]:
    """An application that has acknowledged some files before and goes on during the test."""
    with writing(fault_lab, f"writer-{next(_numbers)}") as running:
        yield running


@pytest.fixture
def tell() -> Callable[[str, str, str, str], None]:
    """Add a line to the table: step, fault, what was done then, outcome."""
    return lambda *line: _rows.append(line)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the table."""
    if not _rows:
        return
    header = ("step", "fault", "then", "outcome")
    widths = [max(len(line[column]) for line in [header, *_rows]) for column in range(4)]
    terminalreporter.section(f"{len(_rows)} faults")
    for line in [header, *_rows]:
        terminalreporter.write_line("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))

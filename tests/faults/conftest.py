"""A lab for the faults: one volume that goes to and fro between the two stores, and the table of what was tried."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from include.juicefs_storage.tasks.revert import readable_backups
from lab.environment import Lab
from lab.writer import Writer
from tests.support.harness import REVERT_ID, SHORT, Run, Start, Tell, vault
from tests.support.labs import up
from tests.support.worker import Fault
from tests.support.world import Sides, writing

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
def start(fault_lab: Lab, sides: Sides, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Make a run from `source` to `target` with some faults in it."""

    def make(*faults: Fault, **params: Any) -> Run:
        number = next(_numbers)
        folder = tmp_path_factory.mktemp(f"run-{number}")
        return Run(fault_lab, folder, f"faults__{number}", sides.params | SHORT | params, faults)

    return make


@pytest.fixture
def revert(fault_lab: Lab, sides: Sides, start: Start) -> Start:
    """Make a run that goes back to the newest backup of `sides.target`, with some faults in it.

    Every revert makes a backup of where it began, so that the next one finds the way back.
    """

    def newest() -> str | None:
        found = readable_backups(vault(fault_lab))
        return next((b.backup_id for b in found if b.setting.bucket == sides.target.bucket_url), None)

    def make(*faults: Fault, **params: Any) -> Run:
        if not newest():
            for _ in range(2):  # there and back again
                there = start(**Sides.of(fault_lab).params)
                assert there.go() == "switched", there.errors
        run = start(*faults, backup_id=newest(), **params)
        run.dag_id = REVERT_ID
        for name in sides.params:
            del run.params[name]
        run.states["choose_backup"] = "success"  # there is nothing to choose
        return run

    return make


@pytest.fixture
def writer(fault_lab: Lab) -> Iterator[Writer]:
    """An application that has acknowledged some files before, and keeps writing during the test."""
    with writing(fault_lab, f"writer-{next(_numbers)}") as running:
        yield running


@pytest.fixture
def tell() -> Tell:
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

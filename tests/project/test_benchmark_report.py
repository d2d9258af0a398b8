"""What the benchmark's page says follows from its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import Document, Result
from benchmarks.sync import RESULTS


def results(peer: str, *times: tuple[float, float]) -> list[Result]:
    return [Result("copy", number, peer, wall, cpu, 50) for number, (wall, cpu) in enumerate(times)]


@pytest.fixture
def document() -> Document:
    runs = [
        *results("native", (1.0, 0.5), (2.0, 0.5), (1.0, 0.5)),
        *results("one", (4.0, 1.0), (4.0, 1.0), (4.0, 1.0)),
        *results("other", (2.0, 5.0), (8.0, 5.0), (8.0, 5.0)),
    ]
    names = {name: name for name in ("native", "one", "other")}
    machine = {"date": "2026-01-01", "cpu": "2 x CPU", "kernel": "6", "load": "0.1"}
    return Document(machine, names, names, {"copy": "Copy"}, runs)


def test_ratios_are_of_the_medians_and_to_the_best_of_each_round(document: Document) -> None:
    assert document.ratio("copy", "one", "wall_s") == 0.25
    assert document.ratio("copy", "other", "wall_s") == 0.125
    assert document.ratio("copy", "best", "wall_s") == 0.5
    assert document.ratio("copy", "best", "cpu_s") == 0.5
    assert document.ratio("copy", "absent", "wall_s") is None


def test_tables_and_plot_show_every_program(document: Document, tmp_path: Path) -> None:
    assert "| Copy | 1.00 / 0.50 / 50 | 4.00 / 1.00 / 50 | 8.00 / 5.00 / 50 |" in report.times_table(document)
    assert "| Copy | 0.25 / 0.50 | 0.12 / 0.10 | 0.50 / 0.50 |" in report.ratios_table(document)
    report.draw(document, tmp_path / "plot.svg")
    report.draw(document, tmp_path / "again.svg")
    assert "wall time" in (tmp_path / "plot.svg").read_text()
    assert (tmp_path / "plot.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()


def test_the_page_shows_the_results_that_are_kept() -> None:
    data = json.loads(RESULTS.read_text())
    document = Document(**{**data, "results": [Result(**run) for run in data["results"]]})
    assert report.markdown(document) in report.PAGE.read_text()

"""Markdown that plans, reports and pages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def bullets(items: Sequence[str]) -> list[str]:
    """Format a list, one item a line; `none` where it is empty."""
    return [f"- {item}" for item in items] or ["- none"]


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Format a table, one row a line. Cells are Markdown."""
    return [_row(columns), "|" + "---|" * len(columns), *(_row([cell(value) for value in row]) for row in rows)]


def cell(value: object) -> str:
    """Format a value for a cell of a table: on one line, and without the sign that ends a cell."""
    return one_line(str(value)).replace("|", "\\|")


def one_line(text: str) -> str:
    """Return a text with each run of white space as one space."""
    return " ".join(text.split())


def counted(number: int, noun: str) -> str:
    """Format a number and its noun: `1 volume`, `2 volumes`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"

"""Markdown that plans and reports share."""

from __future__ import annotations

from collections.abc import Sequence


def bullets(items: Sequence[str]) -> list[str]:
    """A Markdown list; says so where it is empty."""
    return [f"- {item}" for item in items] or ["- none"]

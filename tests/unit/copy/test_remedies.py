"""What an error of the copy recommends can be done: its params exist, and no engine is named that is refused alike."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from include.juicefs_storage.copy.params import EngineName, SyncParams
from include.juicefs_storage.switch.params import SwitchParams

PACKAGE = Path(__file__).parents[3] / "include" / "juicefs_storage"
FOLDERS = ("copy", "objects", "tasks/sync", "adapters/s3", "adapters/tools")
TASKS = {"check", "list_source", "plan_partitions", "copy", "verify", "reconcile", "finalize"}


def remedies() -> Iterator[tuple[Path, str]]:
    """Yield each `next_step` with its file; `…` stands for what is filled in."""
    for folder in FOLDERS:
        for file in sorted((PACKAGE / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "next_step":
                    yield file, text_of(node.value)


def text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        return "…"
    return "".join(text_of(child) for child in ast.iter_child_nodes(node))


def test_what_is_recommended_can_be_done() -> None:
    found = list(remedies())
    assert len(found) > 30
    for file, remedy in found:
        where = f"{file.relative_to(PACKAGE)}: {remedy}"
        params = set(SyncParams.model_fields) | (set(SwitchParams.model_fields) if "switch" in remedy else set())
        given = re.findall(r"\b(\w+)=([\w+]+)", remedy)
        assert {name for name, _ in given} | set(re.findall(r"`([a-z]+_[a-z_]+)`", remedy)) <= params, where
        assert set(re.findall(r"[Cc]lear `?([a-z_]+)", remedy)) <= TASKS | {"this", "the"}, where
        for engine in (value for name, value in given if name == "engine"):
            # The native engine lists both sides whichever engine copies: another one does not help it.
            assert engine in get_args(EngineName), where
            assert file.parent.name == "tools", where
            assert engine == "native", where

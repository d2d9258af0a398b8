"""The pages on the structure say what the code is: layers, tasks, modules."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "include/juicefs_storage"
PAGE = (ROOT / "docs/architecture.md").read_text()


def contracts() -> list[dict[str, Any]]:
    linter: list[dict[str, Any]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    return linter


def layers() -> list[str]:
    (stack,) = (contract["layers"] for contract in contracts() if contract["type"] == "layers")
    return [str(layer) for layer in stack]


def task_functions() -> set[str]:
    code = "".join(path.read_text() for path in (PACKAGE / "tasks").rglob("*.py"))
    return set(re.findall(r"^def (\w+)\(", code, re.MULTILINE))


def test_the_diagram_shows_the_layers_that_the_linter_holds() -> None:
    drawn = re.search(r"flowchart TD\n\s+(.+)", PAGE)
    assert drawn
    assert drawn[1].split(" --> ") == [layer.replace(" | ", " & ") for layer in layers()]


def test_every_package_is_described_in_the_order_of_the_layers() -> None:
    described = re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", PAGE, re.MULTILINE)
    assert described == [name for layer in layers() for name in layer.split(" | ")]
    assert set(described) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}


def test_what_reaches_nothing_is_what_the_linter_keeps_pure() -> None:
    pure = next(contract["source_modules"] for contract in contracts() if "pure" in contract["name"])
    described = re.findall(r"^\| `(\w+)` \| .+ \| nothing \|$", PAGE, re.MULTILINE)
    assert {f"include.juicefs_storage.{name}" for name in described} == set(pure)


def test_the_modules_beside_the_layers_are_named() -> None:
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert {name for name in modules if f"`{name}`" not in PAGE} == set()


def test_the_sequence_of_the_cut_over_names_tasks() -> None:
    diagram = re.search(r"```mermaid\nsequenceDiagram\n(.*?)```", PAGE, re.DOTALL)
    assert diagram
    named = set(re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", diagram[1])) - {"settle_s"}
    assert len(named) > 12
    assert named - task_functions() == set()


def test_the_files_that_are_named_exist() -> None:
    named = [name for name in re.findall(r"`([\w./-]+(?:\.py|/))`", PAGE) if name != "include/juicefs_storage"]
    assert len(named) > 10
    assert [name for name in named if not ((ROOT / name).exists() or (PACKAGE / name).exists())] == []


def test_the_glossary_gives_each_term_once_and_in_order() -> None:
    glossary = PAGE[PAGE.index("## Glossary") :]
    terms = [term.lower() for term in re.findall(r"^\| ([^|`]+?) \|", glossary, re.MULTILINE)][1:]
    assert len(terms) > 30
    assert terms == sorted(set(terms))

"""What the docs name is there: files, headings, params, make targets, tests."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.fleet.plan import FleetParams
from include.juicefs_storage.switch.params import SwitchParams

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("[CS]*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\]\((?!https?:)(?P<file>[^)#\s]*)(?:#(?P<heading>[^)\s]*))?\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as Git hosts make them."""
    headings = re.findall(r"^#+ (.+)$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for link in LINK.finditer(CODE_BLOCK.sub("", page.read_text())):
        target = page.parent / link["file"] if link["file"] else page
        if not target.exists() or (link["heading"] and link["heading"] not in anchors(target)):
            broken.append(link[0])
    return broken


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A heading, here\n[a](page.md#a-heading-here) [b](gone.md) [c](#nowhere) ![d](gone.png)\n")
    assert broken_links(page) == ["](gone.md)", "](#nowhere)", "](gone.png)"]


@pages
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_every_page_and_picture_can_be_reached() -> None:
    linked = {(page.parent / link["file"]).resolve() for page in PAGES for link in LINK.finditer(page.read_text())}
    files = {*PAGES[1:], *(ROOT / "docs").rglob("*.png")}
    assert files - linked == set()


@pytest.mark.parametrize(("name", "model"), [("switch", SwitchParams), ("sync", SyncParams), ("fleet", FleetParams)])
def test_the_params_are_listed_as_the_form_shows_them(name: str, model: type[BaseModel]) -> None:
    text = (ROOT / f"docs/{name}.md").read_text()
    table = re.findall(r"^\|([^|]+)\| `(\w+)` \|([^|]+)\|([^|]*)\|", text, re.MULTILINE)
    written = {name: (section.strip(), title.strip()) for section, name, title, _ in table}
    assert written == form(f"juicefs_storage_{name}")
    defaults = {}
    for param, field in model.model_fields.items():
        value = "required" if field.is_required() else field.default
        empty = value is None or value == ()
        defaults[param] = "" if empty else str(value).lower() if isinstance(value, bool) else str(value)
    assert {name: default.strip(" `") for _, name, _, default in table} == defaults


def form(dag_id: str) -> dict[str, tuple[str, str]]:
    """Section and title of every param, read from the DAG file: importing it would take Airflow's seconds."""
    tree = ast.parse((ROOT / f"dags/{dag_id}.py").read_text())
    params = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "PARAMS"
    )
    found = {}
    assert isinstance(params, ast.Dict)
    for key, call in zip(params.keys, params.values, strict=True):
        assert isinstance(key, ast.Constant)
        assert isinstance(call, ast.Call)
        named = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
        plain = [ast.literal_eval(argument) for argument in call.args]
        function = ast.unparse(call.func)
        section = (
            "Advanced" if function == "seconds" else named.get("section") or plain[2 if function == "texts" else 3]
        )
        found[str(key.value)] = (section, named.get("title") or plain[0 if function == "texts" else 1])
    return found


@pages
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for names in known for name in names.split()}
    assert set(re.findall(r"(?:^|`|=true )make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


@pages
def test_tests_that_are_named_exist(page: Path) -> None:
    missing = []
    for name, function in re.findall(r"\b(test_\w+\.py)(?:::(test_\w+))?", page.read_text()):
        files = list((ROOT / "tests").rglob(name))
        if not files or (function and f"def {function}(" not in files[0].read_text()):
            missing.append(f"{name}::{function}")
    assert missing == []
    code = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    named = set(re.findall(r"`((?:test|assert)_\w+)`", page.read_text()))
    assert {name for name in named if f"def {name}(" not in code} == set()


def test_commands_of_the_lab_exist() -> None:
    text = (ROOT / "docs/lab.md").read_text()
    named = set(re.findall(r"python -m lab ([a-z-]+)", text))
    usage = subprocess.run(
        [sys.executable, "-m", "lab", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    offered = re.search(r"\{([a-z,-]+)\}", usage)
    assert offered
    assert named == set(offered[1].split(","))

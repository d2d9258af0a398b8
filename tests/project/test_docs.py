"""What the docs name is there: files, headings, params, make targets, tests."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.markdown_pages import CODE_BLOCK, LINK, anchors
from tests.support.param_tables import DOCS, MODELS, chinese_meanings, meanings, param_pages, written

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("[CS]*.md")), *sorted(DOCS.rglob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


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


@pytest.mark.parametrize("page", [page for name in MODELS for page in param_pages(name)], ids=str)
def test_the_params_are_listed_as_the_form_shows_them(page: Path) -> None:
    assert written(page) == page.read_text(), "run `make docs`"


def test_every_meaning_of_a_param_has_its_chinese() -> None:
    chinese = chinese_meanings().keys()
    assert (meanings() - chinese, chinese - meanings()) == (set(), set()), "see tests/support/params_zh.yaml"


@pages
def test_make_targets_exist(page: Path) -> None:
    known = set(re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    targets = {name for names in known for name in names.split()}
    assert set(re.findall(r"(?:^|`|=true )make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= targets


@pages
def test_tests_that_are_named_exist(page: Path) -> None:
    missing = []
    for name, function in re.findall(r"\b((?:\w+/)*test_\w+\.py)(?:::(test_\w+))?", page.read_text()):
        files = [file for file in (ROOT / "tests").rglob("test_*.py") if file.as_posix().endswith(f"/{name}")]
        if not any(not function or f"def {function}(" in file.read_text() for file in files):
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

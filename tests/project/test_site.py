"""The docs as a site: its links, its languages, and that it takes nothing from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.site import site_links

ROOT = Path(__file__).parents[2]
#: What a browser fetches by itself.
FETCHED = re.compile(
    r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link[^>]* href=\"?(?:https?:)?//[^>]*stylesheet|@import"
)


@pytest.mark.parametrize(
    ("page", "link", "there"),
    [
        ("index.md", "[lab](docs/lab.md#commands)", "[lab](lab.md#commands)"),
        ("index.md", "![a](docs/images/dag.png)", "![a](images/dag.png)"),
        ("index.md", "[中文](README.zh-CN.md)", "[中文](zh/index.md)"),
        ("zh/index.md", "[lab](docs/zh/lab.md)", "[lab](lab.md)"),
        ("zh/switch.md", "[rights](../rights.md)", "[rights](../rights.md)"),
        ("adr/0001-x.md", "[home](../../README.md)", "[home](../index.md)"),
        (
            "lab.md",
            "[`fuse.py`](../lab/kube/fuse.py)",
            "[`fuse.py`](https://git.example/us/it/blob/main/lab/kube/fuse.py)",
        ),
        ("lab.md", "[here](#faults)", "[here](#faults)"),
        ("lab.md", "```\n[a](../b)\n```", "```\n[a](../b)\n```"),
    ],
)
def test_a_link_of_the_repository_becomes_one_of_the_site(page: str, link: str, there: str) -> None:
    assert site_links(link, page, "https://git.example/us/it/") == there


def test_a_link_to_no_page_is_plain_text_where_the_repository_is_not_on_the_web() -> None:
    assert site_links("see [`fuse.py`](../lab/kube/fuse.py).", "lab.md", None) == "see `fuse.py`."


@pytest.mark.slow
def test_the_site_builds_strictly_in_both_languages_and_fetches_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {page.relative_to(tmp_path).as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert [name for name, page in pages.items() if FETCHED.search(page)] == []
    assert {name for name, page in pages.items() if '<html lang="zh"' in page} == {
        name for name in pages if name.startswith("zh/")
    }
    found = json.loads((tmp_path / "search/search_index.json").read_text())["docs"]
    # Cut into words, or a browser finds whole sentences alone.
    assert any("\u200b回滚\u200b" in entry["text"] for entry in found if entry["location"].startswith("zh/"))

"""The Chinese pages say what the English ones say: the same outline, commands, names, figures and links."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.support.markdown_pages import CODE_BLOCK, LINK, anchors

ROOT = Path(__file__).parents[2]
#: English -> Chinese.
PAIRS = {
    ROOT / "README.md": ROOT / "README.zh-CN.md",
    **{ROOT / "docs" / page.name: page for page in sorted((ROOT / "docs/zh").glob("*.md"))},
}
ENGLISH = {chinese: english for english, chinese in PAIRS.items()}
#: Read by those who change the project, not by operators.
ENGLISH_ALONE = {"architecture.md", "benchmarks.md", "development.md", "facts.md", "simulation.md", "soak.md"}
LINE_KINDS = re.compile(r"^(#+ |```|\||\s*- |\d+\. )")

pairs = pytest.mark.parametrize(
    ("english", "chinese"), PAIRS.items(), ids=[str(page.relative_to(ROOT)) for page in PAIRS.values()]
)


def outline(page: Path) -> list[str]:
    """The headings, rows of tables (with the number of cells), items and code blocks, in order."""
    lines = CODE_BLOCK.sub("```", page.read_text()).splitlines()
    kinds = [(line.replace(r"\|", ""), found[1]) for line in lines if (found := LINE_KINDS.match(line))]
    return [f"{line.count('|') - 1} cells" if kind == "|" else kind for line, kind in kinds]


def code_blocks(page: Path) -> list[str]:
    """The code blocks without their comments: what stands behind two spaces or a hash."""
    blocks = CODE_BLOCK.findall(page.read_text())
    return [re.sub(r"(?<=\S)(\s{2,}|[ ]+#).*", "", block, flags=re.MULTILINE) for block in blocks]


def names(page: Path) -> set[str]:
    """What stands between backticks: params, tasks, options, values, commands."""
    return {" ".join(code.split()) for code in re.findall(r"`([^`]+)`", CODE_BLOCK.sub("", page.read_text()))}


def figures(page: Path) -> set[str]:
    text = re.sub(r"`[^`]+`", "", LINK.sub("", CODE_BLOCK.sub("", page.read_text())))
    return set(re.findall(r"\d(?:[\d,.]*\d)?", text))


def links(page: Path) -> Counter[tuple[Path, int | None]]:
    """The links by file and number of the heading, a Chinese page counted as its English one."""
    found: Counter[tuple[Path, int | None]] = Counter()
    for link in LINK.finditer(CODE_BLOCK.sub("", page.read_text())):
        target = (page.parent / link["file"]).resolve() if link["file"] else page
        heading = anchors(target).index(link["heading"]) if link["heading"] else None
        found[ENGLISH.get(target, target), heading] += 1
    return found


def test_every_page_for_operators_is_there_in_chinese() -> None:
    english = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert english - {page.name for page in (ROOT / "docs/zh").glob("*.md")} == ENGLISH_ALONE


@pairs
def test_the_outline_is_the_same(english: Path, chinese: Path) -> None:
    assert outline(chinese) == outline(english)


@pairs
def test_the_commands_are_the_same(english: Path, chinese: Path) -> None:
    assert code_blocks(chinese) == code_blocks(english)


@pairs
def test_params_tasks_and_values_have_the_same_names(english: Path, chinese: Path) -> None:
    assert (names(english) - names(chinese), names(chinese) - names(english)) == (set(), set())


@pairs
def test_no_figure_is_missing(english: Path, chinese: Path) -> None:
    """Chinese writes more of them in digits."""
    assert figures(english) - figures(chinese) == set()


@pairs
def test_the_links_lead_to_the_same_headings(english: Path, chinese: Path) -> None:
    assert (links(english) - links(chinese), links(chinese) - links(english)) == (Counter(), Counter())


@pairs
def test_each_page_begins_with_a_link_to_the_other(english: Path, chinese: Path) -> None:
    firsts = [page.read_text().split("\n\n")[1] for page in (english, chinese)]
    assert [
        [(page.parent / link["file"]).resolve() for link in LINK.finditer(first)]
        for page, first in zip((english, chinese), firsts, strict=True)
    ] == [[chinese], [english]]


@pairs
def test_chinese_pages_link_to_chinese_pages(english: Path, chinese: Path) -> None:
    text = chinese.read_text().split("\n\n", 2)[2]
    assert [link[0] for link in LINK.finditer(text) if (chinese.parent / link["file"]).resolve() in PAIRS] == []


def test_differences_are_seen(tmp_path: Path) -> None:
    one, other = tmp_path / "one.md", tmp_path / "other.md"
    one.write_text("# A\n\n- `dry_run`, 12 s\n\n| a | b |\n\n```bash\nmake demo   # try\n```\n[a](one.md#a)\n")
    other.write_text("# A\n## B\n\n`dry-run` 2 s\n\n| a |\n\n```bash\nmake test   # 试\n```\n[a](one.md)\n")
    for of in (outline, code_blocks, names, figures, links):
        assert of(one) != of(other)

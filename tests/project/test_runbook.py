"""docs/runbook.md: each line of the runbook leads to a task, a module and a test, and the three have one name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "include/juicefs_storage"
PAGE = (ROOT / "docs/runbook.md").read_text()
ROWS = re.findall(r"^\| `(\w+)` \| `([\w/.]+)` \| (.+) \| `([\w/.]+)` \|$", PAGE, re.MULTILINE)
#: What a rollback's tasks undo or do again, by the module of the step.
BACK = {
    "copy_back": "catch_up",
    "restore_secret": "patch_secret",
    "restore_setting": "write_setting",
    "restart_csi_again": "restart_csi",
    "prove_clients_on_old": "prove_clients",
    "prove_blocks_on_old": "prove_blocks",
}
#: Copies, all of them.
ALSO = {"copy_ahead": "catch_up"}


def tasks() -> set[str]:
    code = "".join(path.read_text() for path in (PACKAGE / "tasks").rglob("*.py"))
    return set(re.findall(r"^def (\w+)\(", code, re.MULTILINE))


def test_every_section_with_commands_has_its_rows() -> None:
    sections = re.split(r"^#{2,3} ", PAGE, flags=re.MULTILINE)
    commands = [section for section in sections if "```bash" in section]
    assert commands
    assert [section.split("\n")[0] for section in commands if "| task | module | effect | test |" not in section] == []
    assert len(ROWS) == PAGE.count("\n| `"), "a row that the pattern does not read"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_a_row_names_what_exists(row: tuple[str, str, str, str]) -> None:
    task, module, effects, test = row
    assert task in tasks()
    missing = [path for path in (module, *re.findall(r"`([\w/.]+)`", effects)) if not (PACKAGE / path).is_file()]
    assert missing == []
    assert (ROOT / "tests" / test).is_file(), test


@pytest.mark.parametrize(
    "row", [row for row in ROWS if re.fullmatch(r"switch/\w+\.py", row[1])], ids=lambda row: row[0]
)
def test_task_module_and_test_of_a_step_have_one_name(row: tuple[str, str, str, str]) -> None:
    task, module, _, test = row
    name = {**BACK, **ALSO}.get(task, task)
    assert (Path(module).stem, Path(test).name) == (name, f"test_{name}.py")


def test_what_the_runbook_has_no_line_for_is_held_too() -> None:
    rows = re.findall(r"^\| [^|`]+ \| `(\w+)` \| `([\w/.]+)` \|$", PAGE, re.MULTILINE)
    assert len(rows) == PAGE[PAGE.index("## What the runbook has no line for") :].count("\n| ") - 1
    assert [task for task, _ in rows if task not in tasks()] == []
    assert [test for _, test in rows if not (ROOT / "tests" / test).is_file()] == []

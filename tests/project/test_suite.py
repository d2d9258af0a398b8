"""What the tests promise of themselves: where they lie, what they import, and that nothing is skipped unseen."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support import labs

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
UNIT = TESTS / "unit"
#: An unconditional one too: a case that does not apply is left out of the parameters instead.
SKIP = re.compile(r"pytest\.(mark\.)?(skip|skipif|importorskip|xfail)\b(?!\.Exception)")

#: Tests in tests/unit of no module of that name, and why.
OTHERS = {
    "copy/test_kills.py": "a whole copy, killed at every point: run, manifests and reconcile together",
    "copy/test_remedies.py": "what the errors of the copy recommend, in all its modules",
    "lab/test_fuse.py": "of lab/kube/fuse.py",
    "lab/test_writer.py": "of lab/writer.py",
    "plugins/test_juicefs_storage_plugin.py": "of plugins/juicefs_storage_plugin.py",
    "plugins/test_run_now.py": "of the page of a run that plugins/juicefs_storage_plugin.py serves",
    "plugins/test_run_note.py": "of the notes that plugins/juicefs_storage_plugin.py writes when a run begins or ends",
}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def is_a_test(module: str) -> bool:
    """Whether a module is one that pytest collects: shared helpers lie in tests/support."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    return (
        module.startswith("tests.") and path.exists() and (path.name == "conftest.py" or path.name.startswith("test_"))
    )


def test_no_test_module_imports_another() -> None:
    files = [file for folder in ("tests", "benchmarks", "lab") for file in (ROOT / folder).rglob("*.py")]
    imported = [(str(file.relative_to(ROOT)), name) for file in files for name in imports(file) if is_a_test(name)]
    assert imported == []


def test_an_import_of_a_test_module_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "test_it.py"
    file.write_text("from tests.e2e import test_kill\ndef late():\n    from tests.conftest import up\n")
    assert {name for name in imports(file) if is_a_test(name)} >= {"tests.e2e.test_kill", "tests.conftest"}


@pytest.mark.parametrize("file", sorted(UNIT.rglob("test_*.py")), ids=lambda file: str(file.relative_to(UNIT)))
def test_a_unit_test_lies_where_its_module_does(file: Path) -> None:
    path = file.relative_to(UNIT)
    module = ROOT / "include/juicefs_storage" / path.parent / path.name.removeprefix("test_")
    there = module.exists() or (module.with_suffix("") / "__init__.py").exists()
    assert there != (str(path) in OTHERS), f"expected {module.relative_to(ROOT)}, or a reason in OTHERS; not both"


def test_every_exception_is_one() -> None:
    assert [name for name in OTHERS if not (UNIT / name).exists()] == []


def test_tests_are_skipped_by_one_function_alone() -> None:
    """It fails in CI; a mark or a call elsewhere would let a test pass there by not running."""
    files = [str(file.relative_to(ROOT)) for file in TESTS.rglob("*.py") if SKIP.search(file.read_text())]
    assert files == ["tests/support/labs.py"]


def test_what_a_machine_lacks_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="install it"):
        labs.lacking("install it")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="install it"):
        labs.lacking("install it")

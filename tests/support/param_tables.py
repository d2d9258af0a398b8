"""The tables of params in the docs, made from the models: `python -m tests.support.param_tables` writes them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.finish.params import FinishParams
from include.juicefs_storage.fleet.params import FleetParams
from include.juicefs_storage.markdown import table
from include.juicefs_storage.params import Params, describe
from include.juicefs_storage.switch.params import RehearsalParams, RevertForm, SwitchParams

DOCS = Path(__file__).parents[2] / "docs"
MODELS: dict[str, type[Params]] = {
    "switch": SwitchParams,
    "sync": SyncParams,
    "fleet": FleetParams,
    "revert": RevertForm,
    "rehearsal": RehearsalParams,
    "finish": FinishParams,
}
BEGIN, END = "<!-- params: `make docs` writes this table -->\n", "<!-- end of params -->"
BETWEEN_MARKS = re.compile(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", re.DOTALL)


def param_page(name: str) -> Path:
    """Return the page of a DAG."""
    return DOCS / f"{name}.md"


def with_table(text: str, model: type[Params]) -> str:
    """Return the page's text with the current table between its marks."""
    rows = [
        [schema["section"], f"`{name}`", schema["title"], _default(schema), schema["description_md"] + _limits(schema)]
        for name, schema in describe(model).items()
    ]
    lines = table(["section", "param", "title", "default", "meaning"], rows)
    written, count = BETWEEN_MARKS.subn("".join(f"{line}\n" for line in lines).replace("\\", "\\\\"), text)
    if count != 1:
        raise ValueError(f"expected the marks of one table of params, found {count}")
    return written


def _default(schema: dict[str, Any]) -> str:
    if "default" not in schema:
        return "required"
    value = schema["default"]
    if value in (None, "", []):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _limits(schema: dict[str, Any]) -> str:
    return f" ({schema['minimum']:,} to {schema['maximum']:,})" if "maximum" in schema else ""


if __name__ == "__main__":
    for name, model in MODELS.items():
        param_page(name).write_text(with_table(param_page(name).read_text(), model))

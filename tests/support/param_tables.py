"""The tables of params in the docs, made from the models: `python -m tests.support.param_tables` writes them.

The Chinese tables take each meaning from `params_zh.yaml`, by its English words: a new one needs a line there.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml

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
COLUMNS = ["section", "param", "title", "default", "meaning"]
#: What a form ends a meaning with where an empty param is taken from an earlier run.
AS_BEFORE = " Empty: as the run that made the backup."


def param_pages(name: str) -> list[Path]:
    """Return the page of a DAG, and its translation where there is one."""
    return [page for page in (DOCS / f"{name}.md", DOCS / "zh" / f"{name}.md") if page.exists()]


def written(page: Path) -> str:
    """Return the page's text with the current table between its marks, in the page's language."""
    chinese = page.parent.name == "zh"
    columns = ["分组", "参数", "表单中的标题", "默认值", "含义"] if chinese else COLUMNS
    lines = table(
        columns, [_row(name, schema, chinese=chinese) for name, schema in describe(MODELS[page.stem]).items()]
    )
    text = "".join(f"{line}\n" for line in lines).replace("\\", "\\\\")
    done, count = BETWEEN_MARKS.subn(text, page.read_text())
    if count != 1:
        raise ValueError(f"expected the marks of one table of params in {page}, found {count}")
    return done


@cache
def chinese_meanings() -> dict[str, str]:
    """Return what params mean, in English, and the same in Chinese."""
    loaded: dict[str, str] = yaml.safe_load(Path(__file__).with_name("params_zh.yaml").read_text())
    return loaded


def meanings() -> set[str]:
    """Return what all params mean, in the parts that are translated one by one."""
    return {
        part
        for model in MODELS.values()
        for schema in describe(model).values()
        for part in split(schema["description_md"])
    }


def in_chinese(part: str) -> str:
    """Return a part of a param's meaning in Chinese."""
    if part not in chinese_meanings():
        raise LookupError(f"tests/support/params_zh.yaml has no Chinese for: {part}")
    return chinese_meanings()[part]


def split(meaning: str) -> list[str]:
    """Return the parts of a param's meaning that are translated one by one."""
    head, tail, rest = meaning.partition(AS_BEFORE)
    return [part.strip() for part in (head, tail, rest) if part]


def _row(name: str, schema: dict[str, Any], *, chinese: bool) -> list[str]:
    meaning, required, limits = schema["description_md"], "required", " ({minimum:,} to {maximum:,})"
    if chinese:
        meaning, required, limits = (
            "".join(map(in_chinese, split(meaning))),
            "必填",
            "取值 {minimum:,} 到 {maximum:,}。",
        )
    if "maximum" in schema:
        meaning += limits.format(**schema)
    return [schema["section"], f"`{name}`", schema["title"], _default(schema, required), meaning]


def _default(schema: dict[str, Any], required: str) -> str:
    if "default" not in schema:
        return required
    value = schema["default"]
    if value in (None, "", []):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    for name in MODELS:
        for page in param_pages(name):
            page.write_text(written(page))

"""One model makes the validation, the form and the docs of a param."""

from __future__ import annotations

from typing import Literal

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.params import Params, describe, param, without_links


class Example(Params):
    """Params of every kind."""

    last: float | None = param("Advanced", "Last", "A number.", None)
    mode: Literal["a", "b"] | None = param("Safety", "Mode", "`a` or `b`.", None)
    patterns: tuple[str, ...] = param("What", "Patterns", "One a line.", ())
    count: int | None = param("What", "Count", "A [count](page.md#count).", None, ge=1, le=9)
    flag: bool = param("What", "Flag", "A switch.", True)
    name: str = param("Volume", "Name", "A name.", min_length=3, examples=["data"])


def test_every_kind_of_field_is_described_as_json_schema() -> None:
    described = describe(Example)
    shown = {"section": "What", "title": "Count", "description_md": "A [count](page.md#count)."}
    assert described["count"] == {"type": ["null", "integer"], "minimum": 1, "maximum": 9, "default": None} | shown
    kinds = {name: (schema["type"], schema.get("default", "required")) for name, schema in described.items()}
    assert kinds == {
        "name": ("string", "required"),
        "patterns": ("array", []),
        "count": (["null", "integer"], None),
        "flag": ("boolean", True),
        "mode": (["null", "string"], None),
        "last": (["null", "number"], None),
    }
    assert described["mode"]["enum"] == ["a", "b", None]
    assert described["patterns"]["items"] == {"type": "string"}
    assert (described["name"]["minLength"], described["name"]["examples"]) == (3, ["data"])


def test_sections_come_in_one_order_and_fields_in_that_of_the_model() -> None:
    assert list(describe(Example)) == ["name", "patterns", "count", "flag", "mode", "last"]


def test_a_link_becomes_its_text() -> None:
    assert without_links("A [count](page.md#count), `[x]`.") == "A count, `[x]`."


@pytest.mark.parametrize("empty", [None, "", " \t"])
def test_what_is_empty_is_not_given(empty: str | None) -> None:
    given = dict.fromkeys(Example.model_fields, empty) | {"name": "data"}
    assert Example.validated(given) == Example(name="data")
    with pytest.raises(PermanentError, match='`name`: Field required; found nothing, for example "data"'):
        Example.validated({"name": empty})


def test_limits_hold_for_optional_numbers() -> None:
    with pytest.raises(PermanentError, match="`count`"):
        Example.validated({"name": "data", "count": 10})


def test_a_refusal_shows_no_keys_of_a_url() -> None:
    with pytest.raises(PermanentError) as refused:
        Example.validated({"name": "data", "count": "http://key:secret@host"})
    assert "//***@host" in str(refused.value)
    assert "secret" not in str(refused.value)

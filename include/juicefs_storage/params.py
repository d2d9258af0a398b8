"""The params of a DAG, written once: a model validates them, and the trigger form and the docs are made from it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

from annotated_types import Ge, Le, MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo

from include.juicefs_storage.errors import PermanentError

BUCKET_NAME = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")

#: The sections of the forms, in the order in which they are shown.
SECTIONS = (
    "Backup",
    "Volume",
    "Volumes",
    "Source",
    "Target",
    "New storage",
    "What",
    "Waves",
    "Refresh",
    "Old store",
    "Watch",
    "Certify",
    "Safety",
    "Advanced",
)

_JSON_TYPES: Mapping[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number"}
_KEYS_IN_URL = re.compile(r"//[^/\s\"]*@")
_MARKDOWN_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


class Params(BaseModel):
    """Base of the params of every DAG. Field names are the public interface.

    None and empty text are "not given": a form, REST and `--conf` send either for a field that was left empty.
    """

    # Built when first used: a DAG file needs the fields alone.
    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, given: Any) -> Any:
        return without_empty(given) if isinstance(given, Mapping) else given

    @classmethod
    def validated(cls, given: Mapping[str, Any]) -> Self:
        """Validate the params of a run as Airflow hands them over.

        Raises:
            PermanentError: A param is unknown or has a value that is not allowed; all of them are named.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise refused(error, cls) from None


def without_empty(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what was not given: None, and text that is empty or blank."""
    return {key: value for key, value in given.items() if not (value is None or _is_blank(value))}


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def param(section: str, title: str, description: str, default: Any = ..., **constraints: Any) -> Any:
    """Describe a field of a DAG's params.

    Args:
        section: Of the form; one of `SECTIONS`.
        title: Of the field in the form.
        description: Markdown. Its links are relative to `docs/`; the form shows their text alone.
        default: Left out where the param is required.
        constraints: `ge`, `le`, `min_length`, `examples`, as pydantic's `Field` takes them.
    """
    extra: JsonDict = {"section": section}
    return Field(default, title=title, description=description, json_schema_extra=extra, **constraints)


def describe(model: type[Params]) -> dict[str, dict[str, Any]]:
    """Describe every param as JSON schema, with `section`, `title` and `description_md`, in the order of the form.

    `default` is missing where the param is required.
    """
    described = {name: describe_field(field) for name, field in model.model_fields.items()}
    return dict(sorted(described.items(), key=lambda item: SECTIONS.index(item[1]["section"])))


def describe_field(field: FieldInfo) -> dict[str, Any]:
    """Describe one param; see `describe`."""
    schema = _json_type(field.annotation)
    for constraint in field.metadata:
        match constraint:
            case Ge(ge=minimum):
                schema["minimum"] = minimum
            case Le(le=maximum):
                schema["maximum"] = maximum
            case MinLen(min_length=length):
                schema["minLength"] = length
    if not field.is_required():
        schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    if field.examples:
        schema["examples"] = field.examples
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return {**schema, **extra, "title": field.title, "description_md": field.description}


def _json_type(annotation: Any) -> dict[str, Any]:
    arguments = get_args(annotation)
    if get_origin(annotation) in {Union, UnionType}:
        schema = _json_type(next(each for each in arguments if each is not NoneType))
        nullable = {"enum": [*schema["enum"], None]} if "enum" in schema else {}
        return {**schema, **nullable, "type": ["null", schema["type"]]}
    if get_origin(annotation) is Literal:
        return {"type": "string", "enum": list(arguments)}
    if get_origin(annotation) is tuple:
        return {"type": "array", "items": _json_type(arguments[0])}
    return {"type": _JSON_TYPES[annotation]}


def without_links(markdown: str) -> str:
    """Put a link's text in place of the link."""
    return _MARKDOWN_LINK.sub(r"\1", markdown)


def refused(error: ValidationError, model: type[BaseModel]) -> PermanentError:
    """Build the refusal that names every param that is unknown or has a value that is not allowed."""
    lines = [_explain(dict(detail), model) for detail in error.errors(include_url=False)]
    return PermanentError(
        "Params refused:\n" + "\n".join(f"- {line}" for line in lines),
        next_step="trigger the DAG again with the values corrected",
    )


def _explain(detail: dict[str, Any], model: type[BaseModel]) -> str:
    field = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"`{field}` is not a param of this DAG; params: {', '.join(model.model_fields)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if not field:  # several params together; the message names them
        return message
    info = model.model_fields.get(field)
    example = f", for example {json.dumps(info.examples[0])}" if info and info.examples else ""
    found = "nothing" if detail["type"] == "missing" else json.dumps(detail["input"], default=str)
    found = _KEYS_IN_URL.sub("//***@", found)
    return f"`{field}`: {message}; found {found}{example}"

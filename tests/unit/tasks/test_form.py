"""The trigger form is made from the model that validates it."""

from __future__ import annotations

import pytest

from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.finish.params import FinishParams
from include.juicefs_storage.fleet.params import FleetParams
from include.juicefs_storage.params import Params
from include.juicefs_storage.switch.params import RehearsalParams, RevertForm, SwitchParams
from include.juicefs_storage.tasks.form import form

MODELS = [SwitchParams, RevertForm, FleetParams, SyncParams, RehearsalParams, FinishParams]


@pytest.mark.parametrize("model", MODELS)
def test_every_param_has_a_field_with_section_title_and_description(model: type[Params]) -> None:
    fields = form(model)
    assert fields.keys() == model.model_fields.keys()
    for name, field in fields.items():
        assert field.schema["section"], name
        assert field.schema["title"], name
        assert "](" not in field.schema["description_md"], name


@pytest.mark.parametrize("model", MODELS)
def test_the_form_and_the_model_have_the_same_defaults(model: type[Params]) -> None:
    fields = form(model)
    optional = {name: info for name, info in model.model_fields.items() if not info.is_required()}
    assert {name: field.resolve() for name, field in fields.items() if name in optional} == {
        name: list(info.default) if info.default == () else info.default for name, info in optional.items()
    }
    assert {name for name, field in fields.items() if not field.has_value and name not in optional} == (
        model.model_fields.keys() - optional.keys()
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_form_takes_empty_text_wherever_it_takes_text(model: type[Params]) -> None:
    """REST and TriggerDagRunOperator send it; the model reads it as not given."""
    for name, field in form(model).items():
        if "string" in field.schema["type"] and "enum" not in field.schema and "minLength" not in field.schema:
            assert field.resolve("") == "", name

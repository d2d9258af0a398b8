"""Four eyes: nobody approves the run that they triggered, and no such run goes without an approval."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.tasks import approval
from include.juicefs_storage.tasks.approval import FOUR_EYES, approve, require_second_person


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str | None], object]:
    """Have one person approve what another, or the same, triggered."""
    monkeypatch.setattr(ApprovalOperator, "execute_complete", lambda self, context, event: "approved")

    def approved_by(name: str | None, triggered_by: str | None) -> object:
        context = {
            "ti": SimpleNamespace(xcom_push=lambda key, value: None),
            "dag_run": SimpleNamespace(triggering_user_name=triggered_by),
        }
        event: dict[str, Any] = {"responded_by_user": {"id": "1", "name": name} if name else None}
        return cast("approval.PlanApproval", approve()).execute_complete(cast("Context", context), event)

    return approved_by


def test_a_second_person_approves(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., object]) -> None:
    monkeypatch.setenv(FOUR_EYES, "true")
    assert answer("ben", "anna") == "approved"
    with pytest.raises(AirflowFailException, match="'anna' triggered this run and approved it"):
        answer("anna", "anna")


def test_where_nobody_asks_for_four_eyes_one_person_will_do(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[..., object]
) -> None:
    monkeypatch.delenv(FOUR_EYES, raising=False)
    assert answer("anna", "anna") == "approved"


@pytest.mark.parametrize(
    ("four_eyes", "asked", "run_type", "refused"),
    [
        ("true", False, "manual", "asks for a second person"),
        ("true", True, "manual", ""),
        ("true", False, "operator_triggered", ""),  # the fleet's own approval counts
        ("", False, "manual", ""),
        ("yes", False, "manual", "Expected true or false in JUICEFS_STORAGE_FOUR_EYES, found 'yes'"),
    ],
)
def test_a_run_that_asks_nobody_is_refused_where_four_eyes_are_wanted(
    monkeypatch: pytest.MonkeyPatch, four_eyes: str, asked: bool, run_type: str, refused: str
) -> None:
    monkeypatch.setenv(FOUR_EYES, four_eyes)
    context = {"dag_run": SimpleNamespace(run_type=run_type)}
    monkeypatch.setattr(approval, "get_current_context", lambda: context)
    if not refused:
        require_second_person(asked=asked)
        return
    with pytest.raises(PermanentError, match=refused):
        require_second_person(asked=asked)

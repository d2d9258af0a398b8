"""The human gate between a plan and what it changes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

from airflow.providers.standard.exceptions import HITLRejectException
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Context, get_current_context
from airflow.sdk.exceptions import AirflowFailException

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.tasks.notify import Notify

#: For the workers' environment: `true` where nobody may approve a run that they triggered.
FOUR_EYES = "JUICEFS_STORAGE_FOUR_EYES"

#: The XCom of task `approve` that says who answered.
ANSWER = "answer"

#: What every human gate has in common: no answer within 24 hours rejects.
GATE: dict[str, Any] = {"defaults": "Reject", "fail_on_reject": True, "response_timeout": timedelta(hours=24)}


class PlanApproval(ApprovalOperator):
    """Approval in which a rejection is final while everything else may be tried again.

    Airflow 3.3 may fail the task when the answer comes before the process that asked has been seen to end; the
    second try asks again.
    """

    #: What a rejection means.
    rejected = "The plan was rejected: nothing was changed."

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:
        """Take the answer, and keep who gave it: a rejection leaves no result."""
        answered_by = event.get("responded_by_user")
        context["ti"].xcom_push(ANSWER, {"by": answered_by, "timed_out": bool(event.get("timedout"))})
        try:
            result = super().execute_complete(context, event)
        except HITLRejectException as error:
            raise AirflowFailException(self.rejected) from error
        approved_by = (answered_by or {}).get("name")
        if four_eyes() and context["dag_run"].triggering_user_name == approved_by:
            raise AirflowFailException(
                f"{approved_by!r} triggered this run and approved it, and {FOUR_EYES} asks for a second person. "
                "This task changed nothing. Next: clear it, and have somebody else answer."
            )
        return result


def four_eyes() -> bool:
    """Return whether a run takes a second person.

    Raises:
        PermanentError: The setting is neither `true` nor `false`.
    """
    found = os.environ.get(FOUR_EYES) or "false"
    if found not in {"true", "false"}:
        raise PermanentError(
            f"Expected true or false in {FOUR_EYES}, found {found!r}.",
            state="nothing was changed",
            next_step="correct it in the environment of the workers",
        )
    return found == "true"


def require_second_person(*, asked: bool) -> None:
    """Refuse a run that a person triggered and that asks nobody, where four eyes are wanted.

    The runs that a fleet starts are approved there.

    Args:
        asked: Whether the run waits for an approval.

    Raises:
        PermanentError: It does not, and must.
    """
    if asked or not four_eyes():
        return
    run_type: Any = get_current_context()["dag_run"].run_type
    if getattr(run_type, "value", run_type) == "operator_triggered":
        return
    raise PermanentError(
        f"{FOUR_EYES} asks for a second person, and `require_approval` is off.",
        state="nothing was changed",
        next_step="start a new run with `require_approval` on",
    )


def approve() -> ApprovalOperator:
    """Ask the human gate: show the plan; a rejection or 24 hours without an answer end the run, nothing changed."""
    return PlanApproval(
        task_id="approve",
        subject="{{ ti.xcom_pull(task_ids='plan', key='subject') }}",
        body="{{ ti.xcom_pull(task_ids='plan', key='markdown') }}",
        **GATE,
        notifiers=[Notify("waits for approval", source="plan")],
        doc_md="Wait for a human who has read the plan. A rejection, or no answer within 24 hours, ends the run "
        "failed. **Changes** nothing. **Safe to clear**: yes, it asks again.",
    )

"""The human gate between a plan and what it changes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.providers.standard.exceptions import HITLRejectException
from airflow.providers.standard.operators.hitl import ApprovalOperator
from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException

from include.juicefs_storage.tasks.notify import Notify

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
        answer = {"by": event.get("responded_by_user"), "timed_out": bool(event.get("timedout"))}
        context["ti"].xcom_push(ANSWER, answer)
        try:
            return super().execute_complete(context, event)
        except HITLRejectException as error:
            raise AirflowFailException(self.rejected) from error


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

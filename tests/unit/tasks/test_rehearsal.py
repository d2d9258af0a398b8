"""The end of a rehearsal: every run leaves a page that says what is wrong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException
from airflow.sdk.execution_time.context import set_current_context

from include.juicefs_storage.tasks import rehearsal

RUN = "scheduled__2026-11-23T06:00:00+00:00"
ERROR = {"problem": "The registry of volumes cannot be read.", "next_step": "correct the file"}


def test_a_rehearsal_that_knows_no_volumes_leaves_a_page_with_the_reason() -> None:
    left: dict[str, Any] = {}
    tasks = ["list_volumes", "rehearse", "finalize"]
    ti = SimpleNamespace(
        xcom_push=lambda *, key, value: left.update({key: value}),
        xcom_pull=lambda *, task_ids, key, map_indexes: ERROR if (task_ids, key) == ("list_volumes", "error") else None,
        get_task_states=lambda **_: {RUN: {"list_volumes": "failed", "rehearse": "upstream_failed"}},
    )
    context: Any = {"ti": ti, "dag": SimpleNamespace(dag_id="juicefs_storage_rehearsal", task_ids=tasks), "run_id": RUN}
    with set_current_context(context), pytest.raises(AirflowFailException, match="see the log of list_volumes"):
        rehearsal.finalize.function(None, None)
    assert ERROR["problem"] in left["markdown"]
    assert "/tasks/list_volumes" in left["markdown"]
    assert left["report"]["ready"] == []
    assert left["note"].startswith("not rehearsed")

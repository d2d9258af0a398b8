"""Notifications go out through the connection's notifier; none of them can fail a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from include.juicefs_storage.tasks.notify import Notify
from tests.support.oncall import EXTRA, oncall

XCOMS: dict[tuple[str, str], object] = {
    ("finalize", "report"): {"outcome": "rolled back"},
    ("finalize", "markdown"): "## Rolled back",
    ("plan", "return_value"): {"volume": "myjfs"},
    ("plan", "markdown"): "## Switch",
}


@pytest.fixture
def context() -> dict[str, Any]:
    ti = SimpleNamespace(
        dag_id="juicefs_storage_switch",
        log_url="http://airflow/run",
        xcom_pull=lambda task_ids, key: XCOMS.get((task_ids, key)),
    )
    return {"ti": ti, "dag": None}


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, str]]]:
    """What a server of the on-call tool was sent."""
    with oncall() as (connection, bodies):
        monkeypatch.setenv("AIRFLOW_CONN_ONCALL", json.dumps(connection))
        yield bodies


def connect(monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_JUICEFS_NOTIFY", json.dumps({"conn_type": "generic", "extra": extra}))


@pytest.mark.parametrize(
    ("notify", "sent"),
    [
        (
            Notify("ended"),
            ["juicefs_storage_switch: volume myjfs: rolled back", "## Rolled back", "http://airflow/run"],
        ),
        (
            Notify("waits for approval", source="plan"),
            ["juicefs_storage_switch: volume myjfs: waits for approval", "## Switch", "http://airflow/run"],
        ),
    ],
)
def test_the_news_reach_a_server_through_a_notifier_of_a_provider(
    monkeypatch: pytest.MonkeyPatch,
    context: dict[str, Any],
    posted: list[dict[str, str]],
    notify: Notify,
    sent: list[str],
) -> None:
    connect(monkeypatch, EXTRA)
    notify(context)
    assert [list(body.values()) for body in posted] == [sent]


def test_without_the_connection_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
    context: dict[str, Any],
    posted: list[dict[str, str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_JUICEFS_NOTIFY", raising=False)
    Notify("ended")(context)
    assert posted == []
    assert "No notification was sent" not in caplog.text


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"notifier": "no.such.module.Notifier"},
        {"notifier": "json.JSONDecoder"},
        {"notifier": "os.system", "arguments": {"command": "false"}},
        EXTRA | {"arguments": {"no_such": 1}},
        EXTRA | {"arguments": {"http_conn_id": "no_such_connection"}},
    ],
)
def test_a_notification_that_cannot_be_sent_is_logged_and_fails_nothing(
    monkeypatch: pytest.MonkeyPatch, context: dict[str, Any], caplog: pytest.LogCaptureFixture, extra: dict[str, Any]
) -> None:
    connect(monkeypatch, extra)
    Notify("ended")(context)
    assert "No notification was sent: ended" in caplog.text

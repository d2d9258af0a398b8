"""Whoever is to be told is told through the connection's notifier; nobody is a reason for a run to fail."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import Any

import pytest

from include.juicefs_storage.tasks.notify import Notify

XCOMS: dict[tuple[str, str], object] = {
    ("finalize", "report"): {"outcome": "rolled back"},
    ("finalize", "markdown"): "## Rolled back",
    ("plan", "return_value"): {"volume": "myjfs"},
    ("plan", "markdown"): "## Switch",
}
HTTP = {"notifier": "airflow.providers.http.notifications.http.HttpNotifier"}


@pytest.fixture
def context() -> dict[str, Any]:
    ti = SimpleNamespace(
        dag_id="juicefs_storage_switch",
        log_url="http://airflow/run",
        xcom_pull=lambda task_ids, key: XCOMS.get((task_ids, key)),
    )
    return {"ti": ti, "dag": None}


@pytest.fixture
def posted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a server of the on-call tool was sent."""
    bodies: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = {"conn_type": "http", "host": "127.0.0.1", "port": server.server_port, "schema": "http"}
    monkeypatch.setenv("AIRFLOW_CONN_ONCALL", json.dumps(address))
    yield bodies
    server.shutdown()
    thread.join()
    server.server_close()


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
            Notify("waits for approval", told_by="plan"),
            ["juicefs_storage_switch: volume myjfs: waits for approval", "## Switch", "http://airflow/run"],
        ),
    ],
)
def test_the_news_reach_a_server_through_a_notifier_of_a_provider(monkeypatch, context, posted, notify, sent):
    message = {"s": "{{ news.subject }}", "t": "{{ news.text }}", "u": "{{ news.url }}"}
    connect(monkeypatch, HTTP | {"arguments": {"http_conn_id": "oncall", "endpoint": "alerts", "json": message}})
    notify(context)
    assert posted == [dict(zip("stu", sent, strict=True))]


def test_without_the_connection_nothing_happens(monkeypatch, context, posted, caplog):
    monkeypatch.delenv("AIRFLOW_CONN_JUICEFS_NOTIFY", raising=False)
    Notify("ended")(context)
    assert posted == []
    assert "Nobody was told" not in caplog.text


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"notifier": "no.such.module.Notifier"},
        {"notifier": "json.JSONDecoder"},
        {"notifier": "os.system", "arguments": {"command": "false"}},
        HTTP | {"arguments": {"no_such": 1}},
        HTTP | {"arguments": {"http_conn_id": "no_such_connection"}},
    ],
)
def test_what_cannot_be_told_is_logged_and_fails_nothing(monkeypatch, context, caplog, extra):
    connect(monkeypatch, extra)
    Notify("ended")(context)
    assert "Nobody was told that ended" in caplog.text

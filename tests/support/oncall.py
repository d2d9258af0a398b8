"""A server as an on-call tool or a chat has one: it takes JSON, and keeps what it was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

#: The extra of a connection `juicefs_notify` that posts to the server behind the connection `oncall`.
EXTRA = {
    "notifier": "airflow.providers.http.notifications.http.HttpNotifier",
    "arguments": {
        "http_conn_id": "oncall",
        "endpoint": "alerts",
        "json": {"subject": "{{ news.subject }}", "text": "{{ news.text }}", "url": "{{ news.url }}"},
    },
}


@contextmanager
def oncall() -> Iterator[tuple[dict[str, Any], list[dict[str, str]]]]:
    """Provide the fields of the connection `oncall`, and the list that fills with what was posted."""
    posted: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base class's name
            """Be quiet."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield {"conn_type": "http", "host": "127.0.0.1", "port": server.server_port, "schema": "http"}, posted
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

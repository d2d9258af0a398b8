from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.switch.prove_clients import ClientProof
from include.juicefs_storage.tasks import progress
from include.juicefs_storage.tasks.switch.client_progress import ClientPublisher


def proof(pod: str) -> ClientProof:
    return ClientProof(pod=pod, uid=pod, node="n1", after_s=1.0, by="log", at="2026-11-29T03:00:00+00:00")


def test_the_clients_are_pushed_when_something_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[str, Any]] = []
    monkeypatch.setattr(progress, "push", lambda key, value: pushed.append((key, value)))
    publish = ClientPublisher("new")
    for waiting in ({"b": "it shows the old bucket"}, {"b": "it shows the old bucket"}, {}):
        publish([proof("a")] if waiting else [proof("b"), proof("a")], waiting)
    assert [key for key, _ in pushed] == ["clients", "clients"]
    assert [(row["name"], row["proven"]) for row in pushed[0][1]] == [("b", False), ("a", True)]
    assert pushed[0][1][0]["seen"] == "it shows the old bucket"
    assert pushed[1][1][0]["seen"].endswith("it reloaded the new values")


def test_a_server_that_does_not_answer_fails_no_proof(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def push(key: str, value: object) -> None:
        raise ConnectionError(f"{key}: {value}")

    monkeypatch.setattr(progress, "push", push)
    publish = ClientPublisher("old")
    publish([], {"a": "waits"})
    publish([proof("a")], {})
    assert len([record for record in caplog.records if "cannot be shown" in record.message]) == 1

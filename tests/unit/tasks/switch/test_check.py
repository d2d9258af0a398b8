"""The findings of all checks, as the plan and the report have them."""

from __future__ import annotations

import pytest

from include.juicefs_storage.switch.findings import ok, refusal
from include.juicefs_storage.tasks.switch import check


def test_a_connection_that_stops_every_check_is_refused_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check whose business it is; what another check refused besides stays."""
    bad = "Connection 'minio_new': expected a login (access key), found none."
    left = {task: [refusal(task, bad, "correct it")] for task in check.CHECKS[1:]}
    left["check_rights"] = [ok("rights", bad)]
    left["check_volume"].append(refusal("volume", "a client is too old", "upgrade the client"))
    rows = {task: [finding.model_dump() for finding in findings] for task, findings in left.items()}
    monkeypatch.setattr(
        check, "task_states", lambda *tasks: dict.fromkeys(tasks, "failed") | {"resolve_params": "success"}
    )
    monkeypatch.setattr(check, "pull", lambda task, key: rows.get(task))
    found = check.all_findings()
    assert [finding.check for finding in found if finding.message == bad] == ["rights", "check_target_bucket"]
    assert [finding.check for finding in found if finding.message != bad] == ["volume"]

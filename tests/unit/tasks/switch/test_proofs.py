"""Who is a stranger to a run."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import cast

import pytest

from include.juicefs_storage.ports import Session
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.proofs import other_sessions
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.canary import canary_name


def test_neither_the_fresh_mount_of_a_killed_task_nor_an_accepted_client_is_a_stranger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("include.juicefs_storage.tasks.switch.run.run_id", lambda: "run")
    live = [
        Session(number, "1.4.2", "host", mount_point, datetime(2026, 1, 1, tzinfo=UTC))
        for number, mount_point in enumerate([f"/x/storage-switch.{canary_name('run')}/mnt", "/mnt", "s3gateway"])
    ]
    params = SimpleNamespace(accept_clients=("host:s3gateway",))
    run = SwitchRun(cast("Runtime", SimpleNamespace(metadata=SimpleNamespace(sessions=lambda: live), params=params)))
    assert [session.mount_point for session in other_sessions(run)] == ["/mnt"]

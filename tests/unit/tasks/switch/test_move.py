"""What was approved is what is done, whatever becomes of the connection; and who is a stranger to a run."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from airflow.sdk.exceptions import AirflowRescheduleException
from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.ports import Session
from include.juicefs_storage.switch.plan import fingerprint
from include.juicefs_storage.tasks.switch import move as move_module
from include.juicefs_storage.tasks.switch.move import Move
from include.juicefs_storage.volume.canary import canary_name
from include.juicefs_storage.volume.difference import Difference
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD, backup, setting

KEY = b"k" * 32


def move_to(described: StorageConfig) -> Move:
    """A move that was planned to NEW, with a connection that describes something now."""
    runtime = SimpleNamespace(
        setting=lambda: setting(OLD),
        target=lambda now: described,
        vault=SimpleNamespace(key=KEY),
        params=SimpleNamespace(target_conn_id="minio_new"),
    )
    move = Move(runtime)
    planned = backup("myjfs.run", datetime(2026, 1, 1, tzinfo=UTC)).plan
    move.plan = planned.model_copy(update={"target_fingerprint": fingerprint(NEW, KEY)})
    return move


def test_an_unchanged_connection_is_what_was_approved():
    assert move_to(NEW).approved_target() == NEW


@pytest.mark.parametrize(
    "edited",
    [
        StorageConfig(NEW.storage, "https://elsewhere:9000/data2", NEW.access_key, NEW.secret_key),
        StorageConfig(NEW.storage, NEW.bucket, SecretStr("OTHER"), NEW.secret_key),
        StorageConfig(NEW.storage, NEW.bucket, NEW.access_key, SecretStr("other-secret-value")),
    ],
)
def test_a_connection_that_was_edited_since_the_plan_is_refused(edited):
    with pytest.raises(PermanentError, match="changed since the plan was made") as refused:
        move_to(edited).approved_target()
    assert "other-secret-value" not in str(refused.value)


def test_a_fresh_mount_that_a_killed_task_left_is_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(move_module, "run_id", lambda: "run")
    live = [
        Session(number, "1.4.2", "host", mount_point, datetime(2026, 1, 1, tzinfo=UTC))
        for number, mount_point in enumerate([f"/x/storage-switch.{canary_name('run')}/mnt", "/mnt"])
    ]
    move = Move(SimpleNamespace(metadata=SimpleNamespace(sessions=lambda: live)))  # type: ignore[arg-type]
    assert [session.mount_point for session in move.sessions()] == ["/mnt"]


@pytest.mark.parametrize("moved", [[], ["prove_clients_on_old"]])
def test_the_late_proof_waits_only_where_a_task_has_proven_the_clients(monkeypatch, moved: list[str]) -> None:
    """Else it would wait from now on, for ever."""
    timing = {"applied_at": datetime.now(UTC).isoformat()}
    monkeypatch.setattr(move_module, "pull", lambda task, key: timing if task in moved else None)
    move = Move(SimpleNamespace(params=SimpleNamespace(late_commit_s=60)))  # type: ignore[arg-type]
    looked: list[str] = []
    move.lock = SimpleNamespace(renew=lambda: None)
    monkeypatch.setattr(move, "_missing", lambda side: looked.append(side) or Difference())
    side = SimpleNamespace(config=OLD)
    monkeypatch.setattr(move, "_whole", lambda side, difference: {"blocks": 0})
    with pytest.raises(AirflowRescheduleException) if moved else nullcontext():
        move.catch_up_late(side, side, moved_by=("prove_clients_on_old", "settle_again"))
    assert bool(looked) is not bool(moved)

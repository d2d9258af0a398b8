"""A backup outlives the version that wrote it: going back needs the setting, the Secrets' values and the UUID."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from airflow.sdk import ObjectStoragePath
from pydantic import SecretStr

from include.juicefs_storage.adapters.vault import FileVault, Keyring
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.backup import FORMAT, Backup, backup_ids, deviation, foreign_to, read_backup
from include.juicefs_storage.switch.marks import read_mark
from include.juicefs_storage.switch.plan import Plan, StorageView, fingerprint
from include.juicefs_storage.volume.clusters import FIRST
from tests.support.fakes import NEW, OLD, UUID, FakeVault, backup, plan, setting

WRITTEN = Path(__file__).parent / "backups"
RECORDED = "myjfs.manual__2026-01-31T09-00-00-00-00"
KEY, NOW = b"k" * 32, datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("format_", range(1, FORMAT + 1))
def test_a_backup_of_every_format_can_be_read(format_: int) -> None:
    """The files were written by the version that wrote that format. They are never written again."""
    vault = FileVault(Keyring(b"n" * 32, (KEY,)), ObjectStoragePath((WRITTEN / f"format-{format_}").as_uri()))
    found = read_backup(vault, RECORDED)
    assert (found.format, found.setting.uuid, found.setting.config) == (format_, UUID, OLD)
    assert found.storage_values[FIRST]["juicefs-sc-secret"] == {
        "storage": "minio", "bucket": OLD.bucket, "access-key": "OLDKEY", "secret-key": "old-secret-value",
    }  # fmt: skip
    more = {} if format_ < 3 else {"kubernetes_east": {"juicefs-sc-secret": {"bucket": OLD.bucket}}}
    assert {name: values for name, values in found.storage_values.items() if name != FIRST} == more
    assert found.new == NEW
    assert found.plan is not None
    assert found.created_at.year == 2026
    mark = read_mark(vault, RECORDED, "switched")
    assert mark is not None
    assert (mark.uuid, mark.at) == (UUID, datetime(2026, 1, 31, 9, 12, tzinfo=UTC))
    assert backup_ids(vault) == [RECORDED]


def written(**changes: Any) -> bytes:
    """A record with other fields; None leaves one out."""
    fields = json.loads(backup("myjfs.a", NOW, secrets={"s": {"bucket": "b"}}).to_bytes()) | changes
    return json.dumps({name: value for name, value in fields.items() if value is not None}).encode()


def test_the_essentials_are_enough() -> None:
    record = {"setting_hex": setting(OLD).raw.hex(), "secrets": {"s": {"bucket": "b", "metaurl": "m"}}}
    found = Backup.from_bytes(json.dumps(record).encode(), "myjfs.a")
    assert (found.setting.uuid, found.setting.config, found.storage_values) == (
        UUID,
        OLD,
        {FIRST: {"s": {"bucket": "b"}}},
    )
    with pytest.raises(PermanentError, match="does not record where its run moved the volume to"):
        found.new  # noqa: B018  the property raises


@pytest.mark.parametrize(
    "changes",
    [
        {"plan": {"volume": 1}},
        {"plan": "of another version"},
        {"templates": []},
        {"target": ["minio"]},
        {"params": 3},
        {"triggered_at": "soon"},
        {"created_at": "then"},
        {"namespace": 1, "plan": 2, "templates": None},
        {"added_by_a_later_version": {"x": 1}},
    ],
)
def test_what_is_not_needed_to_go_back_is_no_reason_to_refuse(changes: dict[str, Any]) -> None:
    found = Backup.from_bytes(written(**changes), "myjfs.a")
    assert (found.setting.config, found.secrets) == (OLD, {"s": {"bucket": "b"}})


@pytest.mark.parametrize(
    "changes", [{"setting_hex": None}, {"setting_hex": 3}, {"secrets": None}, {"secrets": {"s": "old-secret-value"}}]
)
def test_without_the_essentials_it_is_no_backup(changes: dict[str, Any]) -> None:
    with pytest.raises(PermanentError, match=r"myjfs\.a can be decrypted and is not a backup") as refused:
        Backup.from_bytes(written(**changes), "myjfs.a")
    assert "old-secret-value" not in str(refused.value)


@pytest.mark.parametrize("format_", [FORMAT + 1, 99, "restic"])
def test_a_newer_format_is_refused_by_name(format_: object) -> None:
    with pytest.raises(PermanentError, match=rf"myjfs\.a is of format {format_!r}; .* up to {FORMAT}"):
        Backup.from_bytes(written(format=format_), "myjfs.a")


def test_what_this_version_writes_is_of_the_current_format() -> None:
    whole = backup("myjfs.a", NOW, format=FORMAT, namespace="juicefs", triggered_at=NOW)
    assert Backup.from_bytes(whole.to_bytes(), "myjfs.a") == whole


def plan_to(config: Any = NEW, key: bytes = KEY, **changes: Any) -> Plan:
    return plan(target_fingerprint=fingerprint(config, key), **changes)


ANOTHER = "99999999-2222-3333-4444-555555555555"
LATER = datetime(2026, 2, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("made", "planned", "triggered_at", "words"),
    [
        ({}, plan_to(), None, ""),
        ({}, plan_to(key=b"o" * 32), None, ""),
        ({"triggered_at": NOW}, plan_to(), NOW, ""),
        ({"triggered_at": NOW}, plan_to(OLD), NOW, ""),
        ({"triggered_at": NOW}, plan_to(), LATER, "an earlier run with the same id made it"),
        ({}, plan_to(), LATER, ""),
        ({}, plan_to(OLD), LATER, "it records a move to https://new:9000/data2"),
        ({"triggered_at": NOW}, plan_to(uuid=ANOTHER), NOW, f"it is of volume {UUID}"),
    ],
)
def test_a_backup_is_a_runs_own_or_not(
    made: dict[str, Any], planned: Plan, triggered_at: datetime | None, words: str
) -> None:
    found = foreign_to(backup("myjfs.a", NOW, **made), planned, (KEY, b"o" * 32), triggered_at)
    assert found.startswith(words)
    assert bool(found) is bool(words)


def test_what_was_approved_is_compared_with_the_backup() -> None:
    made = backup("myjfs.a", NOW)
    assert deviation(made, plan_to(), (KEY,)) == ""
    assert "the plan is for https://new:9000/data2" in deviation(made, plan_to(OLD), (KEY,))
    assert "the plan is for myjfs.b" in deviation(made, plan_to(backup_id="myjfs.b"), (KEY,))


def test_nothing_but_backups_is_listed_as_one() -> None:
    vault = FakeVault(dict.fromkeys(("myjfs.a", "myjfs.a.switched", "_fleet.x", "_probe.y"), b""))
    assert backup_ids(vault) == ["myjfs.a"]


def test_a_session_token_is_recorded_and_planned() -> None:
    temporary = replace(NEW, session_token=SecretStr("a-new-session-token"))
    made = backup("a", datetime.now(UTC), target=Backup.target_of(temporary))
    assert Backup.from_bytes(made.to_bytes()).new == temporary
    assert "a-new-session-token" not in repr(made)
    assert len(Backup.target_of(NEW)) == 4, "as earlier versions read it"
    assert fingerprint(temporary, b"k") != fingerprint(NEW, b"k")
    shown = plan(after=StorageView.of(temporary)).to_markdown()
    assert "| session token | `(none)` | `a-…en` |" in shown
    assert "session token" not in plan().to_markdown()

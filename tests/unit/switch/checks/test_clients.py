"""Clients that cannot follow a change of the setting, or cannot be proven."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from include.juicefs_storage.ports import Session
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.checks.clients import (
    check_expired_sessions,
    check_late_commits,
    check_runner,
    check_volume,
)
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.volume.setting import Setting
from tests.support.fakes import MOUNT, OLD, FakeMetadata, setting


def findings(row: Setting | None = None, **changes: Any) -> list[tuple[str, str]]:
    row = row or setting()
    found = check_volume(row, [MOUNT.model_copy(update=changes)], [], FakeMetadata(row), 60)
    assert all(finding.remedy for finding in found if finding.level != "ok")
    return [(finding.level, finding.message) for finding in found]


def test_a_good_volume() -> None:
    assert [level for level, _ in findings()] == ["ok"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "1.0.4+2023-04-06.f1c475d"}, "runs JuiceFS 1.0.4"),
        ({"version": ""}, "needs 1.1"),
        ({"version": "0.17.5"}, "needs 1.1"),
        ({"heartbeat_s": 61}, "heartbeat of 61 s"),
        ({"bucket": "http://elsewhere/b"}, "override"),
        ({"staged_blocks": 3, "writeback": True}, "3 blocks wait"),
    ],
)
def test_a_client_that_cannot_follow_or_be_proven(changes: dict[str, Any], words: str) -> None:
    ((level, message),) = findings(**changes)
    assert level == "refusal"
    assert words in message


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *((kind, "the vendor's own protocol") for kind in ("oss", "cos", "obs", "gs", "tos", "bos", "OSS")),
        ("wasabi", "from the host's name"),
        ("file", "no store that speaks S3"),
    ],
)
def test_a_volume_on_a_kind_that_no_run_can_look_at_is_refused_by_its_name(kind: str, words: str) -> None:
    """Other keys alone make no difference: no block of a client could be looked for."""
    row = setting(replace(OLD, storage=kind, bucket="https://data.oss-cn-hangzhou.aliyuncs.com"))
    found = check_volume(row, [MOUNT.model_copy(update={"bucket": row.bucket})], [], FakeMetadata(row), 60)
    (refused,) = (finding for finding in found if finding.level == "refusal")
    assert f"of kind {kind.lower()!r}" in refused.message
    assert words in refused.message
    assert "also where only the keys change" in refused.message
    assert "`juicefs config --access-key … --secret-key …` and the Secret" in refused.remedy


def test_a_volume_over_several_buckets_is_refused_with_the_reason_and_what_is_left() -> None:
    row = setting(replace(OLD, bucket="http://old:9000/data%d"), Shards=3)
    found = check_volume(row, [MOUNT.model_copy(update={"bucket": row.bucket})], [], FakeMetadata(row), 60)
    (refused,) = (finding for finding in found if finding.level == "refusal")
    assert "spreads its blocks over 3 buckets by a hash of each block's key" in refused.message
    assert "one pattern, http://old:9000/data%d" in refused.message
    assert "a run compares, copies and proves one bucket" in refused.message
    assert "copy each bucket to its counterpart (juicefs_storage_sync), the same number for the same number and 3" in (
        refused.remedy
    )
    assert [level for level, _ in findings(setting(Shards=1))] == ["ok"]


GATEWAY = Session(7, "1.4.2", "vm", "s3gateway", datetime(2026, 1, 31, tzinfo=UTC))


@pytest.mark.parametrize("accept", ["7", "vm:s3gateway", "v?:s3*"])
def test_a_client_that_is_no_mount_pod_is_refused_until_it_is_accepted_by_name(accept: str) -> None:
    def look(*accepted: str) -> Finding:
        found = check_volume(setting(), [MOUNT], [], FakeMetadata(setting(), live=[GATEWAY]), 60, accept=accepted)
        return found[0]

    for others in ((), ("vm:/mnt",), ("another:s3gateway", "8")):
        assert look(*others).level == "refusal"
        assert "add `vm:s3gateway` to accept_clients" in look(*others).remedy
    assert look(accept).level == "warning"
    assert "it cannot be proven to have followed, which accept_clients accepts" in look(accept).message


def test_mounts_that_only_read_are_a_warning_where_nobody_writes() -> None:
    ((level, message), _) = findings(read_only=True)
    assert level == "warning"
    assert "by their logs alone" in message
    mounts = [MOUNT, MOUNT.model_copy(update={"name": "reads", "uid": "2", "read_only": True})]
    assert [finding.level for finding in check_volume(setting(), mounts, [], FakeMetadata(setting()), 60)] == ["ok"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (setting(Shards=4), "over 4 buckets by a hash of each block's key"),
        (setting(replace(OLD, storage="oss")), "kind 'oss'"),
    ],
)
def test_a_volume_that_cannot_move(row: Setting, words: str) -> None:
    ((level, message),) = findings(row, bucket=row.bucket)
    assert level == "refusal"
    assert words in message


@pytest.mark.parametrize(
    ("runner", "client", "level"),
    [
        ("1.4.2+2026-01-01.abc", "1.4.2+2025-12-12.def", "ok"),
        ("1.4.2", "1.4.3", "refusal"),
        ("1.10.0", "1.9.9", "ok"),
        ("1.3.0-beta1", "1.2.5", "ok"),
        ("unknown", "1.2.5", "warning"),
    ],
)
def test_the_juicefs_that_writes_is_as_new_as_the_newest_client(runner: str, client: str, level: str) -> None:
    (finding,) = check_runner(runner, [MOUNT.model_copy(update={"version": client})], [])
    assert finding.level == level


def test_a_client_whose_session_has_expired_lately_is_named() -> None:
    until = datetime(2026, 1, 31, 9, 0, tzinfo=UTC)
    metadata = FakeMetadata(
        setting(),
        expired=[
            Session(7, "1.4.2", "vm", "/mnt", until),
            Session(8, "1.4.2", "node-1", MOUNT.mount_path, until),
        ],
    )
    (finding,) = check_expired_sessions(metadata, [MOUNT])
    assert finding.level == "warning"
    assert "Session 7 on vm at /mnt was here until 2026-01-31 09:00:00 UTC" in finding.message


def test_late_commits_need_a_wait_only_where_the_clients_leave_a_store() -> None:
    assert [finding.level for finding in check_late_commits(2, Change())] == ["warning"]
    assert [finding.level for finding in check_late_commits(0, Change(kind="moved"))] == ["warning"]
    for change, late_commit_s in ((Change(), 360), (Change(kind="keys"), 0), (Change(kind="address"), 2)):
        assert check_late_commits(late_commit_s, change) == []

"""Ready or not, since when; and a backup that could not be gone back to is found before it is needed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from include.juicefs_storage.switch.backup import Backup
from include.juicefs_storage.switch.checks import ok, refusal, warning
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.switch.plan import SecretChange
from include.juicefs_storage.switch.readiness import judge, rehearse_restore
from include.juicefs_storage.tasks import rehearsal
from tests.support.fakes import NEW, OLD, FakeVault, backup, plan, setting

MONDAY, TUESDAY = datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 11, 24, tzinfo=UTC)
GOOD = [ok("csi", "healthy"), warning("target", "no juicefs_uuid", "copy it")]
BAD = [*GOOD, refusal("target", "no bucket", "make it")]


def last(volume: str, *, ready: bool, since: datetime = MONDAY) -> dict[str, Any]:
    return {"volume": volume, "ready": ready, "since": since.isoformat()}


@pytest.mark.parametrize(
    ("findings", "before", "since"),
    [
        (GOOD, [], TUESDAY),
        (GOOD, [last("home", ready=True)], MONDAY),
        (GOOD, [last("home", ready=False)], TUESDAY),
        (BAD, [last("home", ready=False)], MONDAY),
        (BAD, [last("home", ready=True)], TUESDAY),
        (BAD, [last("other", ready=False), last("home", ready=True), last("home", ready=False)], TUESDAY),
    ],
)
def test_since_when_is_kept_as_long_as_nothing_changes(
    findings: list[Finding], before: list[dict[str, Any]], since: datetime
) -> None:
    readiness = judge("home", findings, None, before=before, now=TUESDAY)
    assert (readiness.ready, readiness.since, readiness.rehearsed_at) == (findings is GOOD, since, TUESDAY)
    # What the next rehearsal reads is what this one wrote.
    again = judge("home", findings, None, before=[readiness.event()], now=datetime(2026, 11, 25, tzinfo=UTC))
    assert again.since == since


def test_what_blocks_it_is_named_with_its_remedy() -> None:
    readiness = judge("home", BAD, None, before=[], now=TUESDAY)
    assert readiness.blockers == ("target: no bucket Remedy: make it",)
    assert readiness.warnings == 1
    assert "**not ready** since 2026-11-24 00:00 UTC" in readiness.to_markdown()


def stored(*backups: Backup) -> FakeVault:
    vault = FakeVault()
    for found in backups:
        vault.save(found.backup_id, found.to_bytes())
    return vault


def problems(findings: list[Finding]) -> list[str]:
    return [finding.message for finding in findings if finding.level == "refusal"]


def test_the_newest_backup_is_restored() -> None:
    vault = stored(backup("myjfs.b", MONDAY), backup("myjfs.a", TUESDAY), backup("other.z", TUESDAY))
    findings, newest = rehearse_restore(vault, setting(NEW, TrashDays=7))
    assert problems(findings) == []
    assert newest is not None
    assert newest.backup_id == "myjfs.a"


def test_a_volume_that_was_never_switched_has_no_backup_and_is_not_blocked_by_that() -> None:
    findings, newest = rehearse_restore(FakeVault(), setting(OLD))
    assert ([finding.level for finding in findings], newest) == (["warning"], None)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ({"setting_hex": setting(OLD, SecretKey="AAAA").raw.hex()}, "cannot be decrypted"),
    ],
)
def test_a_backup_that_is_not_what_it_says_blocks(damage: dict[str, Any], words: str) -> None:
    (problem,) = problems(rehearse_restore(stored(backup("myjfs.a", MONDAY, **damage)), setting(NEW))[0])
    assert words in problem


def test_a_backup_without_a_secret_that_its_run_changed_blocks() -> None:
    change = SecretChange(namespace="juicefs", name="juicefs-sc-secret", keys=("bucket",))
    lacking = backup("myjfs.a", MONDAY, plan=plan(secrets=(change,)))
    (problem,) = problems(rehearse_restore(stored(lacking), setting(NEW))[0])
    assert "it lacks Secrets juicefs-sc-secret" in problem


@pytest.mark.parametrize("junk", [b"?", b"{}", backup("myjfs.b", TUESDAY, setting_hex="00").to_bytes()])
def test_a_file_that_cannot_be_read_is_reported_and_blocks_nothing(junk: bytes) -> None:
    vault = stored(backup("myjfs.a", MONDAY))
    vault.save("myjfs.b", junk)
    findings, newest = rehearse_restore(vault, setting(NEW))
    assert [(finding.level, "myjfs.b" in finding.message) for finding in findings][:1] == [("warning", True)]
    assert problems(findings) == []
    assert newest is not None
    assert newest.backup_id == "myjfs.a"


def test_the_backup_of_another_volume_of_the_same_name_is_none_of_this_one() -> None:
    another = backup("myjfs.b", TUESDAY, setting_hex=setting(OLD, UUID="9").raw.hex())
    findings, newest = rehearse_restore(stored(backup("myjfs.a", MONDAY), another), setting(NEW))
    assert [finding.level for finding in findings] == ["ok"]
    assert newest is not None
    assert newest.backup_id == "myjfs.a"


def test_a_volume_that_is_registered_wrongly_is_a_result_and_not_a_crash() -> None:
    registry = {"home": {"target_bucket": "http://h/data", "dry_run": False}}
    readiness = rehearsal.rehearse_volume("home", registry, [])
    assert not readiness.ready
    assert "dry_run cannot be set there" in readiness.blockers[0]


def test_a_check_that_breaks_is_a_blocker_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> list[Finding]:
        raise ZeroDivisionError

    monkeypatch.setattr(rehearsal, "CHECK_FUNCTIONS", {"check_a": broken, "check_b": lambda _: BAD})
    monkeypatch.setattr(rehearsal, "_restored", lambda *_: [])
    registry = {"home": {"target_conn_id": "minio_new", "target_bucket": "data"}}
    blockers = rehearsal.rehearse_volume("home", registry, []).blockers
    # There is no connection to read the setting by either.
    assert [blocker.split(":")[0] for blocker in blockers] == ["check_a", "target", "setting"]

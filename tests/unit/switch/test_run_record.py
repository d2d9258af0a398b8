"""What a run finds under its own id, and that no file of another run can stop it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, TransientError
from include.juicefs_storage.switch.plan import fingerprint
from include.juicefs_storage.switch.run_record import RunRecord
from tests.support.fakes import NEW, UUID, FakeVault, backup, plan, setting

KEY, NOW, LATER = b"k" * 32, datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)
ANOTHER = "99999999-2222-3333-4444-555555555555"


def record(vault: FakeVault, triggered_at: datetime = NOW) -> RunRecord:
    planned = plan(target_fingerprint=fingerprint(NEW, KEY))
    return RunRecord(vault, (KEY,), planned, "run", triggered_at)


def vault(**more: Any) -> FakeVault:
    return FakeVault({"myjfs.run": backup("myjfs.run", NOW, triggered_at=NOW, **more).to_bytes()})


def test_its_own_backup_is_found() -> None:
    found = record(vault())
    assert found.find() == found.existing() == found.backup()


def test_without_one_it_has_changed_nothing() -> None:
    assert record(FakeVault()).find() is None
    with pytest.raises(PermanentError, match=r"no backup myjfs\.run"):
        record(FakeVault()).backup()


@pytest.mark.parametrize(
    "found",
    [
        record(vault(), triggered_at=LATER),
        record(vault(setting_hex=setting(UUID=ANOTHER).raw.hex())),
    ],
)
def test_the_backup_of_another_run_is_never_carried_out(found: RunRecord) -> None:
    assert found.find() is None
    with pytest.raises(NeedsHumanError, match=r"Backup myjfs\.run is not of this run") as refused:
        found.existing()
    assert "another run id" in refused.value.next_step
    assert found.superseded().backup_id == ""


def test_how_it_ended_is_recorded_once() -> None:
    kept = vault()
    assert record(kept).ended("rolled-back") == ""
    assert record(kept).mark("rolled-back") == ""
    first = record(kept).ended("rolled-back")
    assert first
    assert record(kept).mark("rolled-back") == ""
    assert record(kept).ended("rolled-back") == first
    assert record(kept).ended("switched") == ""


def test_a_folder_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = vault()

    def fail(name: str, content: bytes) -> None:
        raise TransientError(f"writing {name} failed: No space left on device")

    monkeypatch.setattr(kept, "save", fail)
    assert record(kept).mark("rolled-back") == "writing myjfs.run.rolled-back failed: No space left on device"


@pytest.mark.parametrize(
    "junk", [b"?", b"junk", ANOTHER.encode(), b'{"uuid": "%s", "at": "2026-01-01T00:00:00+00:00"}']
)
def test_a_mark_of_its_own_name_that_is_not_its_own_is_not_obeyed(junk: bytes) -> None:
    kept = vault()
    kept.save("myjfs.run.rolled-back", junk)
    assert record(kept).ended("rolled-back") == ""


def test_a_later_run_on_the_volume_is_named() -> None:
    kept = vault()
    kept.save("myjfs.later.switched", b'{"uuid": "%s", "at": "2026-03-01T00:00:00+00:00"}' % UUID.encode())
    assert record(kept).superseded().backup_id == "myjfs.later"

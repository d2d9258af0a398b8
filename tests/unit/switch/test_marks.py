"""A mark is a hint: only one of this very volume counts, and one that cannot be read is reported."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.marks import Mark, Supersession, moved_by, read_mark, superseded_by
from tests.support.fakes import UUID, FakeVault, backup, setting

BEGAN, LATER, EARLIER = (datetime(2026, 1, day, tzinfo=UTC) for day in (2, 3, 1))
ANOTHER = "99999999-2222-3333-4444-555555555555"
OWN = backup("myjfs.own", BEGAN)


def vault(**marks: bytes) -> FakeVault:
    """The own backup, and marks of runs `myjfs.<name>`."""
    return FakeVault(
        {"myjfs.own": OWN.to_bytes(), **{f"myjfs.{name}.switched": content for name, content in marks.items()}}
    )


def other(uuid: str, at: datetime = LATER) -> bytes:
    return Mark(uuid, at).to_bytes()


def test_a_later_run_on_the_same_volume_counts() -> None:
    assert superseded_by(vault(b=other(UUID)), "myjfs.own", OWN).backup_id == "myjfs.b"


@pytest.mark.parametrize(
    "marks", [{}, {"own": other(UUID)}, {"b": other(UUID, EARLIER)}, {"b": other(ANOTHER)}, {"b": other(UUID, BEGAN)}]
)
def test_no_other_run_does(marks: dict[str, bytes]) -> None:
    found = superseded_by(vault(**marks), "myjfs.own", OWN)
    assert (found.backup_id, found.unreadable) == ("", ())


def test_a_mark_that_was_there_before_stops_no_run_however_it_is_dated() -> None:
    """The clock of the worker that made it was ahead: every run after it would be refused until then."""
    kept = vault(b=other(UUID), c=b"?", d=other(ANOTHER))
    kept.save("another.e.switched", other(UUID))
    own = OWN.model_copy(update={"moved_before": tuple(moved_by(kept, "myjfs"))})
    assert own.moved_before == ("myjfs.b", "myjfs.c", "myjfs.d")
    assert superseded_by(kept, "myjfs.own", own) == Supersession()
    kept.save("myjfs.f.switched", other(UUID))
    assert superseded_by(kept, "myjfs.own", own).backup_id == "myjfs.f"


@pytest.mark.parametrize(
    "junk",
    [
        b"?",  # cannot be decrypted
        b"", b"yesterday", b"2026-01-03T00:00:00", b"{}", b"[1]", b"\xff\xfe", b'{"uuid": "u", "at": 3}',
        b'{"uuid": "u"}',
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_reported_and_hides_no_other(junk: bytes) -> None:
    found = superseded_by(vault(a=junk), "myjfs.own", OWN)
    assert found.backup_id == ""
    assert len(found.unreadable) == 1
    assert "myjfs.a.switched" in found.unreadable[0]
    assert superseded_by(vault(a=junk, b=other(UUID)), "myjfs.own", OWN).backup_id == "myjfs.b"


@pytest.mark.parametrize(("uuid", "found"), [(UUID, "myjfs.b"), (ANOTHER, "")])
def test_an_early_mark_is_of_the_volume_that_its_backup_names(uuid: str, found: str) -> None:
    kept = vault(b=LATER.isoformat().encode())
    kept.save("myjfs.b", backup("myjfs.b", EARLIER, setting_hex=setting(UUID=uuid).raw.hex()).to_bytes())
    assert superseded_by(kept, "myjfs.own", OWN).backup_id == found


def test_a_folder_that_cannot_be_listed_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = vault()

    def fail() -> list[str]:
        raise PermanentError("The folder of backups cannot be listed.")

    monkeypatch.setattr(kept, "ids", fail)
    assert superseded_by(kept, "myjfs.own", OWN).unreadable == ("The folder of backups cannot be listed.",)


def test_a_mark_names_its_volume() -> None:
    assert read_mark(vault(b=other(UUID)), "myjfs.b", "switched") == Mark(UUID, LATER)
    assert read_mark(vault(), "myjfs.b", "switched") is None
    assert json.loads(other(UUID))["uuid"] == UUID

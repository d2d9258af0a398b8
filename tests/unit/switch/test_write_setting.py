"""Write the setting: already written, read back, undone, and left alone where another changed it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from pydantic import SecretStr

from include.juicefs_storage.errors import LostAnswerError, NeedsHumanError, TransientError
from include.juicefs_storage.switch.lease import LEASE_S
from include.juicefs_storage.switch.write_setting import BEGIN_WITHIN_S, WriteSetting, Written
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from lab.process import wait_for
from tests.support.fakes import NEW, OLD, FakeJuiceFS, FakeMetadata, setting

OTHER = StorageConfig("minio", "http://elsewhere:9000/data", OLD.access_key, OLD.secret_key)


@pytest.fixture
def metadata() -> FakeMetadata:
    return FakeMetadata(setting(OLD))


@pytest.fixture
def juicefs(metadata: FakeMetadata) -> FakeJuiceFS:
    return FakeJuiceFS(metadata)


@pytest.fixture
def write(metadata: FakeMetadata, juicefs: FakeJuiceFS) -> WriteSetting:
    return WriteSetting(metadata, juicefs, metadata.row, NEW)


def test_write_then_already_written(write: WriteSetting, metadata: FakeMetadata, juicefs: FakeJuiceFS) -> None:
    assert write.apply().written
    assert metadata.read_setting().uses(NEW)
    assert not write.apply().written
    assert juicefs.calls == 1


def test_a_success_that_the_row_does_not_show_is_no_success(write: WriteSetting, juicefs: FakeJuiceFS) -> None:
    juicefs.lies = True
    with pytest.raises(TransientError, match="still shows bucket http://old:9000/data"):
        write.apply()


@pytest.mark.parametrize("written_after_s", [0, 3])
def test_a_write_whose_answer_is_lost_is_looked_up_and_waited_for(
    write: WriteSetting,
    monkeypatch: pytest.MonkeyPatch,
    written_after_s: int,
    metadata: FakeMetadata,
    juicefs: FakeJuiceFS,
) -> None:
    """The command may still be under way when the line is cut: a verdict before its end would be wrong."""
    slept: list[float] = []

    def lose(config: StorageConfig, **_: float) -> None:
        if not written_after_s:
            metadata.row = setting(config)
        raise LostAnswerError("the connection was lost")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) == written_after_s:
            metadata.row = setting(NEW)

    monkeypatch.setattr(juicefs, "write_storage", lose)
    assert replace(write, sleep=sleep).apply().written
    assert sum(slept) == written_after_s


def test_a_write_whose_answer_is_lost_and_that_was_not_made_fails(
    write: WriteSetting, monkeypatch: pytest.MonkeyPatch, juicefs: FakeJuiceFS
) -> None:
    slept: list[float] = []

    def lose(config: StorageConfig, **_: float) -> None:
        raise LostAnswerError("the connection was lost")

    monkeypatch.setattr(juicefs, "write_storage", lose)
    with pytest.raises(LostAnswerError):
        replace(write, sleep=slept.append).apply()
    assert sum(slept) >= 12  # as long as `juicefs config` tries a store that does not answer


@pytest.mark.parametrize("verb", ["apply", "undo"])
def test_a_row_that_somebody_else_changed_is_left_alone(
    write: WriteSetting, verb: str, metadata: FakeMetadata, juicefs: FakeJuiceFS
) -> None:
    metadata.row = setting(OTHER)
    with pytest.raises(NeedsHumanError, match="http://elsewhere:9000/data"):
        getattr(write, verb)()
    assert metadata.row.uses(OTHER)
    assert juicefs.calls == 0


def test_a_rewrite_changes_the_bytes_alone_and_only_where_the_target_is_set(
    write: WriteSetting, metadata: FakeMetadata, juicefs: FakeJuiceFS
) -> None:
    write.rewrite()
    assert metadata.row == write.before
    write.apply()
    row = metadata.row
    write.rewrite()
    assert metadata.row.raw != row.raw
    assert metadata.row.uses(NEW)
    assert juicefs.calls == 1


def test_undo_gives_the_exact_bytes_back_and_then_has_nothing_to_do(
    write: WriteSetting, metadata: FakeMetadata
) -> None:
    write.apply()
    assert write.undo() is True
    assert metadata.row.raw == write.before.raw
    assert write.undo() is False


def test_undo_that_loses_a_race_changes_nothing(
    write: WriteSetting, monkeypatch: pytest.MonkeyPatch, metadata: FakeMetadata
) -> None:
    write.apply()
    monkeypatch.setattr(metadata, "replace_setting", lambda expected, new, **_: False)
    with pytest.raises(TransientError, match="changed between"):
        write.undo()
    assert metadata.row.uses(NEW)


def test_a_third_value_that_a_secret_held_is_put_right(write: WriteSetting, metadata: FakeMetadata) -> None:
    step = replace(write, stale=[OTHER])
    metadata.row = setting(OTHER)
    assert step.apply().written
    assert metadata.row.uses(NEW)
    metadata.row = setting(OTHER)
    assert step.undo() is True
    assert metadata.row.uses(OLD)


def test_a_format_that_keeps_the_token_of_the_other_storage_is_put_right(metadata: FakeMetadata) -> None:
    """The driver's `format` writes storage, bucket and keys, and no session token."""
    temporary = replace(NEW, session_token=SecretStr("new-token"))
    write = WriteSetting(metadata, FakeJuiceFS(metadata), setting(OLD), temporary)
    metadata.row = setting(replace(OLD, session_token=temporary.session_token))
    assert write.apply().written
    assert metadata.row.uses(temporary)
    metadata.row = setting(replace(OLD, session_token=SecretStr("another")))
    with pytest.raises(NeedsHumanError, match="changed during this run"):
        write.apply()


def test_a_run_that_was_paused_for_longer_than_the_deadline_writes_nothing(
    write: WriteSetting, metadata: FakeMetadata
) -> None:
    """It woke after another run had moved the volume: nobody asks again between the Lease and the command."""

    def confirm_and_sleep() -> None:
        metadata.time_s += BEGIN_WITHIN_S + 1

    step = replace(write, confirm_lease=confirm_and_sleep)
    with pytest.raises(TransientError, match="not started"):
        step.apply()
    assert metadata.row.uses(OLD)
    # The same bytes again, as after a revert by another run: comparing them would not be enough.
    metadata.row = setting(NEW)
    with pytest.raises(TransientError, match="later than"):
        step.undo()
    assert metadata.row.uses(NEW)


def test_the_deadline_leaves_a_command_its_time_within_the_lease() -> None:
    assert BEGIN_WITHIN_S + 85 < LEASE_S / 2


def changes(metadata: FakeMetadata, *later: Setting) -> Callable[[], None]:
    """Another administrator writes the row while `juicefs config` tests the store; each change is polled."""

    def write(row: Setting) -> None:
        metadata.row = row
        enough = metadata.reads + 2
        wait_for("two polls", lambda: metadata.reads >= enough, deadline_s=10, poll_s=0.01)

    def meanwhile() -> None:
        for row in later:
            write(row)

    return meanwhile


def test_what_another_administrator_changed_meanwhile_is_put_right(
    write: WriteSetting, metadata: FakeMetadata, juicefs: FakeJuiceFS
) -> None:
    juicefs.meanwhile = changes(metadata, setting(TrashDays=7), setting(TrashDays=9, Capacity=1 << 30))
    assert write.apply() == Written(written=True, put_right=("Capacity", "TrashDays"))
    assert metadata.row.uses(NEW)
    assert (metadata.row.other_fields["TrashDays"], metadata.row.other_fields["Capacity"]) == (9, 1 << 30)


def test_a_change_that_was_taken_back_meanwhile_is_no_loss(
    write: WriteSetting, metadata: FakeMetadata, juicefs: FakeJuiceFS
) -> None:
    juicefs.meanwhile = changes(metadata, setting(TrashDays=7), setting(TrashDays=1))
    assert write.apply() == Written(written=True)
    assert metadata.row.other_fields["TrashDays"] == 1


def test_a_loss_that_cannot_be_put_right_is_named(
    write: WriteSetting, metadata: FakeMetadata, juicefs: FakeJuiceFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    juicefs.meanwhile = changes(metadata, setting(TrashDays=7))
    monkeypatch.setattr(metadata, "replace_setting", lambda expected, new, **_: False)
    assert write.apply() == Written(written=True, lost=("TrashDays",))
    assert metadata.row.uses(NEW)

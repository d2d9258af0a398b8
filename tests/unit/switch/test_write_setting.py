"""Write the setting: already written, read back, undone, and left alone where another changed it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from include.juicefs_storage.errors import LostAnswerError, NeedsHumanError, TransientError
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.volume.setting import StorageConfig
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
    assert write.apply() is True
    assert metadata.read_setting().uses(NEW)
    assert write.apply() is False
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

    def lose(config: StorageConfig) -> None:
        if not written_after_s:
            metadata.row = setting(config)
        raise LostAnswerError("the connection was lost")

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if sum(slept) == written_after_s:
            metadata.row = setting(NEW)

    monkeypatch.setattr(juicefs, "write_storage", lose)
    assert replace(write, sleep=sleep).apply() is True
    assert sum(slept) == written_after_s


def test_a_write_whose_answer_is_lost_and_that_was_not_made_fails(
    write: WriteSetting, monkeypatch: pytest.MonkeyPatch, juicefs: FakeJuiceFS
) -> None:
    slept: list[float] = []

    def lose(config: StorageConfig) -> None:
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


def test_a_rewrite_changes_the_bytes_alone_and_only_where_the_target_stands(
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
    monkeypatch.setattr(metadata, "replace_setting", lambda expected, new: False)
    with pytest.raises(TransientError, match="changed between"):
        write.undo()
    assert metadata.row.uses(NEW)


def test_a_third_value_that_a_secret_held_is_put_right(write: WriteSetting, metadata: FakeMetadata) -> None:
    step = replace(write, stale=[OTHER])
    metadata.row = setting(OTHER)
    assert step.apply() is True
    assert metadata.row.uses(NEW)
    metadata.row = setting(OTHER)
    assert step.undo() is True
    assert metadata.row.uses(OLD)

"""What a run touched, where one of its clusters cannot be asked any more."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from include.juicefs_storage.errors import StorageSwitchError, TransientError
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch import judgement
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.clusters import FIRST
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD, setting


def touched(
    monkeypatch: pytest.MonkeyPatch, now_on: StorageConfig, silent: str, *, went_back: bool = False
) -> list[str]:
    run = SwitchRun(cast("Runtime", SimpleNamespace(setting=lambda: setting(now_on))))
    errors: dict[str, StorageSwitchError] = {silent: TransientError("Cluster east: no answer.")}
    secrets = SimpleNamespace(look=lambda: ([], errors))
    monkeypatch.setattr(SwitchRun, "before", setting(OLD))
    monkeypatch.setattr(SwitchRun, "restore_secret", secrets)
    monkeypatch.setitem(run.__dict__, "write_fence", None)
    monkeypatch.setattr(judgement, "went_back", lambda _: went_back)
    return judgement.differences(run)


def test_a_cluster_that_is_away_before_the_setting_was_written_was_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    assert touched(monkeypatch, OLD, "east") == []


def test_what_a_cluster_that_is_away_holds_after_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert touched(monkeypatch, NEW, "east") == [
        f"the setting names {NEW.bucket}", "what the Secrets hold is not known: Cluster east: no answer.",
    ]  # fmt: skip
    (line,) = touched(monkeypatch, OLD, "east", went_back=True)
    assert "clear `restore_secret` with Downstream" in line


def test_without_the_first_cluster_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TransientError):
        touched(monkeypatch, OLD, FIRST)

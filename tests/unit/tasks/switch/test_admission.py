"""A run that other code planned stops before the volume moves, and goes on once it has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from include.juicefs_storage import code_version as module
from include.juicefs_storage.code_version import code_version
from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch import admission
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD, plan, setting


def admit(monkeypatch: pytest.MonkeyPatch, planned_by: str, now_on: StorageConfig) -> SwitchRun:
    run = SwitchRun(cast("Runtime", SimpleNamespace(setting=lambda: setting(now_on))), forward=True)
    run.plan = plan(code=planned_by)
    nothing = SimpleNamespace(
        ended=lambda how: None, superseded=lambda: SimpleNamespace(backup_id=None), refuse_if_held=lambda: None
    )
    monkeypatch.setitem(run.__dict__, "record", nothing)
    monkeypatch.setitem(run.__dict__, "lease", nothing)
    monkeypatch.setattr(SwitchRun, "current", lambda *, forward=False: run)
    return admission.forward(take_lease=False)


@pytest.mark.parametrize("planned_by", [code_version(), ""])
def test_the_code_that_planned_a_run_carries_it_out(monkeypatch: pytest.MonkeyPatch, planned_by: str) -> None:
    """Plans of before the version was recorded have none."""
    assert admit(monkeypatch, planned_by, OLD)


def test_other_code_refuses_before_the_volume_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NeedsHumanError, match="made by version 0123abc") as refused:
        admit(monkeypatch, "0123abc", OLD)
    assert code_version() in str(refused.value)
    assert "start a new run" in str(refused.value)


def test_other_code_goes_on_once_the_volume_has_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    assert admit(monkeypatch, "0123abc", NEW)


def test_the_version_is_that_of_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text("a = 1\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "code_version.py"))
    before = code_version.__wrapped__()
    (tmp_path / "step.py").write_text("a = 2\n")
    assert code_version.__wrapped__() != before != code_version()

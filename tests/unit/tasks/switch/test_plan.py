"""The plan: refused where there is nothing to switch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.tasks import runbook
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch import plan as tasks
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD, plan, setting


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run without refusals whose target is NEW; what its task leaves in XCom."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(tasks, "all_findings", list)
    for module in (tasks, runbook):
        monkeypatch.setattr(module, "pull", lambda task_id, key: None)
    for module in (tasks, runbook):
        monkeypatch.setattr(module, "push", found.__setitem__)
    monkeypatch.setattr(tasks, "run_id", lambda: "manual__1")
    monkeypatch.setattr(tasks, "triggered_at", lambda: None)
    monkeypatch.setattr(tasks, "make_plan", lambda *_: plan())
    return found


def volume_on(config: StorageConfig, monkeypatch: pytest.MonkeyPatch, *, kept: bool = False) -> None:
    runtime = SimpleNamespace(setting=lambda: setting(config), target=lambda _: NEW, vault=SimpleNamespace(keys=()))
    monkeypatch.setattr(Runtime, "of_run", lambda: runtime)
    monkeypatch.setattr(tasks, "RunRecord", lambda *_: SimpleNamespace(find=lambda: object() if kept else None))


def test_a_volume_elsewhere_is_planned(pushed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    volume_on(OLD, monkeypatch)
    assert tasks.plan.function()["volume"] == plan().volume
    assert pushed["subject"] == f"{plan().title}?"


def test_a_switch_to_where_the_volume_is_is_refused(pushed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    volume_on(NEW, monkeypatch)
    with pytest.raises(AirflowFailException, match="nothing to switch") as refused:
        tasks.plan.function()
    assert isinstance(refused.value.__cause__, PermanentError)
    assert pushed["markdown"].startswith("## Refused")
    assert "nothing to switch" in pushed["error"]["problem"]


def test_the_run_that_moved_the_volume_there_may_be_planned_again(
    pushed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume_on(NEW, monkeypatch, kept=True)
    assert tasks.plan.function()["volume"] == plan().volume

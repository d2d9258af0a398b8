"""The tasks of finishing a move: which way a run takes, and that nothing is certified while a point is open."""

from __future__ import annotations

import base64
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException
from pydantic import SecretStr

from include.juicefs_storage.errors import NeedsHumanError, PermanentError
from include.juicefs_storage.finish.certificate import public_key_of, read_private_key, verify
from include.juicefs_storage.finish.params import FinishParams, resolve_finish_params
from include.juicefs_storage.finish.plan import FinishPlan, later_steps
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.checks import ok, warning
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.switch.marks import Mark, mark_id
from include.juicefs_storage.tasks.finish import certify as certifying
from include.juicefs_storage.tasks.finish import plan as planning
from include.juicefs_storage.tasks.finish.run import FinishRun
from tests.support.fakes import MOUNT, NEW, OLD, UUID, FakeVault, backup, plan, setting

AT = datetime(2026, 11, 29, 3, 0, tzinfo=UTC)
PRIVATE = base64.b64encode(bytes(range(32))).decode()
REAL = {"dry_run": False, "refresh_mount_pods": True}


def planned(**params: Any) -> FinishPlan:
    return FinishPlan(
        volume="myjfs", uuid=UUID, bucket=NEW.bucket, carriers=(), mount_pods=(MOUNT,) * 3,
        refresh=bool(params.get("refresh_mount_pods")), most_pods=params.get("most_pods", 1), findings=(),
        then=later_steps(FinishParams.validated(params)),
    )  # fmt: skip


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {}
    monkeypatch.setattr(certifying, "push", found.__setitem__)
    monkeypatch.setattr(certifying, "run_id", lambda: "manual__9")
    monkeypatch.setattr("include.juicefs_storage.tasks.runbook.push", found.__setitem__)
    monkeypatch.setattr("include.juicefs_storage.tasks.runbook.pull", lambda *_: None)
    return found


def run_with(monkeypatch: pytest.MonkeyPatch, **params: Any) -> None:
    """What the tasks of a run share: a volume that a run has moved to NEW."""
    runtime = SimpleNamespace(setting=lambda: setting(NEW))
    moved = (Mark(UUID, AT), backup("myjfs.manual__1", AT))
    shared = SimpleNamespace(params=FinishParams.validated(params), runtime=runtime, last_move=moved)
    for module in (planning, certifying):
        monkeypatch.setattr(module, "FinishRun", lambda: shared)
    monkeypatch.setattr(certifying, "signing_key", lambda: PRIVATE)


@pytest.mark.parametrize(
    ("params", "path"),
    [
        ({}, "finalize"),
        ({"refresh_mount_pods": True}, "finalize"),
        (REAL, "approve"),
        (REAL | {"require_approval": False}, "refresh_mount_pods"),
        ({"dry_run": False}, "finalize"),
        ({"dry_run": False, "certify": True}, "certify"),
        (REAL | {"certify": True}, "approve"),
        ({"dry_run": False, "watch": True}, "approve"),
        ({"dry_run": False, "watch": True, "require_approval": False}, "refresh_mount_pods"),
    ],
)
def test_which_way_a_run_takes(
    params: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch, pushed: dict[str, Any]
) -> None:
    run_with(monkeypatch, **params)
    monkeypatch.setattr(planning, "pull", lambda task_id, key="": planned(**params).model_dump())
    assert planning.choose_path.function() == path


@pytest.mark.parametrize(("most", "chosen"), [(0, 3), (1, 1), (2, 2)])
def test_how_many_mount_pods_are_replaced(most: int, chosen: int) -> None:
    assert len(planned(refresh_mount_pods=True, most_pods=most).chosen) == chosen
    assert planned(most_pods=most).chosen == ()


def certify(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> Any:
    run_with(monkeypatch, dry_run=False, certify=True)
    monkeypatch.setattr(certifying, "prove_finished", lambda *_: list(findings))
    return certifying.certify.function()


def test_a_certificate_says_what_was_proven(monkeypatch: pytest.MonkeyPatch, pushed: dict[str, Any]) -> None:
    result = certify(monkeypatch, ok("blocks", "all 8 blocks"), ok("old key", "not taken any more"))
    evidence = verify(pushed["certificate"], result["public_key"])
    assert result["public_key"] == public_key_of(read_private_key(PRIVATE))
    assert [claim.seen for claim in evidence.claims] == ["all 8 blocks", "not taken any more"]
    assert (evidence.bucket, evidence.left, evidence.moved_at) == (NEW.bucket, "http://old:9000/data", AT)
    assert PRIVATE not in pushed["certificate"]


def test_nothing_is_certified_while_a_point_is_open(monkeypatch: pytest.MonkeyPatch, pushed: dict[str, Any]) -> None:
    with pytest.raises((NeedsHumanError, AirflowFailException), match="carriers: a pod Remedy: replace it"):
        certify(monkeypatch, ok("blocks", "all 8 blocks"), warning("carriers", "a pod", "replace it"))
    assert "certificate" not in pushed


def test_the_registry_fills_in_where_the_volume_is() -> None:
    entry = {
        "namespace": "storage", "secret_name": "home", "target_bucket": "elsewhere",
        "more_kubernetes_conn_ids": ["east"],
    }  # fmt: skip
    found = resolve_finish_params({"volume": "home", "certify": True}, {"home": entry})
    assert found.more_kubernetes_conn_ids == ("east",)
    assert (found.namespace, found.secret_name, found.certify, found.dry_run) == ("storage", "home", True, True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"more_kubernetes_conn_ids": ["kubernetes_default"]}, "expected each connection once"),
        ({"rehearse_off_s": 60}, "takes `fence_conn_id`"),
    ],
)
def test_params_that_do_not_go_together_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(PermanentError, match=words):
        FinishParams.validated(given)


def test_the_store_that_was_left_is_known_after_its_keys_were_changed_as_well() -> None:
    """As is told where both stores have the same keys: first a key of its own for the new store, then finishing."""
    vault, later = FakeVault(), AT + timedelta(days=1)
    other_key = replace(NEW, access_key=SecretStr("OTHER"))
    rotated = backup(
        "myjfs.manual__2", later, setting_hex=setting(NEW).raw.hex(), plan=plan(change=Change(kind="keys"))
    )
    for at, made in ((AT, backup("myjfs.manual__1", AT)), (later, rotated)):
        vault.save(made.backup_id, made.to_bytes())
        vault.save(mark_id(made.backup_id, "switched"), Mark(UUID, at).to_bytes())
    run = object.__new__(FinishRun)
    run.__dict__["runtime"] = SimpleNamespace(vault=vault, setting=lambda: setting(other_key))
    mark, found = run.last_move
    assert (found.backup_id, mark.at) == ("myjfs.manual__1", AT)
    assert found.setting.bucket == OLD.bucket

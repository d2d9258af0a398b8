"""What is refused of the folder of backups; and all refusals at once."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import pytest

from lab.environment import Lab
from tests.support.refusals import Look, refusals, warnings


@pytest.mark.parametrize("password", ["", "dG9vIHNob3J0", "not base64!"])
def test_no_usable_key_for_backups(connections: Callable[..., None], look: Look, tmp_path: Path, password: str) -> None:
    connections("juicefs_backup", conn_type="generic", password=password, extra={"path": tmp_path.as_uri()})
    (refused,) = refusals(look("check_vault"))
    assert "openssl rand -base64 32" in refused
    assert password not in refused or not password


def test_no_folder_for_backups(connections: Callable[..., None], look: Look) -> None:
    connections("juicefs_backup", conn_type="generic", password=base64.b64encode(bytes(32)).decode())
    (refused,) = refusals(look("check_vault"))
    assert "a folder" in refused


def test_a_folder_that_takes_no_backup(connections: Callable[..., None], look: Look, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    password = base64.b64encode(bytes(32)).decode()
    connections("juicefs_backup", conn_type="generic", password=password, extra={"path": (tmp_path / "file").as_uri()})
    (refused,) = refusals(look("check_vault", dry_run=True))
    assert "writing _probe." in refused


def test_a_folder_with_files_of_another_key(connections: Callable[..., None], look: Look, tmp_path: Path) -> None:
    (tmp_path / "myjfs.run.switched.backup").write_bytes(b"JFSW1" + bytes(60))
    found = look("check_vault", dry_run=True)
    assert refusals(found) == []
    (warning,) = warnings(found)
    assert "myjfs.run.switched" in warning
    assert [file.name for file in tmp_path.glob("*_probe*")] == []


def test_no_connection_for_backups(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_JUICEFS_BACKUP")
    (refused,) = refusals(look("check_vault"))
    assert "juicefs_backup" in refused


def test_everything_that_is_wrong_is_found_at_once(lab: Lab, connections: Callable[..., None], look: Look) -> None:
    connections("juicefs_backup", conn_type="generic", password="")
    lab.kube.order_fault({"deny": {"verb": "patch", "resource": "secrets"}})
    try:
        refused = refusals(look(target_bucket="no-such-bucket", consistency="listing"))
    finally:
        lab.kube.clear_faults()
    words = ("may not patch secrets", "openssl rand", "no-such-bucket")
    assert [word for word in words if not any(word in line for line in refused)] == []

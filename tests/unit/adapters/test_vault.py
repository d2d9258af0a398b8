"""Backups are encrypted, read back before they count, and say what is wrong when they cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from airflow.sdk import ObjectStoragePath

from include.juicefs_storage.adapters.vault import FileVault
from include.juicefs_storage.errors import PermanentError

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
CONTENT = json.dumps({"secret": "old-secret-value"}).encode()


@pytest.fixture
def vault(tmp_path: Path) -> FileVault:
    return FileVault(KEY, ObjectStoragePath(f"file://{tmp_path}/backups"))


def test_what_was_saved_is_loaded_and_is_not_readable_on_disk(vault, tmp_path):
    vault.save("myjfs.run-1", CONTENT)
    assert vault.load("myjfs.run-1") == CONTENT
    assert vault.load("myjfs.run-2") is None
    (file,) = (tmp_path / "backups").iterdir()
    assert b"old-secret" not in file.read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda sealed: sealed[:-1], lambda sealed: sealed[:30] + b"?" + sealed[31:], lambda sealed: b""]
)
def test_a_damaged_backup_is_refused(vault, tmp_path, damage):
    vault.save("myjfs.run-1", CONTENT)
    (file,) = (tmp_path / "backups").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(PermanentError, match="damaged, or written with another key"):
        vault.load("myjfs.run-1")


def test_a_backup_under_another_name_or_key_is_refused(vault, tmp_path):
    vault.save("myjfs.run-1", CONTENT)
    (file,) = (tmp_path / "backups").iterdir()
    file.rename(file.with_name("other.run-1.backup"))
    with pytest.raises(PermanentError):
        vault.load("other.run-1")
    vault.save("myjfs.run-1", CONTENT)
    with pytest.raises(PermanentError, match="put the key back"):
        FileVault(OTHER_KEY, vault.folder).load("myjfs.run-1")


def test_the_key_is_not_in_the_repr(vault):
    assert "kkkk" not in repr(vault)


def test_it_lists_what_lies_in_it(vault, tmp_path):
    assert vault.ids() == []
    for name in ("myjfs.run-2", "myjfs.run-1", "myjfs.run-1.switched"):
        vault.save(name, CONTENT)
    (tmp_path / "backups/myjfs.run-3.part").write_bytes(b"half")
    assert vault.ids() == ["myjfs.run-1", "myjfs.run-1.switched", "myjfs.run-2"]

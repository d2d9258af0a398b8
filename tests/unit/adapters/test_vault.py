"""Backups are encrypted, read back before they count, and say what is wrong when they cannot be read."""

from __future__ import annotations

import base64
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from airflow.sdk import ObjectStoragePath
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from include.juicefs_storage.adapters.vault import FileVault, Keyring, key_id
from include.juicefs_storage.errors import PermanentError, StorageSwitchError, TransientError

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
CONTENT = json.dumps({"secret": "old-secret-value"}).encode()


@pytest.fixture
def vault(tmp_path: Path) -> FileVault:
    return FileVault(Keyring(KEY), ObjectStoragePath(f"file://{tmp_path}/backups"))


def test_what_was_saved_is_loaded_and_is_not_readable_on_disk(vault: FileVault, tmp_path: Path) -> None:
    vault.save("myjfs.run-1", CONTENT)
    assert vault.load("myjfs.run-1") == CONTENT
    assert vault.load("myjfs.run-2") is None
    (file,) = (tmp_path / "backups").iterdir()
    assert b"old-secret" not in file.read_bytes()


@pytest.mark.parametrize(
    "damage", [lambda sealed: sealed[:-1], lambda sealed: sealed[:30] + b"?" + sealed[31:], lambda sealed: b""]
)
def test_a_damaged_backup_is_refused(vault: FileVault, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    vault.save("myjfs.run-1", CONTENT)
    (file,) = (tmp_path / "backups").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(PermanentError, match=r"damaged, renamed, or sealed with another key|was sealed with key"):
        vault.load("myjfs.run-1")


def test_a_backup_under_another_name_or_key_is_refused(vault: FileVault, tmp_path: Path) -> None:
    vault.save("myjfs.run-1", CONTENT)
    (file,) = (tmp_path / "backups").iterdir()
    file.rename(file.with_name("other.run-1.backup"))
    with pytest.raises(PermanentError):
        vault.load("other.run-1")
    vault.save("myjfs.run-1", CONTENT)
    with pytest.raises(PermanentError, match="was sealed with key"):
        FileVault(Keyring(OTHER_KEY), vault.folder).load("myjfs.run-1")


def test_the_key_is_not_in_the_repr(vault: FileVault) -> None:
    assert "kkkk" not in repr(vault)


def test_it_lists_what_lies_in_it(vault: FileVault, tmp_path: Path) -> None:
    assert vault.ids() == []
    for name in ("myjfs.run-2", "myjfs.run-1", "myjfs.run-1.switched"):
        vault.save(name, CONTENT)
    (tmp_path / "backups/myjfs.run-3.part").write_bytes(b"half")
    assert vault.ids() == ["myjfs.run-1", "myjfs.run-1.switched", "myjfs.run-2"]


def test_a_rotated_key_seals_and_the_old_one_still_opens(vault: FileVault) -> None:
    vault.save("myjfs.run-1", CONTENT)
    rotated = FileVault(Keyring(OTHER_KEY, (b"x" * 32, KEY)), vault.folder)
    assert rotated.load("myjfs.run-1") == CONTENT
    rotated.save("myjfs.run-2", CONTENT)
    assert FileVault(Keyring(OTHER_KEY), vault.folder).load("myjfs.run-2") == CONTENT


def test_a_file_of_an_early_version_is_opened_with_an_old_key(vault: FileVault, tmp_path: Path) -> None:
    nonce = b"n" * 12
    (tmp_path / "backups").mkdir()
    early = b"JFSW1" + nonce + AESGCM(KEY).encrypt(nonce, CONTENT, b"myjfs.run-1")
    (tmp_path / "backups" / "myjfs.run-1.backup").write_bytes(early)
    assert FileVault(Keyring(OTHER_KEY, (KEY,)), vault.folder).load("myjfs.run-1") == CONTENT
    with pytest.raises(PermanentError, match="old_keys"):
        FileVault(Keyring(OTHER_KEY), vault.folder).load("myjfs.run-1")


def test_a_missing_key_is_named_without_telling_it(vault: FileVault) -> None:
    vault.save("myjfs.run-1", CONTENT)
    with pytest.raises(PermanentError) as refused:
        FileVault(Keyring(OTHER_KEY), vault.folder).load("myjfs.run-1")
    assert key_id(KEY).hex() in refused.value.problem
    assert key_id(OTHER_KEY).hex() in refused.value.problem
    assert base64.b64encode(KEY).decode() not in str(refused.value)


def connect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, password: str, **extra: object) -> FileVault:
    connection = {
        "conn_type": "generic",
        "password": password,
        "extra": {"path": tmp_path.as_uri(), **extra},
    }
    monkeypatch.setenv("AIRFLOW_CONN_SOME_BACKUP", json.dumps(connection))
    return FileVault.from_connection("some_backup", MASKED.append)


MASKED: list[str] = []


def test_the_connection_holds_the_current_key_and_the_old_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = [base64.b64encode(key).decode() for key in (KEY, OTHER_KEY)]
    for password, more in ((texts[0], {"old_keys": [texts[1]]}), (",".join(texts), {})):
        MASKED.clear()
        vault = connect(monkeypatch, tmp_path, password, **more)
        assert list(vault.keys) == [KEY, OTHER_KEY]
        assert texts == MASKED


@pytest.mark.parametrize("old_keys", [["short"], [base64.b64encode(KEY).decode(), ""], "no-list-and-no-key"])
def test_an_old_key_that_is_none_is_refused_without_its_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, old_keys: object
) -> None:
    with pytest.raises(PermanentError, match=r"extra\.old_keys") as refused:
        connect(monkeypatch, tmp_path, base64.b64encode(KEY).decode(), old_keys=old_keys)
    assert not [text for text in ("short", "no-list-and-no-key") if text in str(refused.value)]


def folder_that(monkeypatch: pytest.MonkeyPatch, operation: str, number: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ObjectStoragePath, operation, fail)


@pytest.mark.parametrize(
    ("operation", "number", "kind"),
    [
        ("write_bytes", errno.ENOSPC, TransientError),
        ("write_bytes", errno.EROFS, PermanentError),
        ("replace", errno.EIO, TransientError),
        ("mkdir", errno.EACCES, PermanentError),
    ],
)
def test_a_folder_that_cannot_be_written_is_an_error_of_ours(
    vault: FileVault, monkeypatch: pytest.MonkeyPatch, operation: str, number: int, kind: type[Exception]
) -> None:
    folder_that(monkeypatch, operation, number)
    with pytest.raises(kind, match=f"writing myjfs.run-1 failed: {os.strerror(number)}") as failed:
        vault.save("myjfs.run-1", CONTENT)
    assert isinstance(failed.value, StorageSwitchError)
    assert "juicefs_backup" in failed.value.next_step
    with pytest.raises(StorageSwitchError):
        vault.check_room(10)


def test_an_error_of_any_kind_is_one_of_ours(vault: FileVault, monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage's client has errors of its own; one that appears while a part is removed hides none."""

    def fail(*_: object, **__: object) -> None:
        raise ValueError("a client's own")

    monkeypatch.setattr(ObjectStoragePath, "write_bytes", fail)
    monkeypatch.setattr(ObjectStoragePath, "unlink", fail)
    with pytest.raises(TransientError, match=r"writing myjfs\.run-1 failed: ValueError"):
        vault.save("myjfs.run-1", CONTENT)


def test_a_write_that_fails_leaves_nothing(vault: FileVault, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder_that(monkeypatch, "replace", errno.EIO)
    with pytest.raises(TransientError):
        vault.save("myjfs.run-1", CONTENT)
    assert list((tmp_path / "backups").iterdir()) == []


@pytest.mark.parametrize("operation", ["read_bytes", "exists"])
def test_a_folder_that_cannot_be_read_is_an_error_of_ours(
    vault: FileVault, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    vault.save("myjfs.run-1", CONTENT)
    folder_that(monkeypatch, operation, errno.EIO)
    with pytest.raises(TransientError, match=r"reading myjfs\.run-1 failed"):
        vault.load("myjfs.run-1")


def test_room_is_proven_and_nothing_is_left(vault: FileVault, tmp_path: Path) -> None:
    vault.check_room(100_000)
    assert list((tmp_path / "backups").iterdir()) == []

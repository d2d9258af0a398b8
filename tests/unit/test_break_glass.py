"""The command opens a backup with its key alone, and shows no secret."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.break_glass import Glass, main, open_backup
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.backup import FORMAT, Backup
from tests.support.fakes import OLD, UUID, FakeMetadata, FakeStore, backup, plan, setting

BACKUPS = Path(__file__).parent / "switch" / "backups"
NAME = "myjfs.manual__2026-01-31T09-00-00-00-00"
KEY, OTHER = (base64.b64encode(letter * 32).decode() for letter in (b"k", b"o"))
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("format_", range(1, FORMAT + 1))
@pytest.mark.parametrize("key", [KEY, f"{KEY}\n", f"{OTHER},{KEY}", f"{OTHER}\n{KEY}\n"])
def test_a_file_of_every_format_opens_with_its_key(format_: int, key: str) -> None:
    backup = open_backup(BACKUPS / f"format-{format_}" / f"{NAME}.backup", key)
    assert (backup.backup_id, backup.setting.uuid, backup.setting.config) == (NAME, UUID, OLD)


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        (f"{NAME}.backup", OTHER, "sealed with key"),
        (f"{NAME}.backup", "", "Expected base64 of 32 bytes"),
        (f"{NAME}.backup", f"{KEY},short", "Expected base64 of 32 bytes"),
        ("none.backup", KEY, "cannot be read"),
        (f"{NAME}.switched.backup", KEY, "is not a backup"),
    ],
)
def test_what_does_not_open_is_refused_without_its_key(name: str, key: str, words: str) -> None:
    with pytest.raises(PermanentError, match=words) as refused:
        open_backup(BACKUPS / "format-2" / name, key)
    assert not [secret for secret in (KEY, OTHER, "short") if secret in str(refused.value)]


def test_a_renamed_file_does_not_open(tmp_path: Path) -> None:
    renamed = tmp_path / "myjfs.other.backup"
    renamed.write_bytes((BACKUPS / "format-2" / f"{NAME}.backup").read_bytes())
    with pytest.raises(PermanentError, match="damaged, renamed"):
        open_backup(renamed, KEY)


def without_airflow(tmp_path: Path, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """The command in a process in which Airflow cannot be imported."""
    (tmp_path / "airflow.py").write_text("raise ImportError('Airflow is gone')")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "include.juicefs_storage.break_glass", *words]
    return subprocess.run(command, input=stdin, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("by_file", [True, False])
def test_it_verifies_a_backup_without_airflow_and_shows_no_key(by_file: bool, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    options = ["--key-file", str(tmp_path / "key")] if by_file else []
    file = BACKUPS / "format-2" / f"{NAME}.backup"
    done = without_airflow(tmp_path, str(file), "--offline", *options, stdin="" if by_file else KEY)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"volume myjfs ({UUID}) on {OLD.bucket}" in done.stdout
    assert "juicefs-sc-secret" in done.stdout
    assert not [secret for secret in ("OLDKEY", "old-secret-value", "meta-pw", KEY) if secret in done.stdout]


def test_the_whole_secrets_are_printed_into_a_pipe_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_text(KEY)
    words = [str(BACKUPS / "format-2" / f"{NAME}.backup"), "--key-file", str(tmp_path / "key"), "--print-secrets"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "secret-key: old-secret-value" in printed
    assert "metaurl: mysql://" in printed
    assert "namespace: juicefs" in printed
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(words) == 2
    assert "old-secret-value" not in capsys.readouterr().out


def test_the_secrets_of_another_cluster_are_printed_by_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(KEY)
    words = [str(BACKUPS / "format-3" / f"{NAME}.backup"), "--key-file", str(tmp_path / "key")]
    assert main([*words, "--offline"]) == 0
    assert "kubernetes_east/juicefs-sc-secret" in capsys.readouterr().out
    assert main([*words, "--print-secrets", "--of-cluster", "kubernetes_east"]) == 0
    assert f"bucket: {OLD.bucket}" in capsys.readouterr().out
    assert main([*words, "--print-secrets", "--of-cluster", "west"]) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "mounted in more clusters when the backup was made: kubernetes_east"),
        (["--without", "west"], "knows no cluster west; beside the first: kubernetes_east"),
    ],
)
def test_a_cluster_of_the_backup_is_given_or_left_out_by_name(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(KEY)
    cluster = {"server": "https://127.0.0.1:1"}
    config = {
        "current-context": "c", "users": [{"name": "u", "user": {}}], "clusters": [{"name": "k", "cluster": cluster}],
        "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(json.dumps(config))
    file = BACKUPS / "format-3" / f"{NAME}.backup"
    options = ["--key-file", str(tmp_path / "key"), "--kubeconfig", str(tmp_path / "kubeconfig")]
    assert main([str(file), *options, *words]) == 1
    assert said in capsys.readouterr().err


def test_a_key_file_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(BACKUPS / "format-2" / f"{NAME}.backup"), "--key-file", str(tmp_path / "none")]
    assert main(words) == 1
    assert "none cannot be read" in capsys.readouterr().err


class GlassOfOneStore(Glass):
    """A way back whose two buckets are one, of slices 7 and 8, without block 7."""

    def __init__(self, backup: Backup) -> None:
        self.backup = backup
        self.metadata = cast("MySqlMetadata", FakeMetadata(setting(OLD), [(7, 5), (8, 5)]))

    def buckets(self) -> tuple[S3Bucket, S3Bucket]:
        store = cast("S3Bucket", FakeStore({"myjfs/chunks/0/0/8_0_5": 5}))
        return store, store


@pytest.mark.parametrize(("lost_blocks", "missing"), [((), "1 of 2"), (("myjfs/chunks/0/0/7_0_5",), "")])
def test_a_block_that_was_accepted_as_lost_is_not_missing(lost_blocks: tuple[str, ...], missing: str) -> None:
    recorded = backup("myjfs.run", datetime(2026, 1, 31, tzinfo=UTC), plan=plan(lost_blocks=lost_blocks))
    assert GlassOfOneStore(recorded).missing() == missing

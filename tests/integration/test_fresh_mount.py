"""A fresh mount with an empty cache, of a volume with files that cannot be read whole in any reasonable time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from include.juicefs_storage.adapters.juicefs_command import JuiceFSCommand, on_worker
from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.volume.metaurl import Metaurl
from lab.environment import Lab
from lab.process import binary, run

CANARY = ".storage-switch-fresh-mount"


@pytest.fixture
def juicefs(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> JuiceFSCommand:
    monkeypatch.setenv("PATH", str(Path(binary("juicefs")).parent), prepend=":")
    return on_worker(Metaurl.parse(lab.mariadb.meta_url_with_password))


@pytest.fixture
def large_file(lab: Lab) -> Iterator[Path]:
    file = lab.mounts()[0] / "A-disk-image.raw"
    with file.open("wb") as image:
        image.write(os.urandom(8 << 20))
        image.truncate(2 << 40)
    yield file
    file.unlink()


def test_a_large_file_in_the_root_is_not_read_whole(lab: Lab, juicefs: JuiceFSCommand, large_file: Path) -> None:
    start = time.monotonic()
    try:
        keys = juicefs.mount_fresh(CANARY)
        assert time.monotonic() - start < 60
        assert set(keys) <= set(lab.old_store.objects("myjfs/chunks/"))
    finally:
        juicefs.unmount_fresh(CANARY)
    assert not (lab.mounts()[0] / CANARY).exists()


@pytest.fixture
def own_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[JuiceFSCommand, Path, Path]]:
    """A volume without servers: juicefs for it, where it is mounted, and its blocks."""
    program, url, mount = binary("juicefs"), f"sqlite3://{tmp_path}/meta.db", tmp_path / "mnt"
    run([program, "format", url, "own", "--storage", "file", "--bucket", f"{tmp_path}/data/", "--trash-days", "1"])
    mount.mkdir()
    run([program, "mount", "-d", "--no-usage-report", "--cache-size=0", "--backup-meta=0", url, mount])
    monkeypatch.setenv("PATH", str(Path(program).parent), prepend=":")
    metaurl = replace(Metaurl.parse("mysql://(db)/own"), argument=url)
    yield on_worker(metaurl), mount, tmp_path / "data"
    run([program, "umount", mount])


def mounted(juicefs: JuiceFSCommand) -> None:
    try:
        juicefs.mount_fresh(CANARY)
    finally:
        juicefs.unmount_fresh(CANARY)


def test_files_in_the_trash_prove_nothing(own_volume: tuple[JuiceFSCommand, Path, Path]) -> None:
    juicefs, mount, blocks = own_volume
    for number in range(6):
        file = mount / f"deleted-{number}"
        file.write_bytes(os.urandom(100))
        file.unlink()
    for block in [file for file in blocks.rglob("chunks/**/*") if file.is_file()]:
        block.unlink()
    mounted(juicefs)

    (mount / "zebra").write_bytes(os.urandom(100))
    (lost,) = [file for file in blocks.rglob("chunks/**/*_100") if file.is_file()]
    lost.unlink()
    with pytest.raises(TransientError, match=r"cannot read .*/zebra"):
        mounted(juicefs)

"""A fresh mount with an empty cache, of a volume with files that cannot be read whole in any reasonable time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from include.juicefs_storage.adapters.juicefs_command import JuiceFSCommand, on_worker
from include.juicefs_storage.volume.metaurl import Metaurl
from lab.environment import Lab
from lab.process import binary

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

"""The keys and lengths that we compute from the metadata are those that the real juicefs writes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
from pathlib import Path

import pytest

from include.juicefs_storage.volume.layout import ObjectSizes, block_objects
from include.juicefs_storage.volume.setting import Setting
from lab.process import binary

MIB = 1 << 20


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--block-size", "1M"],
        ["--hash-prefix"],
        ["--block-size", "64K", "--hash-prefix"],
        ["--compress", "lz4"],
    ],
)
def test_block_layout(tmp_path: Path, options: list[str]) -> None:
    metaurl, store, files = f"sqlite3://{tmp_path}/meta.db", tmp_path / "store", tmp_path / "files"
    files.mkdir()
    for name, size in {"empty": 0, "tiny": 1, "odd": 100_001, "exact": 4 * MIB, "large": 9 * MIB + 7}.items():
        (files / name).write_bytes(os.urandom(size))

    def juicefs(*args: str) -> None:
        done = subprocess.run(
            [binary("juicefs"), *args], capture_output=True, text=True, check=False, env=os.environ | {"myvol": metaurl}
        )
        assert done.returncode == 0, done.stderr

    juicefs("format", "--storage", "file", "--bucket", f"{store}/", *options, metaurl, "layout")
    juicefs("sync", f"{files}/", "jfs://myvol/")

    with sqlite3.connect(tmp_path / "meta.db") as metadata:
        setting = Setting(
            metadata.execute("SELECT value FROM jfs_setting WHERE name = 'format'").fetchone()[0].encode()
        )
        slices = metadata.execute("SELECT chunkid, size FROM jfs_chunk_ref WHERE refs > 0").fetchall()
    computed = {key: length for slice_id, size in slices for key, length in block_objects(setting, slice_id, size)}
    found = {
        str(path.relative_to(store)): path.stat().st_size
        for path in (store / "layout" / "chunks").rglob("*")
        if path.is_file()
    }
    assert computed.keys() == found.keys()
    assert sum(computed.values()) == 13 * MIB + 100_009
    assert ObjectSizes.of(setting).exact == ("lz4" not in options)
    if ObjectSizes.of(setting).exact:
        assert computed == found

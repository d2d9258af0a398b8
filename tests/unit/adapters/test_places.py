"""On which volume or store a folder lies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from include.juicefs_storage.adapters import places
from include.juicefs_storage.adapters.places import find_place

MOUNTS = """\
21 1 8:1 / / rw - ext4 /dev/vda rw
155 21 0:80 / /mnt/my\\040jfs rw,nosuid shared:7 - fuse.juicefs JuiceFS:myjfs rw,user_id=0
156 155 0:81 / /mnt/my\\040jfs/disk rw shared:8 - ext4 /dev/vdb rw
"""


@pytest.mark.parametrize(
    ("url", "volume"),
    [
        ("file:///mnt/my%20jfs/backups", "myjfs"),
        ("/mnt/my jfs", "myjfs"),
        ("file:///mnt/my%20jfs/disk/backups", ""),
        ("file:///mnt/my%20jfs2/backups", ""),
        ("file:///opt/airflow/backups", ""),
    ],
)
def test_a_local_folder_lies_on_the_deepest_mount(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, url: str, volume: str
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    monkeypatch.setattr(places, "_MOUNTS", mounts)
    assert find_place("Backups", url).volume == volume


def test_a_folder_in_a_store_lies_where_its_connection_says(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"conn_type": "aws", "extra": {"endpoint_url": "https://minio:9000"}}
    monkeypatch.setenv("AIRFLOW_CONN_BACKUPS", json.dumps(extra))
    assert find_place("Backups", "s3://backups@bucket/prefix").store == "minio:9000"
    assert find_place("Backups", "s3://bucket/prefix").store == ""

"""What a start of a driver's container writes into the setting."""

from __future__ import annotations

import pytest

from include.juicefs_storage.volume.format_command import find_format

MOUNT = "exec /bin/mount.juicefs ${metaurl} /jfs/x -o bucket=http://in-options/b"


ALL = (
    "sh -c /usr/local/bin/juicefs format --storage=minio --bucket=http://old:9000/data --access-key=AK "
    f"--secret-key=${{secretkey}} ${{metaurl}} myjfs\n{MOUNT}"
)
QUOTED = (
    f"sh -c juicefs format --storage=S3 --bucket=$'http://o/d?a=1&b=2' ${{metaurl}} myjfs --bucket=http://l/x\n{MOUNT}"
)
NO_UPDATE = f"sh -c juicefs format --no-update --bucket=http://old/data ${{metaurl}} myjfs\n{MOUNT}"


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (ALL, ("myjfs", "minio", "http://old:9000/data", "AK", True)),
        (QUOTED, ("myjfs", "s3", "http://l/x", "", True)),
        (NO_UPDATE, ("myjfs", "", "http://old/data", "", False)),
    ],
    ids=["all values", "quoted, and appended options", "no update"],
)
def test_what_it_names(command: str, expected: tuple[object, ...]) -> None:
    found = find_format([command])
    assert found
    assert (found.volume, found.storage, found.bucket, found.access_key, found.updates) == expected


def test_a_container_that_mounts_alone_has_none() -> None:
    assert find_format([MOUNT, "sleep 3600"]) is None

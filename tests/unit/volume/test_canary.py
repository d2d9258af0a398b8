"""What a client's log says of its last reload, and who writes for a client that only reads."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from include.juicefs_storage.ports import Pod
from include.juicefs_storage.volume.canary import Reload, last_reload, nearest_writer
from tests.support.fakes import NEW, OLD

FAILED = """\
2026/01/31 09:00:00 juicefs[7] <INFO>: found new configuration: storage="minio" bucket="https://new:9000/data2"
2026/01/31 09:00:00 juicefs[7] <WARNING>: object storage: failed to load config: unknown RetryMode [mount.go:483]
"""
RECOVERED = f"{FAILED}{FAILED.splitlines()[0]}\n"


def test_the_last_reload_counts() -> None:
    assert last_reload(FAILED, NEW).failure == "failed to load config: unknown RetryMode [mount.go:483]"
    assert last_reload(RECOVERED, NEW).failure == ""
    assert last_reload("<WARNING>: object storage: of the start, or of a log that was cut", NEW) == Reload()


def test_a_reload_names_the_storage_and_the_key() -> None:
    line = 'found new configuration: storage="minio" bucket="https://new:9000/data2" ak="NEWKEY" storageClass=""'
    assert last_reload(line, NEW) == Reload(found=True)
    for other in (line.replace("NEWKEY", "OLDKEY"), line.replace("new:9000", "old:9000"), line.replace("minio", "s3")):
        assert last_reload(other, NEW) == Reload(found=False)
        assert last_reload(f"{other}\n{line}", NEW) == Reload(found=True)
        assert last_reload(f"{line}\n{other}", NEW) == Reload(found=False)


@pytest.mark.parametrize(
    ("logged", "after_s"),
    [
        ("2026/01/31 09:00:20", 13.0),
        ("2026/01/31 14:45:20", 13.0),  # in Nepal
        ("2026/01/31 00:00:20", 13.0),  # in Alaska
        ("2026/01/31 09:00:06", 0.0),  # the log has whole seconds
        ("2026/01/31 09:01:07", 60.0),
    ],
)
def test_a_log_tells_how_long_the_reload_took_in_whichever_time_zone(logged: str, after_s: float) -> None:
    line = (
        f'{logged}.123456 juicefs[7] <INFO>: found new configuration: storage="minio" bucket="{NEW.bucket}" ak="NEWKEY"'
    )
    since = datetime(2026, 1, 31, 9, 0, 7, tzinfo=UTC)
    assert last_reload(f"another line\n{line}\n", NEW).after_s(since) == after_s
    assert last_reload(line, OLD).after_s(since) is None
    assert last_reload(line, NEW).after_s(None) is None


def test_a_reader_reads_what_a_client_of_another_node_wrote_where_there_is_one() -> None:
    reader, neighbour, distant, abroad = (
        Pod("juicefs", name, name, node, True, 0, "", {}, (), ())
        for name, node in [("reader", "1"), ("neighbour", "1"), ("distant", "2"), ("other/abroad", "1")]
    )
    assert nearest_writer([neighbour, distant], reader) == distant
    # Nodes of two clusters may have one name.
    assert nearest_writer([neighbour, abroad], reader) == abroad
    assert nearest_writer([neighbour], reader) == neighbour
    assert nearest_writer([], reader) is None

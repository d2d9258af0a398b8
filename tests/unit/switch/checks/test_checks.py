"""The decisions of the checks that no lab can provoke: odd versions and commands, images without tools."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.ports import ExecResult, Pod
from include.juicefs_storage.switch.checks import check_runner, check_volume, gather, refusal
from include.juicefs_storage.switch.checks.target import check_reach
from include.juicefs_storage.volume.clients import _REACH, MountPod, stale_mount_pods, storage_overrides
from include.juicefs_storage.volume.metaurl import same_metadata
from include.juicefs_storage.volume.secret import written_by_format
from tests.support.fakes import NEW, OLD, FakeMetadata, setting

MOUNT = MountPod(
    name="juicefs-node-1-pvc-1-abcdef", uid="1", node="node-1", restarts=0, volume_id="pvc-1",
    mount_path="/jfs/pvc-1-abcdef", storage=OLD.storage, bucket=OLD.bucket, heartbeat_s=12, writeback=False,
    read_only=False, version="1.4.2+2026-01-01.abc", request_errors=0,
)  # fmt: skip


def findings(row=None, **changes: Any) -> list[tuple[str, str]]:
    row = row or setting()
    found = check_volume(row, [MOUNT.model_copy(update=changes)], [], FakeMetadata(row), 60)
    assert all(finding.remedy for finding in found if finding.level != "ok")
    return [(finding.level, finding.message) for finding in found]


def test_a_good_volume():
    assert [level for level, _ in findings()] == ["ok"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "1.0.4+2023-04-06.f1c475d"}, "runs JuiceFS 1.0.4"),
        ({"version": ""}, "needs 1.1"),
        ({"version": "0.17.5"}, "needs 1.1"),
        ({"heartbeat_s": 61}, "heartbeat of 61 s"),
        ({"read_only": True}, "read-only"),
        ({"bucket": "http://elsewhere/b"}, "override"),
        ({"staged_blocks": 3, "writeback": True}, "3 blocks wait"),
    ],
)
def test_a_client_that_cannot_follow_or_be_proven(changes, words):
    ((level, message),) = findings(**changes)
    assert level == "refusal"
    assert words in message


@pytest.mark.parametrize(
    ("row", "words"),
    [(setting(Shards=4), "4 buckets"), (setting(replace(OLD, storage="oss")), "kind 'oss'")],
)
def test_a_volume_that_cannot_move(row, words):
    ((level, message),) = findings(row, bucket=row.bucket)
    assert level == "refusal"
    assert words in message


@pytest.mark.parametrize(
    ("runner", "client", "level"),
    [
        ("1.4.2+2026-01-01.abc", "1.4.2+2025-12-12.def", "ok"),
        ("1.4.2", "1.4.3", "refusal"),
        ("1.10.0", "1.9.9", "ok"),
        ("1.3.0-beta1", "1.2.5", "ok"),
        ("unknown", "1.2.5", "warning"),
    ],
)
def test_the_juicefs_that_writes_is_as_new_as_the_newest_client(runner, client, level):
    (finding,) = check_runner(runner, [MOUNT.model_copy(update={"version": client})], [])
    assert finding.level == level


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("/jfs/x -o heartbeat=3,bucket=http://h:9000/b,cache-dir=/c", ("bucket=http://h:9000/b",)),
        ("/jfs/x --bucket http://h/b --storage=s3", ("bucket http://h/b", "storage=s3")),
        ("/jfs/x -o 'storage=minio,cache-dir=/c'", ("storage=minio",)),
        ("bucket=http://h/b", ("bucket=http://h/b",)),
        ("/jfs/x -o storage-class=STANDARD_IA,cache-dir=/bucket", ()),
    ],
)
def test_overrides_among_mount_options(options, found):
    assert storage_overrides(options) == found


class Pods:
    """A cluster whose pods answer every exec alike."""

    namespace = "juicefs"

    def __init__(self, answer: ExecResult | TransientError, pods: list[Pod] | None = None) -> None:
        self.answer, self.found = answer, pods or []

    def exec(self, *_: object, **__: object) -> ExecResult:
        if isinstance(self.answer, TransientError):
            raise self.answer
        return self.answer

    def pods(self, *_: object) -> list[Pod]:
        return self.found


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        (ExecResult(0, "", ""), "ok"),
        (ExecResult(7, "", "curl: (7) Failed to connect"), "refusal"),
        (ExecResult(69, "", ""), "warning"),
        (ExecResult(127, "", "sh: not found"), "warning"),
        (TransientError("the connection was lost"), "warning"),
    ],
)
def test_what_the_pods_say_about_the_endpoint(answer, level):
    (finding,) = check_reach(Pods(answer), NEW, [MOUNT], controller=False)
    assert finding.level == level


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("tools", "port_open", "code"),
    [(["bash", "timeout"], True, 0), (["bash", "timeout"], False, 1), (["bash"], True, 69), ([], True, 69)],
)
def test_an_image_without_curl_asks_bash_and_one_without_both_says_so(
    tools, port_open, code, listening, tmp_path: Path
):
    for tool in tools:
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        port = listening if port_open else closed.getsockname()[1]
        command = ["/bin/sh", "-c", _REACH, "sh", f"http://127.0.0.1:{port}", "127.0.0.1", str(port)]
        done = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, check=False, capture_output=True)
    assert done.returncode == code, done.stderr


def pod(name: str, uid: str, command: str, *, restarts: int = 0, ready: bool = True, volume_id: str = "pvc-1") -> Pod:
    return Pod(
        namespace="juicefs", name=name, uid=uid, node="node-1", ready=ready, restarts=restarts, problem="",
        labels={"volume-id": volume_id}, commands=(command,), claims=(),
    )  # fmt: skip


def test_who_may_write_old_values():
    old = (
        f"sh -c juicefs format --storage=minio --bucket={OLD.bucket} ${{metaurl}} myjfs\nexec /bin/mount.juicefs /jfs/x"
    )
    quoted = old.replace(OLD.bucket, f"'{OLD.bucket}'")
    pods = [
        pod("known", "1", old),
        pod("restarted", "2", old, restarts=1),
        pod("new", "3", quoted),
        pod("with-new-values", "4", old.replace(OLD.bucket, NEW.bucket)),
        pod("harmless", "5", "juicefs format --no-update ${metaurl} myjfs\nexec /bin/mount.juicefs /jfs/x"),
        pod("another-volume", "6", old.replace(OLD.bucket, "http://old:9000/other"), volume_id="pvc-9"),
        pod("another-pv", "7", old, volume_id="pvc-2"),
    ]
    known = [MOUNT, MOUNT.model_copy(update={"uid": "2"})]
    found = stale_mount_pods(Pods(ExecResult(0, "", ""), pods), known, NEW)
    assert [pod.name for pod in found] == ["restarted", "new", "another-pv"]


def test_what_a_starting_pod_writes_by_a_secret():
    values = {"storage": "minio", "bucket": "http://h/b", "accesskey": "A", "secret-key": "S"}
    config = written_by_format(values)
    assert config
    assert (config.bucket, config.access_key.get_secret_value(), config.secret_key.get_secret_value()) == (
        "http://h/b",
        "A",
        "S",
    )
    assert written_by_format({"secretkey": "S"}) is None


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ("mysql://u:p@(db:3306)/jfs", True),
        ("mysql://v:p@ss@tcp(db:3306)/jfs?charset=utf8", True),
        ("mysql://u:p@(db)/jfs", True),
        ("mysql://u:p@(db:3307)/jfs", False),
        ("mysql://u:p@(db:3306)/other", False),
        ("redis://db:6379/1", False),
        ("", False),
    ],
)
def test_which_metadata_urls_are_the_same(other, same):
    assert same_metadata("mysql://u:p@(db:3306)/jfs", other) is same


def test_parts_of_a_check_are_made_whatever_becomes_of_the_others():
    def fails(error: Exception) -> Any:
        def part() -> Any:
            raise error

        return part

    refused = refusal("x", "no", "do")
    found = gather("x", fails(TransientError("gone")), lambda: [refused], fails(PermanentError("never")))
    assert [finding.message for finding in found] == ["no", "gone", "never"]
    with pytest.raises(TransientError, match="gone"):
        gather("x", list, fails(TransientError("gone")))

"""The lab, which the demo and the other tests stand on: it counts right, fails as ordered, leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from lab.environment import Lab
from lab.keys import random_part
from lab.mariadb import mutating
from lab.process import LabError, LabUnavailableError, Server, wait_for
from lab.writer import Writer, check_manifest, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def writer(lab: Lab, request: pytest.FixtureRequest) -> Iterator[Writer]:
    name = f"writer-{request.node.name}"
    writer = Writer.start(lab.state, lab.mounts()[1] / name, name=name, rate=40)
    yield writer
    writer.stop()


def test_everything_runs(lab: Lab) -> None:
    assert {state for _, state, _ in lab.status()} == {"running"}
    assert len(lab.mounts()) == 2
    assert lab.mariadb.setting()["Bucket"] == lab.old_store.bucket_url
    assert all(lab.mount_processes().values()), "each mount has its processes"


def test_the_record_brings_the_same_lab_back_and_is_private(lab: Lab) -> None:
    assert Lab.load(lab.state) == lab
    assert (lab.state / "lab.json").stat().st_mode & 0o777 == 0o600
    for secret in (lab.mariadb.password, lab.old_store.secret_key, lab.new_store.secret_key):
        assert random_part(secret) not in repr(lab)


def test_no_secret_in_any_argv(lab: Lab) -> None:
    secrets = (lab.old_store.secret_key, lab.new_store.secret_key, lab.mariadb.password)
    servers = [server.pid for server in Server.load_all(lab.state)]
    assert servers
    for pid in servers:
        argv = " ".join(psutil.Process(pid).cmdline())
        assert not any(random_part(secret) in argv for secret in secrets), argv


def test_acknowledged_files_are_read_back_through_an_empty_cache_from_a_complete_copy(lab: Lab, writer: Writer) -> None:
    seeded = lab.seed(30)
    wait_for("the writer has appended and deleted", lambda: writer.summary().deleted > 2, deadline_s=60)
    summary = writer.stop()
    assert summary.written > 20
    assert (summary.write_errors, summary.read_errors) == ([], [])

    lab.copy_to_new_store()
    old, new = lab.old_store.objects(f"{lab.volume.name}/"), lab.new_store.objects(f"{lab.volume.name}/")
    assert {key: size for key, (size, _) in new.items()} == {
        key: size for key, (size, _) in old.items() if "/testing/" not in key
    }
    reads = lab.old_store.requests()["GET", "200"] + lab.old_store.requests()["GET", "206"]
    with lab.fresh_mount() as mount:
        for check, files in (
            (lab.check(seeded, mount, "seed"), 30),
            (lab.check(writer.manifest, mount, writer.folder.name), 1),
        ):
            assert check.lost == 0, (check.missing, check.corrupt)
            assert check.files >= files
    after = lab.old_store.requests()["GET", "200"] + lab.old_store.requests()["GET", "206"]
    assert after - reads >= 30, "what was read came from the store"
    assert lab.mounts() == Lab.load(lab.state).mounts(), "the fresh mount is gone"


def test_a_store_refuses_and_allows_writes_while_it_runs(lab: Lab) -> None:
    store = lab.new_store
    store.client().put_object(Bucket=store.bucket, Key="test/readable", Body=b"x")
    pid = store.server()
    refused = store.client().exceptions.ClientError
    store.refuse_writes()
    try:
        with pytest.raises(refused, match="AccessDenied"):
            store.client().put_object(Bucket=store.bucket, Key="test/refused", Body=b"x")
        with pytest.raises(refused, match="AccessDenied"):
            store.client().delete_object(Bucket=store.bucket, Key="test/readable")
        assert store.client().get_object(Bucket=store.bucket, Key="test/readable")["Body"].read() == b"x"
    finally:
        store.allow_writes()
    store.client().delete_object(Bucket=store.bucket, Key="test/readable")
    assert store.objects("test/") == {}
    assert store.server() == pid, "it was not restarted"


def test_a_key_that_is_taken_back_is_refused(lab: Lab) -> None:
    """A server that reads its identities again keeps one whose name is gone."""
    other = lab.old_store.with_keys("ANOTHERKEYANOTHER001", "another-secret")
    lab.old_store.take_only(lab.old_store, other)
    assert other.objects("none/") == {}
    lab.old_store.take_only(lab.old_store)
    with pytest.raises(other.client().exceptions.ClientError, match="InvalidAccessKeyId"):
        other.objects("none/")


def test_changes_are_counted_at_the_stores_and_at_the_database(lab: Lab) -> None:
    store, mariadb = lab.new_store, lab.mariadb
    before = store.mutating_requests()
    store.client().head_bucket(Bucket=store.bucket)
    store.objects()
    assert store.mutating_requests() == before
    store.client().put_object(Bucket=store.bucket, Key="test/counted", Body=b"x")
    store.client().delete_object(Bucket=store.bucket, Key="test/counted")
    assert store.mutating_requests() == before + 2

    mariadb.start_general_log()
    mariadb.query("SELECT value FROM jfs_setting")
    mariadb.query("UPDATE jfs_setting SET value = value WHERE name = %s", ("no such row",))
    mariadb.stop_general_log()
    mariadb.query("UPDATE jfs_setting SET value = value WHERE name = %s", ("after the log",))
    executed = [statement for statement in mariadb.general_log_statements() if "jfs_setting" in statement]
    assert "SELECT value FROM jfs_setting" in executed
    assert [statement for statement in mutating(executed) if "value = value" in statement] == [
        "UPDATE jfs_setting SET value = value WHERE name = 'no such row'"
    ]


def test_a_stopped_store_comes_back_with_its_data(lab: Lab) -> None:
    store = lab.new_store
    store.client().put_object(Bucket=store.bucket, Key="test/stays", Body=b"x")
    store.stop()
    assert ("new store", "stopped", store.bucket_url) in lab.status()
    store.start()
    assert set(store.objects("test/")) == {"test/stays"}
    store.client().delete_object(Bucket=store.bucket, Key="test/stays")


def test_a_failed_write_is_recorded_and_not_counted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0000").write_text("in the way of the writer's folder")
    script = ["-m", "lab.writer", f"--dir={tmp_path / 'data'}", f"--manifest={tmp_path / 'm'}", "--files=3"]
    subprocess.run([sys.executable, *script, "--rate=0"], cwd=PROJECT, check=True)
    summary = summarize(tmp_path / "m")
    assert summary.written == 0
    assert [error["path"] for error in summary.write_errors] == [
        "0000/000001.bin",
        "0000/000002.bin",
        "0000/000003.bin",
    ]
    assert check_manifest(tmp_path / "m", tmp_path / "data").files == 0


def test_after_a_crash_down_leaves_no_process_and_no_mount(tmp_path: Path) -> None:
    state = tmp_path / "lab"
    started = subprocess.Popen([sys.executable, "-m", "lab", f"--state={state}", "up"], cwd=PROJECT)
    assert started.wait(timeout=120) == 0
    lab = Lab.load(state)
    writer = Writer.start(state, lab.mounts()[0] / "app", rate=20)
    family = _below(state)
    mariadb = lab.mariadb.server()
    assert mariadb
    assert family
    os.kill(mariadb.pid, signal.SIGKILL)
    os.kill(lab.kube.pid, signal.SIGKILL)
    for _ in range(2):  # the second time there is nothing to do
        subprocess.run([sys.executable, "-m", "lab", f"--state={state}", "down"], cwd=PROJECT, check=True)
    assert _below(state) == []
    assert str(state) not in Path("/proc/self/mountinfo").read_text()
    assert not state.exists()
    assert not writer.alive()
    assert [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children start with SIGINT as a terminal has it; a background job ignores it, and so would they."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_while_starting_it_leaves_nothing(tmp_path: Path) -> None:
    state = tmp_path / "lab"
    starting = subprocess.Popen([sys.executable, "-m", "lab", f"--state={state}", "up"], cwd=PROJECT)
    wait_for("servers are starting", lambda: len(Server.load_all(state)) >= 2, deadline_s=30)
    starting.send_signal(signal.SIGINT)
    assert starting.wait(timeout=120) == 130
    assert _below(state) == []
    assert str(state) not in Path("/proc/self/mountinfo").read_text()


def test_a_folder_in_use_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match="in use"):
        Lab.up(lab.state)
    assert {state for _, state, _ in lab.status()} == {"running"}


def test_down_does_not_remove_a_folder_that_is_no_lab(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    subprocess.run([sys.executable, "-m", "lab", f"--state={tmp_path}", "down"], cwd=PROJECT, check=True)
    assert (tmp_path / "precious").read_text() == "mine"


def test_what_the_machine_lacks_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(LabUnavailableError, match="expected root") as error:
        Lab.up(tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_pid_that_was_reused_is_never_stopped(tmp_path: Path) -> None:
    sleeper = Server.start(tmp_path, "sleeper", ["sleep", "60"])
    try:
        stranger = Server(sleeper.name, sleeper.pid, sleeper.created - 100, sleeper.log)
        assert not stranger.alive()
        stranger.stop()
        assert sleeper.alive()
    finally:
        sleeper.stop()
    assert not sleeper.alive()


def _below(state: Path) -> list[psutil.Process]:
    """Processes that have the folder in their command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        cmdline = " ".join(process.info["cmdline"] or [])
        if str(state) in cmdline and process.pid != os.getpid():
            found.append(process)
    return found

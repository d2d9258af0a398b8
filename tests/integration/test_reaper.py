"""A session of tests that is killed leaves no process and no mount behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from lab.process import wait_for
from tests.support.reaper import MARK, PROJECT

#: A session that starts a server as the lab does, says its pid, and hangs.
SESSION = """
import sys, time
from pathlib import Path
from lab.process import Server
from tests.support import reaper

folder = Path(sys.argv[1])
reaper.watch(folder)
print(Server.start(folder, "sleeper", ["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""


def test_a_session_that_is_killed_leaves_nothing_running(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    session = subprocess.Popen(
        [sys.executable, "-c", SESSION, tmp_path],
        cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert session.stdout
    sleeper = psutil.Process(int(session.stdout.readline()))
    stranger = subprocess.Popen(["sleep", "600"], env=environment)
    try:
        session.send_signal(signal.SIGKILL)
        session.wait()
        wait_for("the server is ended", lambda: ended(sleeper), deadline_s=30)
        assert stranger.poll() is None, "not of that session"
    finally:
        stranger.kill()
        stranger.wait()
        session.stdout.close()


def ended(process: psutil.Process) -> bool:
    """Whether a process has ended; nobody may have waited for it yet."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True

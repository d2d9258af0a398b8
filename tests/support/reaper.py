"""End what a session of tests started and left running, however the session ended: failed, interrupted or killed.

Every process below the session inherits an environment variable of its own value. A second process waits for the
session's end and ends whatever still has that variable, servers that were started detached among it.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from pathlib import Path

import psutil

from lab.kube.client import unmount_below

MARK = "JUICEFS_TEST_SESSION"
PROJECT = Path(__file__).resolve().parents[2]
#: What ends with the session itself, such as multiprocessing's servers, has this long to do so, in seconds.
GRACE_S = 3.0
#: To end in order: the cluster stops its pods, a database writes its pages.
TERMINATE_S = 15.0


def watch(folder: Path) -> None:
    """Mark the session's processes; end them when it has ended, and unmount what is mounted below its folder.

    Args:
        folder: The session's temporary folder.
    """
    session = uuid.uuid4().hex
    # Nothing is written to the pipe: it closes when this process is gone. A session of its own: Ctrl-C ends the tests.
    subprocess.Popen(
        [sys.executable, "-m", "tests.support.reaper", session, str(folder)],
        cwd=PROJECT, stdin=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    os.environ[MARK] = session


def of_session(session: str) -> list[psutil.Process]:
    """Return the processes that run with the mark of a session."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == session:
                found.append(process)
    return found


def reap(session: str, folder: Path) -> list[str]:
    """End the processes of a session and unmount below its folder; returns the names of what still ran."""
    psutil.wait_procs(of_session(session), timeout=GRACE_S)
    left = of_session(session)
    names = sorted(name_of(process) for process in left)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    psutil.wait_procs(left, timeout=TERMINATE_S)
    for process in of_session(session):
        with contextlib.suppress(psutil.Error):
            process.kill()
    unmount_below(folder)
    return names


def name_of(process: psutil.Process) -> str:
    """Return a process's name; `?` where it has just ended."""
    try:
        return process.name()
    except psutil.Error:
        return "?"


def main(session: str, folder: str) -> None:
    """Wait for the session's end; then end what it left."""
    sys.stdin.read()
    names = reap(session, Path(folder))
    if names:
        print(f"Left running by the tests and ended now: {', '.join(names)}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A record of the processes that the stand-in starts, so that a crash of it leaves none running."""

import contextlib
import json
import time
from pathlib import Path

import psutil

from lab.kube.store import Obj


def record_process(state: Path, pid: int) -> None:
    """Record a process for `kill_recorded`, so that a crash of this one leaves nothing running."""
    with contextlib.suppress(psutil.NoSuchProcess), (state / "processes.jsonl").open("a") as file:
        file.write(json.dumps({"pid": pid, "create_time": psutil.Process(pid).create_time()}) + "\n")


def kill_recorded(state: Path, *, deadline_s: float = 10.0) -> None:
    """Kill what is left of the recorded processes, never another process with a reused pid."""
    path = state / "processes.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    deadline = time.monotonic() + deadline_s
    while (left := [p for p in map(_same_process, records) if p]) and time.monotonic() < deadline:
        for process in left:
            # The end of `unshare` ends PID 1 of its namespace, and with it everything inside.
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.05)


def _same_process(record: Obj) -> psutil.Process | None:
    try:
        process = psutil.Process(record["pid"])
        same = process.create_time() == record["create_time"] and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return None
    return process if same else None

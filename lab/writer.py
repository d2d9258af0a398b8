"""A business application: writes files into a mount and keeps a manifest of what was acknowledged.

`python -m lab.writer --dir D --manifest FILE [--rate N]`, until SIGTERM or `--files`. With `--follow` it is a peer on
another mount: it reads, and in part deletes, what writers have handed over.
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
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.process import Server, wait_for

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_FILE_BYTES = 6 * 1024 * 1024
#: What a read says that found other bytes than were acknowledged.
OTHER_CONTENT = "other content than acknowledged"
# A block that is lost costs its reader seconds of retries.
_PARALLEL_READS = 32
_PROJECT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Summary:
    """What manifests say. Errors carry `at` (Unix time; of a read: when it began), `path`, and what happened."""

    written: int = 0
    written_bytes: int = 0
    deleted: int = 0
    read: int = 0
    write_errors: list[dict[str, Any]] = field(default_factory=list)
    read_errors: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """A mount compared with manifests. All lists name files, relative to the folder.

    Attributes:
        files: How many had to be there.
        bytes: How many bytes were read back.
        missing: Had to be there and are not.
        corrupt: Cannot be read, or hold what was never written to them.
        unexpected: Are there, though their deletion was acknowledged or nobody wrote them.
        unacknowledged: How many were looked at about which nothing was promised.
    """

    files: int
    bytes: int
    missing: list[str]
    corrupt: list[str]
    unexpected: list[str] = field(default_factory=list)
    unacknowledged: int = 0

    @property
    def lost(self) -> int:
        """How many files cannot be read back as they were written."""
        return len(self.missing) + len(self.corrupt)


@dataclass(frozen=True)
class Writer:
    """A writer process of its own, or a peer of writers."""

    state: Path
    name: str
    folder: Path
    manifest: Path

    @classmethod
    def start(
        cls,
        state: Path,
        folder: Path,
        *,
        name: str = "writer",
        rate: float = 5.0,
        keep: int = 0,
        subfolder: str = "",
        wait: bool = True,
    ) -> "Writer":
        """Start writing into the folder of a mount.

        Args:
            state: the lab's folder; the manifest is `<state>/<name>.manifest.jsonl`.
            folder: created where it is missing.
            name: one writer each.
            rate: files a second, as an upper bound.
            keep: how many files it keeps changing; of more, it hands over to peers what was written longest ago.
                0: all.
            subfolder: of the folder, where several writers share one.
            wait: for the first acknowledged file; not where the store does not serve yet.
        """
        writer = cls(state, name, folder, state / f"{name}.manifest.jsonl")
        server = writer._run(rate, [f"--keep={keep}", f"--subfolder={subfolder}"])
        if wait:
            wait_for("the writer's first file", lambda: writer.summary().written > 0, deadline_s=60, server=server)
        return writer

    @classmethod
    def follow(cls, state: Path, folder: Path, *, name: str, of: "Sequence[Writer]", rate: float) -> "Writer":
        """Start a peer: it reads each file that these writers hand over, and deletes a part of them.

        Args:
            state: as for a writer.
            folder: the writers' folder, in another mount.
            name: one peer each.
            of: the writers; no two peers follow the same one.
            rate: files a second, as an upper bound.
        """
        peer = cls(state, name, folder, state / f"{name}.manifest.jsonl")
        peer._run(rate, [f"--follow={writer.manifest}" for writer in of])
        return peer

    def _run(self, rate: float, more: list[str]) -> Server:
        argv = [sys.executable, "-m", "lab.writer", f"--dir={self.folder}", f"--manifest={self.manifest}"]
        # No two write the same bytes: one's block would do for another's.
        argv += [f"--rate={rate}", f"--seed={zlib.crc32(self.name.encode())}", *more]
        return Server.start(self.state, self.name, argv, cwd=_PROJECT)

    def alive(self) -> bool:
        """Return whether it still writes."""
        server = Server.load(self.state, self.name)
        return bool(server and server.alive())

    def stop(self, *, deadline_s: float = 60.0) -> Summary:
        """Let it finish the file at hand and end; killed after the deadline. Idempotent."""
        if server := Server.load(self.state, self.name):
            server.stop(deadline_s=deadline_s)
        return self.summary()

    def summary(self, *, since: float = 0.0, until: float = float("inf")) -> Summary:
        """Return what the manifest says of the time between two Unix times."""
        return summarize(self.manifest, since=since, until=until)


def summarize(*manifests: Path, since: float = 0.0, until: float = float("inf")) -> Summary:
    """Count the manifests' records of the time between two Unix times."""
    found = [record for manifest in manifests for record in records(manifest) if since <= record["at"] <= until]
    return Summary(
        written=sum(record["op"] == "ack" for record in found),
        written_bytes=sum(record["bytes"] for record in found if record["op"] == "ack"),
        deleted=sum(record["op"] == "deleted" for record in found),
        read=sum(record["op"] == "read" for record in found),
        write_errors=[record for record in found if record["op"] == "failed"],
        read_errors=[record for record in found if record["op"] == "read_failed"],
    )


def records(manifest: Path) -> Iterator[dict[str, Any]]:
    """Yield a manifest's records in their order: `at`, `op`, `path` and what belongs to the operation."""
    if not manifest.exists():
        return
    with manifest.open() as lines:
        for line in lines:
            if line.endswith("\n"):  # the last one may be half written
                yield json.loads(line)


@dataclass(frozen=True)
class _Fate:
    """What may be found under a path.

    Attributes:
        promised: Size and SHA-256 as acknowledged last; None: nothing, or its deletion.
        begun: The record of a change that was begun after that and never acknowledged.
    """

    promised: tuple[int, str] | None
    begun: Mapping[str, Any] | None = None

    @property
    def required(self) -> bool:
        """Whether the file must be there: only a deletion removes one."""
        return self.promised is not None and (self.begun is None or self.begun["kind"] != "delete")

    @property
    def acknowledged(self) -> bool:
        """Whether a promise holds, for all of the file or for its beginning."""
        return self.promised is not None and (self.begun is None or self.begun["kind"] == "append")

    def allows(self, content: bytes) -> bool:
        """Return whether this is what was acknowledged, or what a change that was not acknowledged may have left."""
        size, sha256 = self.promised or (0, hashlib.sha256().hexdigest())
        same = hashlib.sha256(content[:size]).hexdigest() == sha256
        match self.begun["kind"] if self.begun else None:
            case None | "delete":
                return same and len(content) == size
            case "append":
                return same and self._written_in_part(content[size:])
            case _:
                return (same and len(content) == size) or self._written_in_part(content)

    def _written_in_part(self, content: bytes) -> bool:
        """Return each byte as it was being written, or zero.

        Where a slice could not be uploaded and a later one of the same write could, JuiceFS leaves a hole (pkg/vfs/
        writer.go, commitThread: it continues with the next slice).
        """
        written = _content(self.begun["seed"], self.begun["bytes"]) if self.begun else b""
        return written.startswith(content) or (
            len(content) <= len(written) and all(found in {0, byte} for found, byte in zip(content, written))  # noqa: B905
        )


def check_manifest(manifest: Path, folder: Path, *more: Path) -> Check:
    """Read back every file that the manifests name and compare it, size and SHA-256; look for files that none names.

    A change that was begun and never acknowledged (an error, a killed writer) may have happened or not: what is found
    must be the content before or a part of what was being written.

    Args:
        manifest: of a writer.
        folder: that of the writer, in a mount.
        more: of others that work in the folder; those of peers after those of the writers that they follow.
    """
    fates = _fates(manifest, *more)
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    looked_at = [path for path, fate in fates.items() if fate.required or path in found]
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        results = list(pool.map(lambda path: _look(folder / path, fates[path]), looked_at))
    return Check(
        files=sum(fate.acknowledged for fate in fates.values()),
        bytes=sum(size for size, _ in results),
        missing=[path for path, (_, problem) in zip(looked_at, results, strict=True) if problem == _MISSING],
        corrupt=[
            f"{path}: {problem}"
            for path, (_, problem) in zip(looked_at, results, strict=True)
            if problem and problem != _MISSING
        ],
        unexpected=sorted(found - {path for path, fate in fates.items() if fate.promised or fate.begun}),
        unacknowledged=sum(fates[path].begun is not None for path in looked_at),
    )


_MISSING = "missing"


def _fates(*manifests: Path) -> dict[str, _Fate]:
    fates: dict[str, _Fate] = {}
    for record in (record for manifest in manifests for record in records(manifest)):
        path = record["path"]
        match record["op"]:
            case "begin":
                fates[path] = _Fate(fates[path].promised if path in fates else None, record)
            case "ack":
                fates[path] = _Fate((record["size"], record["sha256"]))
            case "deleted":
                fates[path] = _Fate(None)
    return fates


def _look(file: Path, fate: _Fate) -> tuple[int, str]:
    """Read a file back; return how many bytes, and what is wrong; the empty string: nothing."""
    if not fate.promised and not fate.begun:
        return 0, ""  # deleted: that it is there is said elsewhere
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return 0, _MISSING if fate.required else ""
    except OSError as error:
        return 0, error.strerror or str(error)
    return len(content), "" if fate.allows(content) else OTHER_CONTENT


def _content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311


class _Journal:
    """The manifest, and what writers and peers do alike."""

    def __init__(self, folder: Path, manifest: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)  # noqa: S311
        self.log = os.open(manifest, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def delete(self, path: str) -> None:
        """Delete a file that is acknowledged."""
        self.record(op="begin", kind="delete", path=path)
        try:
            (self.folder / path).unlink()
        except OSError as error:
            self.record(op="failed", kind="delete", path=path, error=error.strerror)
            return
        self.record(op="deleted", path=path)

    def read(self, path: str, size: int, sha256: str) -> None:
        """Read a file and compare it with what was acknowledged."""
        at = time.time()
        try:
            content = (self.folder / path).read_bytes()
        except OSError as error:
            self.record(at=at, op="read_failed", path=path, error=error.strerror)
            return
        if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
            self.record(at=at, op="read_failed", path=path, error=OTHER_CONTENT)
            return
        self.record(at=at, op="read", path=path)

    def record(self, **record: object) -> None:
        """Write a line, and be sure that it is on the disk."""
        os.write(self.log, json.dumps({"at": time.time(), **record}).encode() + b"\n")
        os.fsync(self.log)


class _Application(_Journal):
    """The writing itself."""

    def __init__(self, folder: Path, manifest: Path, seed: int, *, keep: int = 0, subfolder: str = "") -> None:
        super().__init__(folder, manifest, seed)
        self.keep, self.subfolder = keep, subfolder
        self.files: dict[str, tuple[int, _Hash]] = {}
        self.count = 0

    def create(self) -> None:
        """Write one new file."""
        self.count += 1
        self._write(str(Path(self.subfolder, f"{self.count // 100:04d}/{self.count:06d}.bin")), "create")

    def step(self) -> None:
        """Write, append to, overwrite or delete one file; now and then read an earlier one back."""
        draw = self.random.random()
        if self.files and draw < 0.08:
            path = self._any_file()
            del self.files[path]
            self.delete(path)
        elif self.files and draw < 0.16:
            self._write(self._any_file(), "append")
        elif self.files and draw < 0.24:
            self._write(self._any_file(), "overwrite")
        else:
            self.create()
        if self.files and self.random.random() < 0.5:
            path = self._any_file()
            size, digest = self.files[path]
            self.read(path, size, digest.hexdigest())
        while self.keep and len(self.files) > self.keep:
            path, (size, digest) = next(iter(self.files.items()))
            del self.files[path]
            self.record(op="handed over", path=path, size=size, sha256=digest.hexdigest())

    def _any_file(self) -> str:
        return self.random.choice(list(self.files))

    def _size(self) -> int:
        # As in most volumes: many small files, a few of more than one block.
        if self.random.random() < 0.9:
            return int(2 ** self.random.uniform(0, 17))
        return self.random.randint(1, MAX_FILE_BYTES)

    def _write(self, path: str, kind: str) -> None:
        seed = self.random.getrandbits(64)
        content = _content(seed, self._size())
        size, digest = self.files.pop(path) if kind == "append" else (0, hashlib.sha256())
        self.files.pop(path, None)
        self.record(op="begin", kind=kind, path=path, seed=seed, bytes=len(content))
        target = self.folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab" if kind == "append" else "wb", buffering=0) as file:
                view = memoryview(content)
                while view:
                    view = view[file.write(view) or 0 :]
                os.fsync(file.fileno())
        except OSError as error:
            # Not retried under this name: nothing is promised about it any more.
            self.record(op="failed", kind=kind, path=path, error=error.strerror)
            return
        digest = digest.copy()
        digest.update(content)
        size += len(content)
        self.files[path] = (size, digest)
        self.record(op="ack", path=path, size=size, sha256=digest.hexdigest(), bytes=len(content))


class _Peer(_Journal):
    """Reads what writers have handed over, through another mount, and deletes a part of it."""

    def __init__(self, folder: Path, manifest: Path, seed: int, followed: Sequence[Path]) -> None:
        super().__init__(folder, manifest, seed)
        self.handed = [_handed_over(path) for path in followed]
        self.files: dict[str, tuple[int, str]] = {}

    def step(self) -> None:
        """Read one file that was handed over, and delete a third of them; else read an earlier one again."""
        if new := next(filter(None, map(next, self.handed)), None):
            self.read(new["path"], new["size"], new["sha256"])
            if self.random.random() < 1 / 3:
                self.delete(new["path"])
            else:
                self.files[new["path"]] = (new["size"], new["sha256"])
        elif self.files:
            path = self.random.choice(list(self.files))
            self.read(path, *self.files[path])


def _handed_over(manifest: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the files that a writer hands over while it writes; None: no other yet."""
    with manifest.open() as lines:
        half = ""
        while True:
            half += lines.readline()
            if not half.endswith("\n"):
                yield None
                continue
            record, half = json.loads(half), ""
            if record["op"] == "handed over":
                yield record


def seed_files(folder: Path, manifest: Path, files: int) -> None:
    """Write so many new files, as fast as it goes."""
    application = _Application(folder, manifest, seed=1)
    for _ in range(files):
        application.create()


def work(worker: _Application | _Peer, *, files: int | None, rate: float) -> None:
    """Take steps until there were `files` of them or SIGTERM comes.

    Args:
        worker: writes, appends, overwrites, deletes and reads.
        files: how many steps; None: no end.
        rate: steps a second as an upper bound; 0: as fast as it goes.
    """
    done = 0
    while not _stop_asked.is_set() and (files is None or done < files):
        due = time.monotonic() + (1 / rate if rate else 0)
        worker.step()
        done += 1
        _stop_asked.wait(max(0.0, due - time.monotonic()))


_stop_asked = threading.Event()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m lab.writer", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="a folder of a mount")
    parser.add_argument("--manifest", type=Path, required=True, help="JSON lines of what was acknowledged")
    parser.add_argument("--rate", type=float, default=5.0, help="files a second at most (default 5; 0: no limit)")
    parser.add_argument("--files", type=int, help="stop after so many (default: never)")
    parser.add_argument("--seed", type=int, default=0, help="of contents and sizes (default 0)")
    parser.add_argument("--keep", type=int, default=0, help="files that are not handed over (default 0: all)")
    parser.add_argument("--subfolder", default="", help="of the folder, where several writers share one")
    parser.add_argument("--follow", type=Path, action="append", help="be a peer of the writer with this manifest")
    given = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _stop_asked.set())
    worker: _Application | _Peer
    if given.follow:
        worker = _Peer(given.dir, given.manifest, given.seed, given.follow)
    else:
        worker = _Application(given.dir, given.manifest, given.seed, keep=given.keep, subfolder=given.subfolder)
    work(worker, files=given.files, rate=given.rate)


if __name__ == "__main__":
    main()

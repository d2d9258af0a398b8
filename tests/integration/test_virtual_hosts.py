"""A store that takes the bucket in the host's name alone: the real juicefs and our client ask for the same objects.

No name but those of the machine resolves in a test. juicefs is therefore given the store as its HTTP proxy: a server of
Go's takes such a request for its own, with the Host that was signed. For our client, which uses no proxy, the names are
resolved by the test.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from include.juicefs_storage.adapters.juicefs_command import on_worker
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.setting import StorageConfig
from lab.process import binary, run
from tests.support import s3_servers

_KEYS = s3_servers.ACCESS_KEY, s3_servers.SECRET_KEY
#: Of the clients: in the Secret's `envs`.
_VIRTUAL = {"JFS_S3_VHOST_STYLE": "1"}


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """An S3 server that takes the first label of the host for the bucket, and the path for the key."""
    with s3_servers.rclone(tmp_path_factory.mktemp("virtual"), "data", "--force-path-style=false") as store:
        yield int(store.endpoint.rpartition(":")[2])


@pytest.fixture(autouse=True)
def _resolved(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def everywhere(host: str, *args: Any, **more: Any) -> Any:
        return resolve("127.0.0.1" if host.endswith("s3.test") else host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", everywhere)
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("PATH", f"{Path(binary('juicefs')).parent}:/usr/bin:/bin")


def config_of(storage: str, url: str) -> StorageConfig:
    return StorageConfig(storage, url, SecretStr(_KEYS[0]), SecretStr(_KEYS[1]))


@pytest.mark.parametrize(
    ("storage", "url"),
    [("s3", "http://s3.test:{}/data"), ("s3", "http://data.s3.test:{}"), ("minio", "http://s3.test:{}/data")],
)
def test_a_store_is_addressed_as_juicefs_addresses_it(port: int, tmp_path: Path, storage: str, url: str) -> None:
    config, name = config_of(storage, url.format(port)), f"volume-{abs(hash(url + storage))}"
    command = ["format", f"--storage={storage}", f"--bucket={config.bucket}", f"sqlite3://{tmp_path}/meta.db", name]
    run([binary("juicefs"), *command], env={"ACCESS_KEY": _KEYS[0], "SECRET_KEY": _KEYS[1]} | _VIRTUAL)
    written = S3Bucket.from_storage(config, environment=_VIRTUAL)
    assert written.read(f"{name}/juicefs_uuid")
    written.probe(f"{name}/probe")
    assert [item.key for item in written.list(f"{name}/")] == [f"{name}/juicefs_uuid"]
    # As a connection says it.
    by_connection = S3Bucket(S3Store(f"http://s3.test:{port}", "data", "", *_KEYS, virtual_host=True))
    assert by_connection.read(f"{name}/juicefs_uuid") == written.read(f"{name}/juicefs_uuid")
    # In the path, this store finds no bucket.
    with pytest.raises(PermanentError):
        S3Bucket.from_storage(config).check()


def test_a_dry_run_has_juicefs_address_the_store_as_the_clients_do(port: int) -> None:
    """JFS_S3_VHOST_STYLE of the Secret's `envs` reaches the place where juicefs runs."""
    config, metaurl = config_of("s3", f"http://s3.test:{port}/data"), Metaurl.parse("mysql://u:p@(127.0.0.1:1)/none")
    assert on_worker(metaurl, _VIRTUAL).try_storage(config, "myjfs") == ""
    assert on_worker(metaurl).try_storage(config, "myjfs")

"""Metadata URLs that juicefs takes: the same volume is read by them, and no password becomes an argument."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from include.juicefs_storage.adapters.juicefs_command import JuiceFSCommand, on_worker
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.errors import PermanentError, StillAwayError
from include.juicefs_storage.ports import ExecResult
from include.juicefs_storage.volume.metaurl import Metaurl
from lab.mariadb import MariaDB
from lab.process import binary

#: Account, its password, and both as the URL has them.
ACCOUNTS = [
    ("plain", "word", "plain:word"),
    ("guide", "p@ss/word", "guide:p%40ss%2Fword"),
    ("raw", "p@ss", "raw:p@ss"),
    ("odd", "a|b%40c", "odd:a|b%40c"),
    ("bracket", "x[1]%20y", "bracket:x[1]%20y"),
    ("percent", "100%zz", "percent:100%zz"),
    ("svc@corp", "s3cr3t", "svc@corp:s3cr3t"),
    ("slash", "a/b", "slash:a/b"),
    ("plus", "a+b=&'\"\\$", "plus:a+b=&'\"\\$"),
]


@pytest.fixture(scope="module")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """Two volumes of one name in one database: one of them has a table prefix."""
    state = tmp_path_factory.mktemp("metaurl")
    server = MariaDB.start(state)
    for user, password, _ in ACCOUNTS:
        server.add_user(user, password)
    for options in ("", "?table_prefix=stag"):
        bucket = state / f"bucket{len(options)}"
        url = f"{server.meta_url_with_password}{options}"
        command = ["format", "--storage", "file", "--bucket", str(bucket), url, "myjfs"]
        subprocess.run([binary("juicefs"), *command], check=True, capture_output=True)
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def juicefs_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(binary("juicefs")).parent), prepend=":")


def recording(metaurl: Metaurl) -> tuple[JuiceFSCommand, list[str]]:
    """The juicefs of this machine, and the arguments that it is run with."""
    arguments: list[str] = []
    real = on_worker(metaurl)

    def run(command: Sequence[str], stdin: str, timeout_s: float) -> ExecResult:
        arguments.extend(command)
        return real.run(command, stdin, timeout_s)

    return JuiceFSCommand(run, real.binary, metaurl, dict), arguments


@pytest.mark.parametrize(("user", "password", "written"), ACCOUNTS, ids=[user for user, *_ in ACCOUNTS])
def test_what_juicefs_can_use_this_project_can(mariadb: MariaDB, user: str, password: str, written: str) -> None:
    url = f"mysql://{written}@({mariadb.host}:{mariadb.port})/jfs"
    assert subprocess.run([binary("juicefs"), "status", url], capture_output=True, check=False).returncode == 0
    metaurl = Metaurl.parse(url)
    assert (metaurl.user, metaurl.password.get_secret_value()) == (user, password)
    uuid = MySqlMetadata.from_metaurl(metaurl).read_setting().uuid
    juicefs, arguments = recording(metaurl)
    assert juicefs.status()["Setting"]["UUID"] == uuid
    assert [argument for argument in arguments if password in argument and len(password) > 3] == []


def test_a_password_from_the_secrets_variables(mariadb: MariaDB) -> None:
    url, variables = f"mysql://guide@({mariadb.host}:{mariadb.port})/jfs", {"META_PASSWORD": "p@ss/word"}
    metaurl = Metaurl.parse(url, variables)
    uuid = MySqlMetadata.from_metaurl(metaurl).read_setting().uuid
    assert on_worker(metaurl).status()["Setting"]["UUID"] == uuid


def test_volumes_of_one_name_in_one_database_are_distinguished(mariadb: MariaDB) -> None:
    urls = [f"{mariadb.meta_url_with_password}{options}" for options in ("", "?table_prefix=stag")]
    own, staging = (MySqlMetadata.from_metaurl(Metaurl.parse(url)) for url in urls)
    before = own.read_setting()
    other = staging.read_setting()
    assert before.uuid != other.uuid
    assert [on_worker(Metaurl.parse(url)).status()["Setting"]["UUID"] for url in urls] == [before.uuid, other.uuid]
    assert staging.next_slice() > 0
    assert not staging.replace_setting(before, other)
    assert own.read_setting().raw == before.raw


def test_a_wrong_password_shows_before_anything_is_planned(mariadb: MariaDB) -> None:
    metaurl = Metaurl.parse(f"mysql://plain:not-the-w0rd@({mariadb.host}:{mariadb.port})/jfs")
    with pytest.raises(PermanentError, match="1045") as refused:
        on_worker(metaurl).status()
    assert "not-the-w0rd" not in str(refused.value)


def test_a_unix_socket_is_refused_by_name() -> None:
    with pytest.raises(PermanentError, match="Unix socket"):
        MySqlMetadata.from_metaurl(Metaurl.parse("mysql://u:p@unix(/run/mysqld/mysqld.sock)/jfs"))


def test_a_server_without_the_tls_that_the_url_asks_for_is_not_used(
    mariadb: MariaDB, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("include.juicefs_storage.adapters.mysql._READ_FOR_S", 0.5)
    for tls in ("skip-verify", "true"):
        with pytest.raises((PermanentError, StillAwayError), match=r"SSL|not encrypted"):
            MySqlMetadata.from_metaurl(Metaurl.parse(f"{mariadb.meta_url_with_password}?tls={tls}")).read_setting()
    MySqlMetadata.from_metaurl(Metaurl.parse(f"{mariadb.meta_url_with_password}?tls=preferred")).read_setting()

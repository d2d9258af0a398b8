"""Stores that refuse, reset, hang or are slow, and a database that is away: each call ends in time and says what."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
from pydantic import SecretStr

from include.juicefs_storage.adapters import mysql
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import PROMPT
from include.juicefs_storage.errors import PermanentError, StillAwayError, StorageSwitchError, TransientError
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from lab.keys import random_part
from lab.mariadb import MariaDB

READ_TIMEOUT_S, TOTAL_S, DATABASE_TIMEOUT_S, READ_FOR_S = 0.4, 3, 1, 2


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Fails where the block took longer."""
    start = time.monotonic()
    yield
    took_s = time.monotonic() - start
    assert took_s < seconds, f"took {took_s:.1f} s"


# The stores.


class FaultyStore(ThreadingHTTPServer):
    """Answers every request as `behaviour` says: a status, `reset`, `hang`, `slow`, or `cut` in mid-answer."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behaviour: list[str] = []
        self.requests = 0
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FaultyStore

    def answer(self) -> None:
        store = self.server
        store.requests += 1
        behaviour = store.behaviour.pop(0) if len(store.behaviour) > 1 else store.behaviour[0]
        if behaviour == "reset":
            # Closing with data in flight and no linger sends RST.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if behaviour == "hang":
            store.over.wait(60)
            return
        if behaviour == "slow":
            store.over.wait(READ_TIMEOUT_S / 2)
        body = b"" if self.command == "HEAD" else b"<Error><Code>SlowDown</Code></Error>"
        status = 200 if behaviour in {"slow", "cut", "ok"} else int(behaviour)
        if status == 200:
            body = b"" if self.command == "HEAD" else b"content"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"9a0364b9e99bb480dd25e1f0284c8555"')
        self.end_headers()
        self.wfile.write(body[:3] if behaviour == "cut" else body)
        if behaviour == "cut":
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = answer  # noqa: N815  http.server's names

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[FaultyStore]:
    server = FaultyStore()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Shorter limits than those of a real run; their number and order stay."""
    limits = replace(PROMPT, connect_s=READ_TIMEOUT_S, idle_s=READ_TIMEOUT_S, total_s=TOTAL_S)
    monkeypatch.setattr("include.juicefs_storage.adapters.s3.bucket.PROMPT", limits)
    monkeypatch.setattr(mysql, "_TIMEOUTS", dict.fromkeys(mysql._TIMEOUTS, DATABASE_TIMEOUT_S))
    monkeypatch.setattr(mysql, "_READ_FOR_S", READ_FOR_S)
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))


@pytest.fixture(params=["setting", "connection"])
def bucket(
    request: pytest.FixtureRequest, store: FaultyStore, quick: None, monkeypatch: pytest.MonkeyPatch
) -> S3Bucket:
    """The store as the volume's setting describes it, and as an Airflow connection does."""
    if request.param == "setting":
        return S3Bucket.from_storage(
            StorageConfig("minio", f"{store.url}/data", SecretStr("key"), SecretStr("secret-value"))
        )
    extra = {
        "endpoint_url": store.url,
        "region_name": "us-east-1",
        "config_kwargs": {"s3": {"addressing_style": "path"}},
    }
    connection = {"conn_type": "aws", "login": "key", "password": "secret-value", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_FAULTY", json.dumps(connection))
    return S3Bucket.from_connection("faulty", "data")


@pytest.mark.parametrize("behaviour", ["503", "500", "reset", "hang"])
def test_a_store_that_never_works_ends_in_time_and_is_named(
    store: FaultyStore, bucket: S3Bucket, behaviour: str
) -> None:
    store.behaviour = [behaviour]
    for call in (bucket.check, lambda: list(bucket.list(""))):
        before = store.requests
        with limit(3 * READ_TIMEOUT_S + 6), pytest.raises(TransientError, match=store.url):
            call()
        assert store.requests - before == PROMPT.tries


def test_the_probe_of_a_store_that_hangs_ends_in_time(store: FaultyStore, bucket: S3Bucket) -> None:
    store.behaviour = ["hang"]
    with limit(3 * READ_TIMEOUT_S + 6), pytest.raises(TransientError, match=r"data/ at .* PUT: no answer in time"):
        bucket.probe("probe")


@pytest.mark.parametrize("behaviour", ["503", "reset", "hang"])
def test_a_store_that_recovers_is_used(store: FaultyStore, bucket: S3Bucket, behaviour: str) -> None:
    store.behaviour = [behaviour, "ok"]
    with limit(READ_TIMEOUT_S + 6):
        assert bucket.read("x") == b"content"
    assert store.requests == 2


def test_a_slow_store_is_waited_for(store: FaultyStore, bucket: S3Bucket) -> None:
    store.behaviour = ["slow"]
    assert bucket.read("x") == b"content"
    assert store.requests == 1


def test_an_answer_that_is_cut_is_no_content(store: FaultyStore, bucket: S3Bucket) -> None:
    store.behaviour = ["cut"]
    with limit(3 * READ_TIMEOUT_S + 6), pytest.raises(TransientError):
        bucket.read("x")


def test_a_store_that_is_not_there(quick: None) -> None:
    gone = S3Bucket.from_storage(StorageConfig("minio", "http://127.0.0.1:1/data", SecretStr("k"), SecretStr("s")))
    with limit(3 * READ_TIMEOUT_S + 6), pytest.raises(TransientError, match=r"http://127\.0\.0\.1:1"):
        gone.check()


# The metadata database.

ROW = json.dumps({"Name": "v", "UUID": "u", "Storage": "minio", "Bucket": "http://old/data", "BlockSize": 4096})
OTHER = json.dumps({"Name": "v", "UUID": "u", "Storage": "minio", "Bucket": "http://new/data", "BlockSize": 4096})


@pytest.fixture(scope="module")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """A server of this module alone, which it stops, freezes and restarts."""
    server = MariaDB.start(tmp_path_factory.mktemp("db"))
    server.query("CREATE TABLE jfs_setting (name varchar(255) PRIMARY KEY, value varchar(4096) NOT NULL)")
    server.query("INSERT INTO jfs_setting VALUES ('format', %s)", [ROW])
    yield server
    server.stop()


@pytest.fixture(params=["metaurl", "connection"])
def database(
    request: pytest.FixtureRequest, mariadb: MariaDB, quick: None, monkeypatch: pytest.MonkeyPatch
) -> MySqlMetadata:
    if request.param == "metaurl":
        return MySqlMetadata.from_metaurl(Metaurl.parse(mariadb.meta_url_with_password))
    connection = {
        "conn_type": "mysql",
        "host": mariadb.host,
        "port": mariadb.port,
        "login": mariadb.user,
        "password": mariadb.password,
        "schema": mariadb.database,
    }
    monkeypatch.setenv("AIRFLOW_CONN_META", json.dumps(connection))
    return MySqlMetadata.from_connection("meta")


@pytest.fixture(autouse=True)
def restored(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "mariadb" in request.fixturenames:
        server: MariaDB = request.getfixturevalue("mariadb")
        running = server.server()
        if running is None or not running.alive():
            server.restart()
        server.query("UPDATE jfs_setting SET value = %s", [ROW])


@contextmanager
def frozen(server: MariaDB) -> Iterator[None]:
    """The server takes connections, as its machine does, and answers nothing."""
    running = server.server()
    assert running
    process = psutil.Process(running.pid)
    assert process.create_time() == running.created
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def test_a_database_that_is_gone_for_good_ends_in_time(mariadb: MariaDB, database: MySqlMetadata) -> None:
    assert database.read_setting().raw.decode() == ROW
    mariadb.stop()
    with limit(READ_FOR_S + 8), pytest.raises(TransientError, match="metadata database answered: 200") as gone:
        database.read_setting()
    assert random_part(mariadb.password) not in str(gone.value)
    start = time.monotonic()
    with pytest.raises(TransientError):
        database.replace_setting(Setting(ROW.encode()), Setting(OTHER.encode()))
    assert time.monotonic() - start < DATABASE_TIMEOUT_S + 2, "a write is not tried again"


def test_a_database_that_was_waited_for_just_now_is_not_waited_for_again(
    mariadb: MariaDB, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another task of the run, or by this one: else each read of a run would take its minute."""
    monkeypatch.setattr(mysql, "_READ_AGAIN_FOR_S", 0.5)
    waited: list[None] = []
    own = MySqlMetadata.from_metaurl(Metaurl.parse(mariadb.meta_url_with_password))

    def was_waited_for() -> bool:
        waited.append(None)
        return True

    impatient = MySqlMetadata.from_metaurl(Metaurl.parse(mariadb.meta_url_with_password), was_waited_for)
    assert impatient.read_setting().raw.decode() == ROW
    assert not waited, "asked while all is well"
    mariadb.stop()
    with pytest.raises(StillAwayError, match="it was waited for"):
        own.read_setting()
    monkeypatch.setattr(mysql, "_READ_FOR_S", 60)
    for database in (own, impatient):
        with limit(15), pytest.raises(StillAwayError):
            database.read_setting()
    assert len(waited) == 1
    mariadb.restart()
    assert own.read_setting().raw.decode() == ROW


def test_a_database_that_comes_back_is_used(
    mariadb: MariaDB, database: MySqlMetadata, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql, "_READ_FOR_S", 40)
    mariadb.stop()
    found: list[Setting | StorageSwitchError] = []

    def read() -> None:
        try:
            found.append(database.read_setting())
        except StorageSwitchError as error:
            found.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    assert not found
    mariadb.restart()
    reader.join(50)
    assert [type(item) for item in found] == [Setting]


def test_a_database_that_hangs_ends_in_time_and_works_on(mariadb: MariaDB, database: MySqlMetadata) -> None:
    with frozen(mariadb), limit(READ_FOR_S + 12), pytest.raises(TransientError, match="metadata database answered"):
        database.read_setting()
    assert database.read_setting().raw.decode() == ROW


def test_a_write_that_hangs_ends_in_time_and_the_row_decides(mariadb: MariaDB, database: MySqlMetadata) -> None:
    with frozen(mariadb), limit(12), pytest.raises(TransientError):
        database.replace_setting(Setting(ROW.encode()), Setting(OTHER.encode()))
    now = database.read_setting().raw.decode()
    assert now in {ROW, OTHER}
    assert database.replace_setting(Setting(now.encode()), Setting(OTHER.encode())) is (now == ROW)


def test_a_wrong_password_is_not_tried_again(mariadb: MariaDB, quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mysql, "_READ_FOR_S", 60)
    wrong = MySqlMetadata.from_metaurl(
        Metaurl.parse(f"mysql://{mariadb.user}:wrong@({mariadb.host}:{mariadb.port})/jfs")
    )
    with limit(20), pytest.raises(PermanentError, match="1045"):
        wrong.read_setting()

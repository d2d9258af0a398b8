"""Servers that drip, answer with pages, never end, or list wrongly: each call ends in time and names the server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import SecretStr

from include.juicefs_storage.adapters.minio_fence import MinioFence
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.s3.wire.limits import Limits
from include.juicefs_storage.errors import PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.objects.model import KeyRange, ObjectOutcome, below
from lab.kube.tls import server_context
from tests.support.s3_memory import MemoryStore
from tests.support.s3_proxy import S3Proxy

LIMITS = Limits(connect_s=2, idle_s=2, tries=3, first_delay_s=0.01, max_delay_s=0.05, total_s=1)
#: What a call may take: its total deadline, and as much again on a machine that is busy.
IN_TIME_S = 10

Answer = Callable[[socket.socket, bytes], None]


class RawServer:
    """Answers every request with a function of its own."""

    def __init__(self, answer: Answer, family: socket.AddressFamily = socket.AF_INET) -> None:
        self._answer, self.heads, self.over = answer, list[bytes](), threading.Event()
        self._socket = socket.socket(family)
        self._socket.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        self._socket.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                more = connection.recv(65536)
                if not more:
                    return
                head += more
            self.heads.append(head)
            self._answer(connection, head)

    def close(self) -> None:
        self.over.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], S3Bucket]]:
    servers: list[RawServer] = []

    def start(answer: Answer) -> S3Bucket:
        servers.append(RawServer(answer))
        store = S3Store(f"http://127.0.0.1:{servers[-1].port}", "b", "", "AK", "SK", limits=LIMITS)
        return S3Bucket(store)

    yield start
    for server in servers:
        server.close()


def body(content: bytes, *headers: str, status: str = "200 OK") -> Answer:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", "Connection: close", *headers]

    def answer(connection: socket.socket, head: bytes) -> None:
        connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if head.startswith(b"HEAD") else content))

    return answer


def listing(inside: str) -> Answer:
    return body(f"<ListBucketResult>{inside}</ListBucketResult>".encode(), "Content-Type: application/xml")


def contents(*keys: str) -> str:
    return "".join(f"<Contents><Key>{key}</Key><ETag>e</ETag><Size>1</Size></Contents>" for key in keys)


def dripping(begin: bytes, piece: bytes) -> Answer:
    def answer(connection: socket.socket, _: bytes) -> None:
        connection.sendall(begin)
        while True:  # until the client has closed it
            connection.sendall(piece)
            time.sleep(0.05)

    return answer


def endless(connection: socket.socket, _: bytes) -> None:
    connection.sendall(b'HTTP/1.1 200 OK\r\nETag: "e"\r\nTransfer-Encoding: chunked\r\n\r\n')
    block = b"A" * 2**20
    while True:
        connection.sendall(b"%x\r\n%s\r\n" % (len(block), block))


def every_page(bucket: S3Bucket) -> list[str]:
    return [key for page in bucket.pages(KeyRange()) for key in page.keys]


CALLS: dict[str, Callable[[S3Bucket], object]] = {
    "check": lambda bucket: bucket.check(),
    "pages": every_page,
    "list": lambda bucket: list(bucket.list("x/")),
    "first_after": lambda bucket: bucket.first_after(""),
    "head": lambda bucket: bucket.head("k"),
    "exists": lambda bucket: bucket.exists("k"),
    "read": lambda bucket: bucket.read("k"),
    "digest": lambda bucket: bucket.digest("k"),
    "md5": lambda bucket: bucket.md5("k"),
    "probe": lambda bucket: bucket.probe("k"),
}
LISTS = ("check", "pages", "list", "first_after")
READS = ("head", "exists", "read", "digest", "md5")


def refused(bucket: S3Bucket, call: str, kind: type[StorageSwitchError] = TransientError) -> str:
    """What a call says: in time, and with the server's name."""
    started = time.monotonic()
    with pytest.raises(kind) as error:
        CALLS[call](bucket)
    assert time.monotonic() - started < IN_TIME_S
    assert bucket.store.endpoint in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("begin", "piece"), [(b"", b"H"), (b"HTTP/1.1 200 OK\r\nx-a: ", b"x")], ids=["status", "headers"]
)
def test_a_store_whose_headers_drip(serve: Callable[[Answer], S3Bucket], call: str, begin: bytes, piece: bytes) -> None:
    refused(serve(dripping(begin, piece)), call)


@pytest.mark.parametrize("call", [call for call in CALLS if call not in {"head", "exists"}])
@pytest.mark.parametrize(
    ("framing", "piece"), [(b"Transfer-Encoding: chunked", b"1\r\n \r\n"), (b"Content-Length: 1000000", b" ")]
)
def test_a_store_whose_bodies_drip(
    serve: Callable[[Answer], S3Bucket], call: str, framing: bytes, piece: bytes
) -> None:
    refused(serve(dripping(b'HTTP/1.1 200 OK\r\nETag: "e"\r\n' + framing + b"\r\n\r\n", piece)), call)


@pytest.mark.parametrize("size", [1000, 2**20 + 1], ids=["in memory", "spliced"])
def test_an_object_that_drips_is_given_up(serve: Callable[[Answer], S3Bucket], size: int) -> None:
    begin = f'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: {size}\r\n\r\n'.encode()
    limits = replace(LIMITS, idle_s=0.3, tries=1)
    started = time.monotonic()
    with MemoryStore("b") as target:
        stores = serve(dripping(begin, b" ")).store, S3Store(target.url, "b", "", "AK", "SK")
        with contextlib.closing(NativeEngine(*stores, limits=limits)) as engine:
            try:
                assert engine.copy([("k", size, "e")])[0].outcome is ObjectOutcome.FAILED
            except TransientError as error:
                assert stores[0].endpoint in str(error)  # noqa: PT017 - a store that answers nothing, or one object
        assert time.monotonic() - started < 0.6 + size / 65536 + IN_TIME_S
        assert not target.buckets["b"]


@pytest.mark.parametrize("call", [*LISTS, *READS])
@pytest.mark.parametrize(
    "answer",
    [body(b""), body(b"<html><body>Sign in</body></html>", "Content-Type: text/html", "Server: nginx")],
    ids=["empty", "page"],
)
def test_a_200_that_no_store_gives(serve: Callable[[Answer], S3Bucket], call: str, answer: Answer) -> None:
    assert "expected an answer of an S3 store, found status 200 of type" in refused(serve(answer), call)


def test_what_answered_is_named(serve: Callable[[Answer], S3Bucket]) -> None:
    said = refused(serve(body(b"<html>", "Content-Type: text/html", "Server: nginx\x1b[31m")), "exists")
    assert "status 200 of type text/html from server nginx[31m" in said
    assert "the store's S3 port" in said


@pytest.mark.parametrize("call", ["pages", "list", "read"])
def test_a_body_without_an_end(serve: Callable[[Answer], S3Bucket], call: str) -> None:
    refused(serve(endless), call)


def test_an_object_without_an_end_is_not_read_on(serve: Callable[[Answer], S3Bucket]) -> None:
    store = serve(endless).store
    with contextlib.closing(NativeEngine(store, replace(store, bucket="c"), limits=LIMITS)) as engine:
        found = engine.compare([("k", 10, "e")])
    assert found[0].outcome is ObjectOutcome.DIFFERENT


@pytest.mark.parametrize("call", LISTS)
@pytest.mark.parametrize(
    "inside",
    [
        contents("a"),
        f"{contents('a')}<IsTruncated>true</IsTruncated>",
        "<IsTruncated>true</IsTruncated><NextContinuationToken></NextContinuationToken>",
    ],
    ids=["no IsTruncated", "no token", "empty token"],
)
def test_a_listing_that_does_not_say_how_it_continues(
    serve: Callable[[Answer], S3Bucket], call: str, inside: str
) -> None:
    refused(serve(listing(inside)), call)


@pytest.mark.parametrize("call", ["pages", "list"])
def test_a_listing_that_repeats_its_token(serve: Callable[[Answer], S3Bucket], call: str) -> None:
    same = listing("<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>")
    assert "found the same page again" in refused(serve(same), call)


@pytest.mark.parametrize(
    ("pages", "kind", "words"),
    [
        ([("b", "c"), ("b", "c")], PermanentError, "out of order"),
        ([("b", "c"), ("c",)], TransientError, "the same page again"),
    ],
)
def test_a_listing_behind_a_key_that_repeats_its_page(
    serve: Callable[[Answer], S3Bucket], pages: list[tuple[str, ...]], kind: type[StorageSwitchError], words: str
) -> None:
    """Its next page begins before the last key of the one before: that one key may be there again, and no more."""
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
    answers = iter([listing(contents(*keys) + more) for keys in pages])

    def answer(connection: socket.socket, head: bytes) -> None:
        next(answers)(connection, head)

    bucket = serve(answer)
    with pytest.raises(kind, match=words) as error:
        list(bucket.pages(KeyRange("a")))
    assert bucket.store.endpoint in str(error.value)


@pytest.mark.parametrize("call", LISTS)
@pytest.mark.parametrize(
    "objects",
    [
        contents("x/a").replace("<Size>1", "<Size>-1"),
        contents("x/a").replace("<Size>1", "<Size>"),
        contents("x/a")[:-12],
        contents("x/a") + "<CommonPrefixes><Prefix>x/b/</Prefix></CommonPrefixes>",
    ],
    ids=["negative size", "no size", "cut off", "common prefixes"],
)
def test_a_listing_of_objects_that_cannot_be(serve: Callable[[Answer], S3Bucket], call: str, objects: str) -> None:
    refused(serve(listing(f"<IsTruncated>false</IsTruncated>{objects}")), call)


@pytest.mark.parametrize("date", ["Fri, 31 Dec 9999 23:59:59 -2300", "Thu, 99 Foo 2026 99:99:99 GMT", "", "soon"])
def test_a_date_that_is_none_gives_way_to_the_clock(serve: Callable[[Answer], S3Bucket], date: str) -> None:
    found = serve(body(b"", 'ETag: "e"', f"Date: {date}")).now()
    assert abs((datetime.now(UTC) - found).total_seconds()) < IN_TIME_S


@pytest.mark.parametrize("answer", [body(b""), body(b"<html>Sign in</html>"), body(b"[]"), body(b'{"memberOf": []}')])
def test_a_fence_is_not_taken_to_be_up_since_something_answered(
    serve: Callable[[Answer], S3Bucket], answer: Answer
) -> None:
    fence = MinioFence(serve(answer).store, SecretStr("user"), "myjfs")
    with pytest.raises(TransientError, match="MinIO's admin API at http"):
        fence.up()


@pytest.mark.parametrize("content", [b"", b"<html>Sign in</html>", b"[]"])
def test_whether_a_fence_is_up_is_not_read_from_a_page(serve: Callable[[Answer], S3Bucket], content: bytes) -> None:
    fence = MinioFence(serve(body(content)).store, SecretStr("user"), "myjfs")
    for ask in (fence.is_up, fence.down):
        with pytest.raises(TransientError, match="expected JSON of a user"):
            ask()


def test_a_listing_of_empty_pages_alone(serve: Callable[[Answer], S3Bucket]) -> None:
    tokens = iter(range(10**6))

    def answer(connection: socket.socket, head: bytes) -> None:
        token = f"<NextContinuationToken>{next(tokens)}</NextContinuationToken>"
        listing(f"<IsTruncated>true</IsTruncated>{token}")(connection, head)

    assert "empty pages" in refused(serve(answer), "pages")


@pytest.mark.parametrize("call", ["pages", "list"])
@pytest.mark.parametrize("keys", [("b", "a"), ("a", "a")])
def test_a_listing_out_of_order(serve: Callable[[Answer], S3Bucket], call: str, keys: tuple[str, ...]) -> None:
    keys = tuple(f"x/{key}" for key in keys)
    answer = listing(f"{contents(*keys)}<IsTruncated>false</IsTruncated>")
    assert "out of order" in refused(serve(answer), call, PermanentError)


def test_keys_that_may_do_nothing_outside_of_a_prefix() -> None:
    """MinIO, RustFS: HEAD bucket is 403, as is a LIST of the whole bucket."""
    with MemoryStore("b") as store, S3Proxy(store.url) as proxy:
        store.put("b", "vol/chunks/k", b"x")
        seen: list[str] = []

        def deny(connection: socket.socket, head: bytes) -> None:
            line = head.split(b"\r\n")[0].decode()
            seen.append(line)
            inside = "prefix=vol%2F" in line or "/b/vol/" in line
            with socket.create_connection(("127.0.0.1", proxy.server_port)) as onward:
                if not inside:
                    body(b"<Error><Code>AccessDenied</Code></Error>", status="403 Forbidden")(connection, head)
                    return
                onward.sendall(head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                while data := onward.recv(65536):
                    connection.sendall(data)

        server = RawServer(deny)
        try:
            bucket = S3Bucket(S3Store(f"http://127.0.0.1:{server.port}", "b", "", "AK", "SK", limits=LIMITS))
            bucket.check("vol/")
            assert [item.key for item in bucket.list("vol/")] == ["vol/chunks/k"]
            for keys in (below("vol/chunks/"), KeyRange("vol/chunks/", "vol/chunks/k")):
                assert [page.keys for page in bucket.pages(keys)] == [["vol/chunks/k"]]
            assert bucket.exists("vol/chunks/k")
            assert "correct the keys" in refused(bucket, "check", PermanentError)
        finally:
            server.close()


# Certificates, addresses.


def test_a_certificate_problem_says_which_store_and_what_to_set(tmp_path: Path) -> None:
    with MemoryStore("b") as store, S3Proxy(store.url, tls=server_context(tmp_path)) as proxy:
        store.put("b", "k", b"x")
        made = S3Store(proxy.url, "b", "", "AK", "SK", limits=LIMITS, origin="connection 'new'")
        for call in ("check", "list", "exists", "read", "probe"):
            said = refused(S3Bucket(made), call, PermanentError)
            assert "certificate is not trusted" in said
            assert "extra.verify of connection 'new'" in said
        for verify in (False, str(tmp_path / "ca.crt")):
            assert S3Bucket(replace(made, verify=verify)).exists("k")
        other = tmp_path / "empty.crt"
        other.touch()
        with pytest.raises(PermanentError, match=r"extra\.verify"):
            S3Bucket(replace(made, verify=str(other))).check()


def test_a_certificate_of_another_name(tmp_path: Path) -> None:
    with MemoryStore("b") as store, S3Proxy(store.url, tls=server_context(tmp_path)) as proxy:
        url = proxy.url.replace("127.0.0.1", "127.0.0.2")
        with pytest.raises((PermanentError, TransientError)):
            S3Bucket(S3Store(url, "b", "", "AK", "SK", verify=str(tmp_path / "ca.crt"), limits=LIMITS)).check()


def test_https_where_the_server_speaks_http() -> None:
    with MemoryStore("b") as store:
        made = S3Store(store.url.replace("http:", "https:"), "b", "", "AK", "SK", limits=LIMITS)
        assert "expected a server that speaks TLS" in refused(S3Bucket(made), "check", PermanentError)


def test_ipv6_region_and_token() -> None:
    server = RawServer(body(b"", 'ETag: "e"'), socket.AF_INET6)
    try:
        store = S3Store(f"http://[::1]:{server.port}", "b", "", "AK", "SK", "eu-west-1", "to/ken", limits=LIMITS)
        assert S3Bucket(store).exists("k")
        head = server.heads[-1].decode().lower()
        assert head.startswith("head /b/k http/1.1")
        assert f"host: [::1]:{server.port}\r\n" in head
        assert "/eu-west-1/s3/aws4_request" in head
        assert "x-amz-security-token: to/ken\r\n" in head
    finally:
        server.close()


def test_the_bucket_in_the_name_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    server = RawServer(body(b"", 'ETag: "e"'))
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, port, **how: resolve("127.0.0.1" if host == "b.localhost" else host, port, **how),
    )
    try:
        store = S3Store(f"http://localhost:{server.port}", "b", "", "AK", "SK", virtual_host=True, limits=LIMITS)
        assert S3Bucket(store).exists("k")
        head = server.heads[-1].decode().lower()
        assert head.startswith("head /k http/1.1")
        assert f"host: b.localhost:{server.port}\r\n" in head
    finally:
        server.close()

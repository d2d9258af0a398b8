"""The native engine against stores that take any key, fail, lie or appear to have been there first."""

from __future__ import annotations

import gzip
import hashlib
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest

from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.client import StoreDownError
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.s3.wire.limits import Limits
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.flow import Flow
from include.juicefs_storage.objects.model import Comparison, KeyRange, Listed, ObjectOutcome
from lab.kube.tls import server_context
from lab.process import wait_for
from tests.support.s3_memory import MemoryStore, Object, _Handler
from tests.support.s3_proxy import Fault, S3Proxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

QUICK = Limits(connect_s=2, idle_s=0.5, tries=6, first_delay_s=0.01, max_delay_s=0.05)
SMALL, LARGE = 3000, 1_500_000
KEYS = ["a b", "a+b", "a%2Fb", "x//y", "../z", "<x&y>\"'", "tab\tx", "nl\nx", "ü/日本語", "\U0001f600", "~", "k" * 1022]


def blob(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311


class Store(MemoryStore):
    """A store whose PUTs may be tampered with."""

    def __init__(self, *buckets: str) -> None:
        super().__init__(*buckets)
        self.RequestHandlerClass = _Tampering
        self.spoil = 0  # so many PUTs are stored with a bit turned
        self.no_conditions = False
        self.no_server_copy = False
        self.conditions_refused = 0


class _Tampering(_Handler):
    server: Store

    def _put(self, objects: dict[str, Object], key: str, body: bytes) -> None:
        if self.server.no_conditions and self.headers.get("If-None-Match"):
            self.server.conditions_refused += 1
            self._refuse(501, "NotImplemented")
            return
        if self.server.no_server_copy and self.headers.get("x-amz-copy-source"):
            self._refuse(403, "AccessDenied")
            return
        if wanted := self.headers.get("x-amz-copy-source-if-match"):
            bucket, _, source = unquote(self.headers["x-amz-copy-source"]).removeprefix("/").partition("/")
            if (found := self.server.buckets[bucket].get(source)) and found.etag != wanted.strip('"'):
                self._refuse(412, "PreconditionFailed")
                return
        if self.server.spoil and "uploadId" not in self.query:
            self.server.spoil -= 1
            body = body[:-1] + bytes([body[-1] ^ 1])
        super()._put(objects, key, body)


@pytest.fixture
def stores() -> Iterator[tuple[Store, Store]]:
    with Store("src", "dst") as source, Store("dst") as target:
        yield source, target


def side(url: str, bucket: str, prefix: str = "v/", verify: bool | str = True) -> S3Store:
    return S3Store(url, bucket, prefix, "AK", "SK", verify=verify)


def listed(store: S3Store) -> list[Listed]:
    return [row for page in S3Bucket(store).pages(KeyRange()) for row in zip(*page, strict=True)]


def filled(store: Store) -> dict[str, bytes]:
    """Small, empty, large and hostile objects below v/, and one beside."""
    bodies = {f"v/{key}": blob(SMALL, seed) for seed, key in enumerate(KEYS)}
    bodies |= {
        "v/empty": b"",
        "v/one": b"x",
        "v/edge": blob(2**20),
        "v/edge+1": blob(2**20 + 1),
        "v/large": blob(LARGE),
    }
    for key, body in bodies.items():
        store.put("src", key, body)
    store.put("src", "other", b"not below the prefix")
    return bodies


@pytest.mark.parametrize("tls", [False, True])
def test_a_whole_copy(stores: tuple[Store, Store], tmp_path: Path, *, tls: bool) -> None:
    source, target = stores
    bodies = filled(source)
    with ExitStack() as stack:
        urls = [source.url, target.url]
        verify: bool | str = True
        if tls:
            verify = str(tmp_path / "ca.crt")
            context = server_context(tmp_path)
            urls = [stack.enter_context(S3Proxy(url, tls=context)).url for url in urls]
        a, b = side(urls[0], "src", verify=verify), side(urls[1], "dst", "w/", verify=verify)
        objects = listed(a)
        assert [key for key, _, _ in objects] == sorted(key[2:] for key in bodies)
        engine = NativeEngine(a, b, concurrency=4)
        source.requests.clear()
        copied = engine.copy(objects)
        assert {(item.outcome, item.comparison) for item in copied} == {(ObjectOutcome.COPIED, Comparison.ETAG)}, copied
        assert target.bodies("dst") == {f"w/{key[2:]}": body for key, body in bodies.items()}
        assert source.requests == {"GET": len(objects)}
        assert target.requests == {"PUT": len(objects)}
        compared = engine.compare(objects)
        assert {item.outcome for item in compared} == {ObjectOutcome.SAME}
        assert all(len(item.checksum) == 16 for item in compared)
        assert listed(b) == objects
        engine.close()


@pytest.mark.parametrize("size", [SMALL, LARGE, 11_000_000])
@pytest.mark.parametrize("server_copy", [False, True])
def test_metadata_goes_along(stores: tuple[Store, Store], size: int, *, server_copy: bool) -> None:
    kept = {
        "Content-Type": "text/x; charset=utf-8",
        "Cache-Control": "no-store, max-age=0",
        "Content-Disposition": "attachment",
        "Content-Encoding": "gzip",
        "Content-Language": "fr",
        "Expires": "Wed, 21 Oct 2026 07:28:00 GMT",
        "X-Amz-Meta-Two": "a  b, c",
        "X-Amz-Meta-Raw": "é".encode().decode("latin-1"),
    }
    source, target = stores
    body = gzip.compress(blob(size))
    source.buckets["src"]["v/k"] = Object(body, hashlib.md5(body).hexdigest(), kept)  # noqa: S324
    a, b = side(source.url, "src"), side(source.url if server_copy else target.url, "dst")
    (copied,) = NativeEngine(a, b, put_limit_bytes=10_000_000, part_bytes=5_000_000).copy(listed(a))
    assert copied.outcome is ObjectOutcome.COPIED
    found = (source if server_copy else target).buckets["dst"]["v/k"]
    assert found.body == body
    if "-" not in found.etag:  # the store in memory forgets what a multipart upload began with
        assert {name.lower(): value for name, value in found.headers.items()} == {
            name.lower(): value for name, value in kept.items()
        }
    assert (source.requests["GET"] == 1) is server_copy


def test_how_an_object_was_sent_is_not_kept(stores: tuple[Store, Store]) -> None:
    source, target = stores
    source.put("src", "v/k", b"x", content_encoding="aws-chunked,gzip")
    source.put("src", "v/l", b"x", content_encoding="aws-chunked")
    NativeEngine(side(source.url, "src"), side(target.url, "dst")).copy(listed(side(source.url, "src")))
    assert target.buckets["dst"]["v/k"].headers["content-encoding"] == "gzip"
    assert "content-encoding" not in target.buckets["dst"]["v/l"].headers


@pytest.mark.parametrize("refused", [False, True])
def test_on_one_endpoint_the_store_copies(stores: tuple[Store, Store], *, refused: bool) -> None:
    source, _ = stores
    bodies = filled(source)
    source.no_server_copy = refused
    a, b = side(source.url, "src"), side(source.url, "dst")
    objects = listed(a)
    source.requests.clear()
    copied = NativeEngine(a, b).copy(objects)
    assert {(item.outcome, item.comparison) for item in copied} == {(ObjectOutcome.COPIED, Comparison.ETAG)}, copied
    assert source.bodies("dst") == bodies
    assert (source.requests["GET"] > 0) is refused


@pytest.mark.parametrize("size", [SMALL, LARGE, 11_000_000])
def test_what_appeared_meanwhile_is_left_alone(stores: tuple[Store, Store], size: int) -> None:
    source, target = stores
    for key in ("v/different", "v/same"):
        source.put("src", key, blob(size))
    target.put("dst", "v/different", blob(size, 1))
    target.put("dst", "v/same", blob(size))
    a, b = side(source.url, "src"), side(target.url, "dst")
    engine = NativeEngine(a, b, put_limit_bytes=10_000_000, part_bytes=5_000_000)
    copied = engine.copy(listed(a))
    assert [item.outcome for item in copied] == [ObjectOutcome.DIFFERENT, ObjectOutcome.SAME]
    assert {item.comparison for item in copied} == {Comparison.CONTENT}
    assert target.bodies("dst")["v/different"] == blob(size, 1)
    assert not target.uploads
    copied = engine.copy(listed(a)[:1], overwrite=True)
    assert copied[0].outcome is ObjectOutcome.OVERWRITTEN
    assert target.bodies("dst")["v/different"] == blob(size)


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("same_endpoint", [False, True])
def test_what_vanished_or_changed_is_named(stores: tuple[Store, Store], size: int, *, same_endpoint: bool) -> None:
    source, target = stores
    for key in ("v/changed", "v/grown", "v/kept", "v/vanished"):
        source.put("src", key, blob(size))
    a, b = side(source.url, "src"), side(source.url if same_endpoint else target.url, "dst")
    objects = listed(a)
    source.put("src", "v/changed", blob(size, 1))
    source.put("src", "v/grown", blob(size * 3, 1))
    del source.buckets["src"]["v/vanished"]
    copied = NativeEngine(a, b).copy(objects)
    assert [item.outcome for item in copied] == [
        ObjectOutcome.CHANGED,
        ObjectOutcome.CHANGED,
        ObjectOutcome.COPIED,
        ObjectOutcome.VANISHED,
    ]
    assert list((source if same_endpoint else target).buckets["dst"]) == ["v/kept"]


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("failing", ["source", "target"])
def test_a_store_that_fails_now_and_then(stores: tuple[Store, Store], fault: Fault, failing: str) -> None:
    source, target = stores
    bodies = filled(source)
    for number in range(40):
        source.put("src", f"v/n{number}", bodies.setdefault(f"v/n{number}", blob(SMALL, number)))
    objects = listed(side(source.url, "src"))
    with S3Proxy(source.url) as before_source, S3Proxy(target.url) as before_target:
        proxy = before_source if failing == "source" else before_target
        proxy.faults, proxy.every = [fault], 5
        a, b = side(before_source.url, "src"), side(before_target.url, "dst")
        engine = NativeEngine(a, b, concurrency=8, limits=QUICK)
        copied = engine.copy(objects)
        assert proxy.failed
    assert {item.outcome for item in copied} == {ObjectOutcome.COPIED}, copied
    assert target.bodies("dst") == bodies


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.HANG, Fault.RESET])
def test_a_store_that_is_down_ends_the_copy(stores: tuple[Store, Store], size: int, fault: Fault) -> None:
    source, target = stores
    for number in range(20):
        source.put("src", f"v/{number}", blob(size))
    a = side(source.url, "src")
    objects = listed(a)
    limits = Limits(idle_s=0.2, tries=2, first_delay_s=0.01)
    with S3Proxy(target.url) as proxy:
        proxy.faults = [fault]
        start = time.monotonic()
        with pytest.raises(StoreDownError, match="clear this task"):
            NativeEngine(a, side(proxy.url, "dst"), concurrency=4, limits=limits).copy(objects)
        assert time.monotonic() - start < 10
    assert not target.buckets["dst"]


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_target_that_refuses_all_writes_is_no_matter_of_objects(stores: tuple[Store, Store], size: int) -> None:
    source, target = stores
    for number in range(3):
        source.put("src", f"v/{number}", blob(size))
    a = side(source.url, "src")
    with S3Proxy(target.url) as proxy:
        proxy.read_only = True
        with pytest.raises(PermanentError, match=r"AccessDenied.*\n.*policy"):
            NativeEngine(a, side(proxy.url, "dst")).copy(listed(a))
    with pytest.raises(PermanentError, match="NoSuchBucket"):
        NativeEngine(a, side(target.url, "none")).copy(listed(a))


def test_the_clock_is_corrected(stores: tuple[Store, Store]) -> None:
    source, target = stores
    bodies = filled(source)
    a = side(source.url, "src")
    with S3Proxy(target.url, keys=("AK", "SK")) as proxy:
        proxy.skew_s = 3600
        b = side(proxy.url, "dst")
        S3Bucket(b).check()
        copied = NativeEngine(a, b, limits=QUICK).copy(listed(a))
    assert {item.outcome for item in copied} == {ObjectOutcome.COPIED}
    assert target.bodies("dst") == bodies


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_etags_that_are_no_md5_are_proven_by_content(stores: tuple[Store, Store], size: int) -> None:
    source, target = stores
    for number in range(3):
        source.buckets["src"][f"v/{number}"] = Object(blob(size, number), "0" * 32 + "-7")
    a = side(source.url, "src")
    copied = NativeEngine(a, side(target.url, "dst")).copy(listed(a))
    assert {(item.outcome, item.comparison) for item in copied} == {(ObjectOutcome.COPIED, Comparison.CONTENT)}
    assert len({item.checksum for item in copied}) == 3
    assert target.requests["GET"] == 0  # the target's MD5 of what was sent is proof enough


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize(("spoil", "outcome"), [(1, ObjectOutcome.COPIED), (2, ObjectOutcome.FAILED)])
def test_what_is_stored_otherwise_than_sent_is_found(
    stores: tuple[Store, Store], size: int, spoil: int, outcome: ObjectOutcome
) -> None:
    source, target = stores
    source.put("src", "v/k", blob(size))
    target.spoil = spoil
    a = side(source.url, "src")
    (copied,) = NativeEngine(a, side(target.url, "dst")).copy(listed(a))
    assert copied.outcome is outcome
    assert (target.bodies("dst")["v/k"] == blob(size)) is (outcome is ObjectOutcome.COPIED)


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_a_store_without_conditional_writes_is_asked_once(stores: tuple[Store, Store], size: int) -> None:
    source, target = stores
    target.no_conditions = True
    for number in range(6):
        source.put("src", f"v/{number}", blob(size))
    a = side(source.url, "src")
    copied = NativeEngine(a, side(target.url, "dst"), concurrency=1).copy(listed(a))
    assert {item.outcome for item in copied} == {ObjectOutcome.COPIED}
    assert target.conditions_refused == 1


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.CUT])
def test_an_upload_that_cannot_end_is_aborted(stores: tuple[Store, Store], fault: Fault) -> None:
    source, target = stores
    source.put("src", "v/k", blob(11_000_000))
    source.put("src", "v/small", blob(SMALL))
    a = side(source.url, "src")
    with S3Proxy(target.url) as proxy:
        proxy.faults, proxy.fails = [fault], lambda request: "partNumber=2" in request.target
        engine = NativeEngine(a, side(proxy.url, "dst"), limits=QUICK, put_limit_bytes=10**7, part_bytes=5 * 10**6)
        try:
            engine.copy(listed(a))
        except StoreDownError:
            pass
        else:
            pytest.fail("a part that is never taken")
    assert not target.uploads
    assert "v/k" not in target.buckets["dst"]


def test_the_bandwidth_is_kept(stores: tuple[Store, Store]) -> None:
    source, target = stores
    for number in range(20):
        source.put("src", f"v/{number}", blob(50_000))
    source.put("src", "v/large", blob(2_000_000))
    a = side(source.url, "src")
    start = time.monotonic()
    copied = NativeEngine(a, side(target.url, "dst"), flow=Flow(4_000_000)).copy(listed(a))
    assert {item.outcome for item in copied} == {ObjectOutcome.COPIED}
    assert 0.5 < time.monotonic() - start < 5


def test_a_pause_outlasts_the_deadline_of_what_is_tried_again(stores: tuple[Store, Store]) -> None:
    source, target = stores
    for number in range(8):
        source.put("src", f"v/{number}", blob(LARGE if number % 2 else SMALL))
    a, flow, limits = side(source.url, "src"), Flow(), replace(QUICK, tries=1000, total_s=2)
    objects = listed(a)
    with S3Proxy(target.url) as proxy, ThreadPoolExecutor(1) as pool:
        proxy.faults = [Fault.ERROR] * 10_000
        copying = pool.submit(NativeEngine(a, side(proxy.url, "dst"), flow=flow, limits=limits).copy, objects)
        wait_for("a failed try", lambda: proxy.failed, deadline_s=20, poll_s=0.01)
        flow.pause()
        failed: list[int] = []

        def silent() -> bool:
            failed.append(proxy.failed)
            return failed[-25:] == [failed[-1]] * 25

        wait_for("no try for longer than the deadline", silent, deadline_s=20, poll_s=0.1)
        proxy.faults = []
        flow.resume()
        assert {item.outcome for item in copying.result(30)} == {ObjectOutcome.COPIED}


def test_idle_connections_that_the_store_closed_are_no_failure(stores: tuple[Store, Store]) -> None:
    source, target = stores
    bodies = filled(source)
    a, limits = side(source.url, "src"), Limits(tries=1)
    objects = listed(a)
    with S3Proxy(source.url) as first, S3Proxy(target.url) as second:
        engine = NativeEngine(side(first.url, "src"), side(second.url, "dst"), limits=limits)
        engine.copy(objects[:10])
        for client in (engine._workers[0].source, engine._workers[0].target):
            for connection in client.idle:
                connection.sock.shutdown(2)  # as if the other side had
        copied = engine.copy(objects[10:])
    assert {item.outcome for item in copied} == {ObjectOutcome.COPIED}
    assert target.bodies("dst") == bodies

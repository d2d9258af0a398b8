"""What some stores want of a PUT, and what JuiceFS left with a block: stores in memory that behave so."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from hashlib import md5
from pathlib import Path

import pytest

from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.s3.wire.limits import Limits
from include.juicefs_storage.objects.model import Compared, Comparison, KeyRange, Listed, ObjectOutcome
from include.juicefs_storage.volume.checksum import CHECKSUM_HEADER, Crc32c
from lab.kube.tls import server_context
from tests.support.s3_memory import MemoryStore, Object, _Handler
from tests.support.s3_proxy import S3Proxy

QUICK = Limits(connect_s=2, idle_s=2, tries=4, first_delay_s=0.01, max_delay_s=0.05)
SMALL, LARGE = 3000, 1_500_000
SIZES = pytest.mark.parametrize("size", [SMALL, LARGE])


class Wanting(MemoryStore):
    """A store with an object lock, or one that encrypts with its clients' keys."""

    def __init__(self, *buckets: str) -> None:
        super().__init__(*buckets)
        self.RequestHandlerClass = _Wanting
        self.locked = self.takes_conditions = False
        self.encrypted: set[str] = set()
        self.spoils = 0  # so many GETs are answered with a bit turned
        self.begun: list[dict[str, str]] = []  # headers of PUTs of whole objects, and of uploads


class _Wanting(_Handler):
    server: Wanting

    def _put(self, objects: dict[str, Object], key: str, body: bytes) -> None:
        if "uploadId" not in self.query:
            self._note()
        given = self.headers.get("Content-MD5")
        if self.server.locked and not given:
            # AWS' words.
            self._xml(
                "<Error><Code>InvalidRequest</Code><Message>Content-MD5 OR x-amz-checksum- HTTP header is required for "
                "Put Object requests with Object Lock parameters</Message></Error>",
                400,
            )
        elif given and given != b64encode(md5(body, usedforsecurity=False).digest()).decode():
            self._refuse(400, "BadDigest")
        elif not self.server.takes_conditions and self.headers.get("If-None-Match"):
            self._refuse(501, "NotImplemented")
        else:
            super()._put(objects, key, body)

    def _complete(self, objects: dict[str, Object], key: str) -> None:
        if "uploads" in self.query:
            self._note()
        super()._complete(objects, key)

    def _note(self) -> None:
        self.server.begun.append({name.lower(): value for name, value in self.headers.items()})

    def _get(self, objects: dict[str, Object], key: str) -> None:
        if key in self.server.encrypted:
            self._xml(
                "<Error><Code>InvalidRequest</Code><Message>The object was stored using a form of Server Side "
                "Encryption. The correct parameters must be provided to retrieve the object.</Message></Error>",
                400,
            )
            return
        if self.server.spoils and key in objects and self.command == "GET":
            self.server.spoils -= 1
            found = objects[key]
            objects = {key: Object(bytes([found.body[0] ^ 1]) + found.body[1:], found.etag, found.headers)}
        super()._get(objects, key)


@pytest.fixture
def stores() -> Iterator[tuple[Wanting, Wanting]]:
    with Wanting("src") as source, Wanting("dst") as target:
        yield source, target


def sides(source: MemoryStore, target: MemoryStore) -> tuple[S3Store, S3Store]:
    return S3Store(source.url, "src", "", "AK", "SK"), S3Store(target.url, "dst", "", "AK", "SK")


def listed(store: S3Store) -> list[Listed]:
    return [row for page in S3Bucket(store).pages(KeyRange()) for row in zip(*page, strict=True)]


def put_block(store: MemoryStore, key: str, body: bytes, *, rotten: bool = False) -> None:
    """Store a block as JuiceFS does, with its checksum."""
    checksum = Crc32c()
    checksum.update(body)
    stored = body[:-1] + bytes([body[-1] ^ 1]) if rotten else body
    store.put("src" if "src" in store.buckets else "dst", key, stored, **{CHECKSUM_HEADER: str(checksum.value)})


# A bucket with an object lock.


@SIZES
@pytest.mark.parametrize("takes_conditions", [False, True])
@pytest.mark.parametrize("etag", ["", "f" * 32, "e" * 32 + "-2"], ids=["MD5", "looks like an MD5", "of parts"])
def test_a_bucket_with_an_object_lock_gets_the_md5(
    stores: tuple[Wanting, Wanting], size: int, takes_conditions: bool, etag: str
) -> None:
    source, target = stores
    target.locked, target.takes_conditions = True, takes_conditions
    for key in ("a", "b", "c"):
        source.put("src", key, key.encode() * size)
        found = source.buckets["src"][key]
        source.buckets["src"][key] = Object(found.body, etag or found.etag)
    left, right = sides(source, target)
    copied = NativeEngine(left, right, concurrency=1, limits=QUICK).copy(listed(left))
    assert {item.outcome for item in copied} == {ObjectOutcome.COPIED}, copied
    assert target.bodies("dst") == source.bodies("src")
    assert "content-md5" in target.begun[-1]
    S3Bucket(right).probe("probe")


def test_no_store_gets_an_md5_that_does_not_want_one(stores: tuple[Wanting, Wanting]) -> None:
    source, target = stores
    source.put("src", "a", b"x")
    left, right = sides(source, target)
    NativeEngine(left, right).copy(listed(left))
    assert "content-md5" not in target.begun[-1]


# The class of new objects, and encryption.


@pytest.mark.parametrize("size", [SMALL, LARGE, 11_000_000])
@pytest.mark.parametrize("one_store", [False, True])
def test_new_objects_get_the_storage_class(stores: tuple[Wanting, Wanting], size: int, one_store: bool) -> None:
    source, target = stores
    source.put("src", "a", b"x" * size)
    source.buckets["dst"] = {}
    source.takes_conditions = True
    left, right = sides(source, source if one_store else target)
    right = replace(right, storage_class="STANDARD_IA")
    engine = NativeEngine(left, right, limits=QUICK, put_limit_bytes=10_000_000, part_bytes=5_000_000)
    assert engine.copy(listed(left))[0].outcome is ObjectOutcome.COPIED
    begun = [headers.get("x-amz-storage-class") for headers in (source if one_store else target).begun]
    assert set(begun) == {"STANDARD_IA"}


@SIZES
def test_an_object_that_its_writer_encrypted_is_refused_by_that_name(
    stores: tuple[Wanting, Wanting], size: int
) -> None:
    source, target = stores
    source.put("src", "a", b"x" * size)
    source.put("src", "b", b"x" * size)
    source.encrypted = {"b"}
    left, right = sides(source, target)
    plain, encrypted = NativeEngine(left, right, limits=QUICK).copy(listed(left))
    assert (plain.outcome, encrypted.outcome) == (ObjectOutcome.COPIED, ObjectOutcome.FAILED)
    assert "encrypted with a key of its writer (SSE-C)" in encrypted.detail


# The checksum that JuiceFS left.


@SIZES
@pytest.mark.parametrize("tls", [False, True])
def test_a_block_that_is_not_what_juicefs_wrote_is_not_copied(
    stores: tuple[Wanting, Wanting], tmp_path: Path, size: int, tls: bool
) -> None:
    source, target = stores
    put_block(source, "good", b"a" * size)
    put_block(source, "rotten", b"b" * size, rotten=True)
    source.put("src", "unmarked", b"c" * size)
    with ExitStack() as stack:
        left, right = sides(source, target)
        if tls:
            context = server_context(tmp_path)
            urls = [stack.enter_context(S3Proxy(store.url, tls=context)).url for store in stores]
            left, right = (
                S3Store(url, bucket, "", "AK", "SK", verify=False)
                for url, bucket in zip(urls, ("src", "dst"), strict=True)
            )
        objects = listed(left)
        copied = NativeEngine(left, right, limits=QUICK).copy(objects)
        assert [item.outcome for item in copied] == [
            ObjectOutcome.COPIED, ObjectOutcome.DAMAGED, ObjectOutcome.COPIED,
        ]  # fmt: skip
        assert "JuiceFS wrote" in copied[1].detail
        assert set(target.buckets["dst"]) == {"good", "unmarked"}
        # Overwriting does not spread it either.
        copied = NativeEngine(left, right, limits=QUICK).copy(objects[1:2], overwrite=True)
        assert copied[0].outcome is ObjectOutcome.DAMAGED
        # A switch leaves no block behind: clients read it no worse than before.
        copied = NativeEngine(left, right, limits=QUICK, copy_damaged=True).copy(objects[1:2])
        assert copied[0].outcome is ObjectOutcome.COPIED
        assert "JuiceFS wrote" in copied[0].detail
    assert target.bodies("dst") == source.bodies("src")
    assert target.buckets["dst"]["rotten"].headers == source.buckets["src"]["rotten"].headers


@SIZES
def test_what_was_damaged_on_the_way_is_read_again(stores: tuple[Wanting, Wanting], size: int) -> None:
    source, target = stores
    put_block(source, "good", b"a" * size)
    left, right = sides(source, target)
    objects = listed(left)
    source.spoils = 1
    (copied,) = NativeEngine(left, right, limits=QUICK).copy(objects)
    assert (copied.outcome, copied.comparison, copied.detail) == (ObjectOutcome.COPIED, Comparison.ETAG, "")
    assert target.bodies("dst") == source.bodies("src")


@SIZES
def test_comparing_contents_says_which_side_is_damaged(stores: tuple[Wanting, Wanting], size: int) -> None:
    source, target = stores
    for key in ("both", "neither", "source", "target"):
        put_block(source, key, b"a" * size, rotten=key in {"both", "source"})
        put_block(target, key, b"a" * size, rotten=key in {"both", "target"})
    left, right = sides(source, target)
    found: dict[str, Compared] = {
        row[0]: item
        for row, item in zip(listed(left), NativeEngine(left, right, limits=QUICK).compare(listed(left)), strict=True)
    }
    assert found["neither"].outcome is ObjectOutcome.SAME
    assert found["both"].outcome is ObjectOutcome.DAMAGED
    for side in ("source", "target"):
        assert found[side].outcome is ObjectOutcome.DIFFERENT
        assert found[side].detail.startswith(f"on the {side} its content has the CRC32C")

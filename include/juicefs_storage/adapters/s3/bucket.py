"""One bucket of an S3 store, as the rest of the project uses it."""

from __future__ import annotations

import hashlib
import os
import re
from base64 import b64encode
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.client import (
    OBJECT_LIMIT_BYTES,
    ObjectError,
    S3Client,
    error_code,
)
from include.juicefs_storage.adapters.s3.listing import list_pages
from include.juicefs_storage.adapters.s3.store import LOOK, PROMPT, S3Store
from include.juicefs_storage.adapters.s3.stream import stream
from include.juicefs_storage.adapters.s3.wire.drive import drive
from include.juicefs_storage.adapters.s3.wire.message import TooLongError
from include.juicefs_storage.errors import NoBucketError, PermanentError, TransientError, UnreachableError
from include.juicefs_storage.objects.bucket import Bucket, SomeSink, StoredObject
from include.juicefs_storage.objects.model import KeyRange, Page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from include.juicefs_storage.adapters.s3.wire.limits import Limits
    from include.juicefs_storage.volume.setting import StorageConfig

#: The codes of answers to keys that the store does not know. AccessDenied may come from a policy.
_UNKNOWN_KEYS = frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch"})
_LOCATION = "<CreateBucketConfiguration><LocationConstraint>{region}</LocationConstraint></CreateBucketConfiguration>"
#: Values in a bucket's configuration of versions, or of its lock.
_SETTINGS = re.compile(rb">(Enabled|Suspended|GOVERNANCE|COMPLIANCE|\d+)<")
_READ_LIMIT_BYTES = 64 * 2**20


class S3Bucket(Bucket):
    """`Bucket` on one S3 store.

    Calls may come from several threads. Each takes a client that is idle, or makes one.

    Args:
        store: Where it is and with which keys.
        limits: Of each call; None: the store's.
    """

    def __init__(self, store: S3Store, limits: Limits | None = None) -> None:
        self.store, self.limits, self.name = store, limits or store.limits, store.name
        self._idle: list[S3Client] = []

    @classmethod
    def from_connection(cls, conn_id: str, bucket: str, prefix: str = "") -> S3Bucket:
        """Use an Airflow connection of type `aws`, with the limits of a cut-over. See S3Store.from_connection.

        Args:
            conn_id: The connection.
            bucket: The bucket's name.
            prefix: Keys are relative to it; empty: the whole bucket.
        """
        return cls(S3Store.from_connection(conn_id, bucket, prefix, PROMPT))

    @classmethod
    def from_storage(
        cls, config: StorageConfig, prefix: str = "", environment: Mapping[str, str] | None = None
    ) -> S3Bucket:
        """Use the endpoint and the keys of the volume's clients, with the limits of a cut-over.

        Args:
            config: What the clients use.
            prefix: Keys are relative to it; empty: the whole bucket.
            environment: See S3Store.from_storage.
        """
        return cls(S3Store.from_storage(config, prefix, PROMPT, environment))

    def on_side(self, side: str) -> S3Bucket:
        """The same bucket, called one side of a move in messages."""
        return S3Bucket(replace(self.store, side=side), self.limits)

    def close(self) -> None:
        """Close all idle connections. Idempotent; the bucket may be used again."""
        while self._idle:
            self._idle.pop().close()

    @contextmanager
    def _client(self) -> Iterator[S3Client]:
        try:
            client = self._idle.pop()
        except IndexError:
            client = S3Client(self.store, self.limits)
        try:
            yield client
        finally:
            self._idle.append(client)

    def ping(self) -> None:
        """HEAD the bucket, see `LOOK`."""
        client = S3Client(self.store, LOOK)
        try:
            client.call("HEAD", client.bucket_path)
        except UnreachableError:
            raise
        except TransientError:
            return  # it answered, by an error
        finally:
            client.close()

    def check(self, below: str = "") -> None:
        """HEAD the bucket and list one key."""
        with self._client() as client:
            if client.call("HEAD", client.bucket_path).status == 404:
                raise NoBucketError(
                    f"{self.store.where}: expected a bucket, found none.",
                    next_step="make the bucket, or correct its name: it is never created but by a switch with "
                    "`create_bucket`",
                )
            # A HEAD that is refused says nothing: keys limited to a prefix may not HEAD the bucket. A LIST has a body.
            for _ in list_pages(client, below, max_keys=1):
                return

    def is_absent(self, below: str = "") -> bool:
        """Ask whether the store has no bucket of this name. Changes nothing.

        Args:
            below: See `check`.
        """
        try:
            self.check(below)
        except NoBucketError:
            return True
        return False

    def create(self) -> None:
        """Make the bucket, in the region of the store. Idempotent.

        Raises:
            PermanentError: The keys may not, or somebody else has a bucket of this name.
        """
        from xml.sax.saxutils import escape

        region = self.store.region
        # Amazon's first region is the one that must not be named.
        body = b"" if region == "us-east-1" else _LOCATION.format(region=escape(region)).encode()
        with self._client() as client:
            answer = client.call("PUT", client.bucket_path, parts=[body] if body else None, length=len(body))
            if answer.status == 200 or error_code(answer) == "BucketAlreadyOwnedByYou":
                return
            if answer.status == 409:
                raise PermanentError(
                    f"{self.store.where}: the store answered PUT by 409 {error_code(answer)}.",
                    next_step="choose another name: somebody has a bucket of this one",
                )
            raise client.refused("PUT of the bucket", answer)

    def versioning_and_lock(self) -> tuple[str, str]:
        """Read whether the bucket keeps versions, and its object lock, in the store's words."""
        with self._client() as client:
            found = []
            for query in ("versioning", "object-lock"):
                answer = client.call("GET", client.bucket_path, f"{query}=")
                words = _SETTINGS.findall(answer.body) if answer.status == 200 else []
                known = answer.status in (200, 404)
                found.append(" ".join(word.decode() for word in words) or ("none" if known else "not known"))
        return found[0], found[1]

    def knows_keys(self) -> bool:
        """Ask whether the store takes the keys at all, whatever they are allowed to do.

        False where it knows no such access key, or where the secret key is another one.
        """
        with self._client() as client:
            answer = client.call("GET", client.bucket_path, "list-type=2&max-keys=1")
        return error_code(answer) not in _UNKNOWN_KEYS

    def probe(self, key: str, while_there: Callable[[], None] = lambda: None) -> None:
        """PUT, GET, LIST and DELETE one object of our own; it is deleted whatever happens in between."""
        body = os.urandom(16).hex().encode()
        self._change("PUT", key, body)
        try:
            if self.read(key) != body:
                raise PermanentError(
                    f"{self.store.where}: expected of {key} what was written to it, found other content.",
                    next_step="look at the store: a cache or a second site behind the same endpoint?",
                )
            if key not in {item.key for item in self.list(key)}:
                raise PermanentError(
                    f"{self.store.where}: expected {key} in the listing right after it was written, found none.",
                    next_step="check that the keys may list the bucket",
                )
            while_there()
        finally:
            self._change("DELETE", key)

    def takes_writes(self, key: str) -> bool | None:
        """Ask whether the keys may write an object, and write nothing: copy to it an object that does not exist.

        S3 looks at the right to write before it looks for what is to be copied.

        Args:
            key: Of our own; nothing may be there, nor under it with `-absent` at its end.

        Returns:
            None where that cannot be told: the keys may not read either, or the store does not copy objects.
        """
        absent = f"{key}-absent"
        if not self.knows_keys():
            return False
        try:
            if self.exists(absent):
                return None
        except PermanentError:
            return None  # a copy could be refused for what it reads
        with self._client() as client:
            source = ("x-amz-copy-source", client.copy_source(absent))
            answer = client.call("PUT", client.path(key), headers=(source,), length=0)
        if answer.status == 404 and error_code(answer) == "NoSuchKey":
            return True
        return False if answer.status == 403 else None

    def _change(self, method: str, key: str, body: bytes = b"") -> None:
        with self._client() as client:
            length, headers = None, client.new_headers if method == "PUT" else ()
            if method == "PUT":
                # A bucket with an object lock wants it.
                digest = b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()
                length, headers = len(body), (*headers, ("content-md5", digest))
            answer = client.call(
                method, client.path(key), headers=headers, parts=[body] if body else None, length=length
            )
            if answer.status not in (200, 204):
                raise client.refused(f"{method} {key}", answer)

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """List a range in order, page by page."""
        with self._client() as client:
            for listing in list_pages(client, keys.folder, keys):
                if listing.page.keys:
                    yield listing.page

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """List every object whose key begins with this, in order."""
        with self._client() as client:
            for listing in list_pages(client, prefix):
                yield from map(StoredObject, *listing.page)

    def newer(self, prefix: str, than: datetime) -> Iterator[StoredObject]:
        """List the objects below a prefix that were written after a moment, by the store's clock."""
        stamp = than.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S")
        with self._client() as client:
            for listing in list_pages(client, prefix, dates=True):
                for row, modified in zip(zip(*listing.page, strict=True), listing.modified, strict=True):
                    if modified[: len(stamp)] > stamp:
                        yield StoredObject(*row)

    def now(self) -> datetime:
        """Read the Date of an answer; where a server sends none, this machine's clock."""
        from email.utils import parsedate_to_datetime

        with self._client() as client:
            date = client.call("HEAD", client.bucket_path).headers.get("date", "")
        try:
            return parsedate_to_datetime(date).astimezone(UTC)
        except (ValueError, OverflowError):
            return datetime.now(UTC).replace(microsecond=0)

    def first_after(self, key: str) -> str | None:
        """Find the first key after this one: one LIST of one key."""
        with self._client() as client:
            for listing in list_pages(client, keys=KeyRange(after=key or None), max_keys=1):
                for found in listing.page.keys:
                    return found
        return None

    def head(self, key: str) -> StoredObject | None:
        """HEAD one object; None where there is none."""
        with self._client() as client:
            found = client.call("HEAD", client.path(key))
            if found.status == 404:
                return None
            if found.status != 200:
                raise client.refused(f"HEAD {key}", found)
            client.expect_s3(f"HEAD {key}", found.headers)
            size = found.headers.get("content-length", "")
            if not size.isdecimal():
                raise client.not_s3(f"HEAD {key}", found.headers, "no Content-Length")
            etag, modified = found.headers.get("etag", "").strip('"'), found.headers.get("last-modified", "")
            return StoredObject(key, int(size), etag, modified)

    def exists(self, key: str) -> bool:
        """HEAD one object."""
        return self.head(key) is not None

    def read(self, key: str) -> bytes | None:
        """Read one small object; None where there is none."""
        found = self._stream(key, lambda _: _Content(), _READ_LIMIT_BYTES)
        return None if found is None else bytes(found.content)

    def read_into(self, key: str, make: Callable[[Mapping[str, str]], SomeSink]) -> SomeSink | None:
        """Read one small object piece by piece into what is made of its headers; None where there is none."""
        return self._stream(key, make, _READ_LIMIT_BYTES)

    def digest(self, key: str) -> str | None:
        """Read one object and hash it: SHA-256."""
        found = self._stream(key, lambda _: hashlib.sha256())
        return None if found is None else found.hexdigest()

    def md5(self, key: str) -> str | None:
        """Read one object and hash it: MD5."""
        found = self._stream(key, lambda _: hashlib.md5(usedforsecurity=False))
        return None if found is None else found.hexdigest()

    def _stream(
        self, key: str, make: Callable[[Mapping[str, str]], SomeSink], limit_bytes: int = OBJECT_LIMIT_BYTES
    ) -> SomeSink | None:
        with self._client() as client:
            client.denied = None
            try:
                return drive(stream(client, key, make, limit_bytes), self.limits)
            except (ObjectError, TooLongError) as error:
                if client.denied is not None:
                    raise client.denied from None
                raise TransientError(f"{self.name}, {key}: {error}.", next_step="look at the store") from None


class _Content:
    """Keeps an object's bytes."""

    def __init__(self) -> None:
        self.content = bytearray()

    def update(self, data: bytes | memoryview, /) -> None:
        self.content += data

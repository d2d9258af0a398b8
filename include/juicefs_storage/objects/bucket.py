"""A bucket as every part of the project sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from include.juicefs_storage.objects.model import KeyRange, Page


@dataclass(frozen=True, slots=True)
class StoredObject:
    """One object of a listing, or of a HEAD, which alone tells when it was written.

    Attributes:
        etag: Without quotes.
        modified: The header Last-Modified as the store gives it; empty in a listing.
    """

    key: str
    size_bytes: int
    etag: str
    modified: str = ""


class Sink(Protocol):
    """Takes the bytes of an object: a hash, or a buffer."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take the next piece."""


SomeSink = TypeVar("SomeSink", bound=Sink)


class Bucket(Protocol):
    """One bucket of an object store, below a prefix. Keys are relative to the prefix, which may be empty.

    Every call ends in time: with what was asked for, or with an error that names the store. Each may raise
    PermanentError (no such bucket, keys refused, a certificate that is not trusted, clocks that differ) and
    TransientError (no answer in time, or an answer that no S3 store gives). Calls may come from several threads.
    """

    name: str
    """For messages: bucket, prefix and endpoint; no keys."""

    def ping(self) -> None:
        """Find out within seconds whether anything answers at all; a refusal is an answer.

        Raises:
            UnreachableError: Nothing does, or it is slow: `check` is more patient.
        """

    def check(self, below: str = "") -> None:
        """List one key, which shows that the bucket is there and that the keys may use it. Never create it.

        Args:
            below: Keys limited to a part of the bucket may list only below this.
        """

    def probe(self, key: str, while_there: Callable[[], None] = lambda: None) -> None:
        """PUT, GET, LIST and DELETE one small object under a key of our own.

        Args:
            key: Nothing may be there.
            while_there: Called before the object is deleted again.

        Raises:
            PermanentError: What was read or listed is not what was written.
        """

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """List a range in order, page by page (ListObjectsV2, 1,000 keys a page)."""

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """List every object whose key begins with this, ordered by the key's UTF-8 bytes."""

    def newer(self, prefix: str, than: datetime) -> Iterator[StoredObject]:
        """List every object whose key begins with this and that was written after a moment, by the store's clock."""

    def now(self) -> datetime:
        """Read the store's clock (UTC); it has whole seconds."""

    def first_after(self, key: str) -> str | None:
        """Find the first key after this one (which need not exist): one LIST of one key."""

    def head(self, key: str) -> StoredObject | None:
        """HEAD one object; None where there is none."""

    def exists(self, key: str) -> bool:
        """HEAD one object."""

    def read(self, key: str) -> bytes | None:
        """Read one small object, 64 MiB at most; None where there is none."""

    def read_into(self, key: str, make: Callable[[Mapping[str, str]], SomeSink]) -> SomeSink | None:
        """Read one object, 64 MiB at most, piece by piece into what is made of its headers; None where there is none.

        Args:
            key: The object's.
            make: Gets the headers, with their names in lower case; called anew for each try.
        """

    def digest(self, key: str) -> str | None:
        """Read one object as a stream and hash it: SHA-256 in hex; None where there is none."""

    def md5(self, key: str) -> str | None:
        """Read one object as a stream and hash it: MD5 in hex; None where there is none."""

"""A bucket that does not exist yet."""
# ruff: noqa: ARG002  nothing is there, whatever is asked for

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import NoReturn

from include.juicefs_storage.errors import NoBucketError
from include.juicefs_storage.objects.bucket import Bucket, SomeSink, StoredObject
from include.juicefs_storage.objects.model import KeyRange, Page


class NoBucketYet(Bucket):
    """Nothing is in it, and nothing can be written to it.

    Args:
        name: For messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self) -> NoReturn:
        raise NoBucketError(f"{self.name}: this bucket does not exist yet.", next_step="make it first")

    def ping(self) -> None:
        """Raise NoBucketError."""
        self._refuse()

    def check(self, below: str = "") -> None:
        """Raise NoBucketError."""
        self._refuse()

    def probe(self, key: str, while_there: Callable[[], None] = lambda: None) -> None:
        """Raise NoBucketError."""
        self._refuse()

    def now(self) -> datetime:
        """Raise NoBucketError."""
        self._refuse()

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """List nothing."""
        return iter(())

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """List nothing."""
        return iter(())

    def newer(self, prefix: str, than: datetime) -> Iterator[StoredObject]:
        """List nothing."""
        return iter(())

    def first_after(self, key: str) -> str | None:
        """Find nothing."""
        return None

    def head(self, key: str) -> StoredObject | None:
        """Find nothing."""
        return None

    def exists(self, key: str) -> bool:
        """Find nothing."""
        return False

    def read(self, key: str) -> bytes | None:
        """Find nothing."""
        return None

    def read_into(self, key: str, make: Callable[[Mapping[str, str]], SomeSink]) -> SomeSink | None:
        """Find nothing."""
        return None

    def digest(self, key: str) -> str | None:
        """Find nothing."""
        return None

    def md5(self, key: str) -> str | None:
        """Find nothing."""
        return None

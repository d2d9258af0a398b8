"""What a bucket of the stub store holds: sizes and ETags, and the pages of its listing."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

from lab.s3_wire import contents, list_page

MODIFIED = "2026-01-01T00:00:00.000Z"
_SAFE_KEY = re.compile(r"[\w./-]+", re.ASCII)


@dataclasses.dataclass(slots=True)
class Stored:
    """An object. `body` is None where pattern and tail are the content."""

    key: str
    size: int
    etag: str
    tail: bytes
    body: bytes | None = None
    listed: str = ""  # its part of a listing, made once

    def entry(self, *, encoded: bool) -> str:
        """Its part of a listing."""
        if self.listed:
            return self.listed
        safe = _SAFE_KEY.fullmatch(self.key) is not None
        entry = contents(self.key, self.size, self.etag, MODIFIED, encoded=encoded)
        if safe:
            self.listed = entry
        return entry


class Bucket:
    """Objects by key, and their order."""

    def __init__(self, page_keys: int = 1000) -> None:
        self.page_keys = page_keys
        self.objects: dict[str, Stored] = {}
        self.requests: Counter[str] = Counter()
        self._keys: list[str] = []
        self._changed = False
        self.pages: dict[str, bytes] = {}

    def put(self, stored: Stored) -> None:
        """Add or replace an object."""
        if stored.key not in self.objects:
            self._keys.append(stored.key)
            self._changed = True
        self.objects[stored.key] = stored
        self.pages.clear()

    def delete(self, key: str) -> None:
        """Forget an object, if it is there."""
        if self.objects.pop(key, None):
            self._keys.remove(key)
            self.pages.clear()

    def page(self, query: str) -> str:
        """The answer to ListObjectsV2."""
        objects = self.objects
        return list_page(self.keys, query, lambda key, encoded: objects[key].entry(encoded=encoded), self.page_keys)

    @property
    def keys(self) -> list[str]:
        """All keys in order."""
        if self._changed:
            self._keys.sort()
            self._changed = False
        return self._keys

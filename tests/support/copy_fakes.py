"""A copy's two sides and its engine, in memory."""

from __future__ import annotations

import hashlib
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import format_datetime
from itertools import pairwise

from include.juicefs_storage.copy.partitions import Partition
from include.juicefs_storage.objects.bucket import Bucket, SomeSink, StoredObject
from include.juicefs_storage.objects.model import Compared, Comparison, Copied, KeyRange, Listed, ObjectOutcome, Page
from tests.support.bare import unexpected


def etag(body: bytes) -> str:
    return hashlib.md5(body, usedforsecurity=False).hexdigest()


class KilledError(BaseException):
    """The process died."""


@dataclass
class MemoryBucket(Bucket):
    """A bucket on a dict; `etags` replaces what the listing says of a key, which leaves out what is `hidden`."""

    objects: dict[str, bytes] = field(default_factory=dict)
    name: str = "memory"
    page_keys: int = 3
    etags: dict[str, str] = field(default_factory=dict)
    lists: int = 0
    hashed: MutableSequence[str] = field(default_factory=list)
    modified: dict[str, str] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)

    def write(self, key: str, body: bytes, at: datetime) -> None:
        """Write an object at a moment."""
        self.objects[key], self.modified[key] = body, format_datetime(at, usegmt=True)

    def ping(self) -> None:
        pass

    def check(self, below: str = "") -> None:
        pass

    def probe(self, key: str, while_there: Callable[[], None] = lambda: None) -> None:
        self.objects[key] = b"probe"
        while_there()
        del self.objects[key]

    def list(self, prefix: str) -> Iterator[StoredObject]:
        for page in self.pages(KeyRange()):
            yield from (item for item in map(StoredObject, *page) if item.key.startswith(prefix))

    def head(self, key: str) -> StoredObject | None:
        body = self.objects.get(key)
        return (
            None
            if body is None
            else StoredObject(key, len(body), self.etags.get(key) or etag(body), self.modified.get(key, ""))
        )

    def exists(self, key: str) -> bool:
        return key in self.objects

    def read(self, key: str) -> bytes | None:
        return self.objects.get(key)

    def read_into(self, key: str, make: Callable[[Mapping[str, str]], SomeSink]) -> SomeSink | None:
        unexpected("read_into")

    def digest(self, key: str) -> str | None:
        return hashlib.sha256(self.objects[key]).hexdigest() if key in self.objects else None

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        after = keys.after
        while True:
            self.lists += 1
            ordered = sorted(self.objects.keys() - self.hidden)
            start = bisect_right(ordered, after) if after is not None else 0
            found = [key for key in ordered[start : start + self.page_keys] if keys.until is None or key <= keys.until]
            if not found:
                return
            yield Page(
                found,
                [len(self.objects[key]) for key in found],
                [self.etags.get(key) or etag(self.objects[key]) for key in found],
            )
            after = found[-1]

    def newer(self, prefix: str, than: datetime) -> Iterator[StoredObject]:
        unexpected("newer")

    def now(self) -> datetime:
        unexpected("now")

    def first_after(self, key: str) -> str | None:
        self.lists += 1
        return min((other for other in self.objects if other > key), default=None)

    def md5(self, key: str) -> str | None:
        self.hashed.append(key)
        return etag(self.objects[key]) if key in self.objects else None


@dataclass
class MemoryEngine:
    """`model.Engine` between two of them; dies after `dies_after` objects, fails the keys in `fails`."""

    source: MemoryBucket
    target: MemoryBucket
    dies_after: int | None = None
    fails: set[str] = field(default_factory=set)
    copied: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        return [self._copy(*listed, overwrite) for listed in objects]

    def _copy(self, key: str, size: int, _: str, overwrite: bool) -> Copied:
        if self.dies_after is not None and len(self.copied) >= self.dies_after:
            raise KilledError
        if key in self.fails:
            return Copied(ObjectOutcome.FAILED, detail="refused")
        if key not in self.source.objects:
            return Copied(ObjectOutcome.VANISHED)
        if len(self.source.objects[key]) != size:
            return Copied(ObjectOutcome.CHANGED)
        self.copied.append(key)
        self.target.objects[key] = self.source.objects[key]
        return Copied(
            ObjectOutcome.OVERWRITTEN if overwrite else ObjectOutcome.COPIED,
            etag(self.source.objects[key]),
            Comparison.ETAG,
        )

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        self.compared += [key for key, _, _ in objects]
        found = []
        for key, _, _ in objects:
            one, other = self.source.objects.get(key), self.target.objects.get(key)
            if one is None:
                found.append(Compared(ObjectOutcome.VANISHED))
            elif other is None:
                found.append(Compared(ObjectOutcome.MISSING))
            else:
                found.append(Compared(ObjectOutcome.SAME if one == other else ObjectOutcome.DIFFERENT, etag(one)[:16]))
        return found


class ListingBucket(MemoryBucket):
    """Keys and sizes alone, sorted once; a LIST takes some time, as a real one does."""

    def __init__(self, sizes: dict[str, int], page_keys: int = 100, latency_s: float = 0.0) -> None:
        super().__init__(page_keys=page_keys)
        self.sizes, self.ordered, self.latency_s = sizes, sorted(sizes), latency_s
        self.at_once: set[int] = set()
        self.most_at_once = 0

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        at = bisect_right(self.ordered, keys.after) if keys.after is not None else 0
        end = bisect_right(self.ordered, keys.until) if keys.until is not None else len(self.ordered)
        while at < end:
            self.at_once.add(threading.get_ident())
            self.most_at_once = max(self.most_at_once, len(self.at_once))
            time.sleep(self.latency_s)
            self.at_once.discard(threading.get_ident())
            found = self.ordered[at : min(end, at + self.page_keys)]
            yield Page(found, [self.sizes[key] for key in found], [""] * len(found))
            at += len(found)

    def first_after(self, key: str) -> str | None:
        time.sleep(self.latency_s)
        at = bisect_right(self.ordered, key)
        return self.ordered[at] if at < len(self.ordered) else None


def assert_covered(partitions: list[Partition], sizes: dict[str, int], keys: KeyRange | None = None) -> None:
    """No gap, no overlap, and each says what is in it."""
    whole = keys or KeyRange()
    assert (partitions[0].after, partitions[-1].until) == (whole.after, whole.until)
    assert [one.until for one in partitions[:-1]] == [other.after for other in partitions[1:]]
    assert all(one.until is not None for one in partitions[:-1])
    assert all(str(one.until) < str(other.until) for one, other in pairwise(partitions[:-1]))
    for partition in partitions:
        inside = [
            size
            for key, size in sizes.items()
            if (partition.after is None or key > partition.after)
            and (partition.until is None or key <= partition.until)
        ]
        assert (partition.objects, partition.bytes) == (len(inside), sum(inside))

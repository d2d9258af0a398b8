"""Objects described instead of stored: which keys there are, how large they are, what is in them.

The content of an object is a stretch of one fixed pattern and 32 bytes of its own at the end. So any object of any size
is made without being kept, its MD5 costs one block of hashing, and two objects of one size never have the same content.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

KIB = 1024
MIB = 1024 * KIB

#: The largest object that can be described.
MAX_BYTES = 16 * MIB
#: The bytes at the end that are an object's own.
TAIL_BYTES = 32

Layout: TypeAlias = Literal["juicefs", "flat"]

# Random, so that nothing on the way can compress it; of a fixed seed, so that every process has the same.
_PATTERN_BYTES = random.Random(4).randbytes(MIB)  # noqa: S311


@functools.cache
def pattern() -> bytes:
    """What every object begins with."""
    return _PATTERN_BYTES * (MAX_BYTES // MIB)


@functools.lru_cache(maxsize=4096)
def _hashed_pattern(size: int) -> hashlib._Hash:
    """MD5 of the pattern's first `size` bytes, to go on from."""
    return hashlib.md5(memoryview(pattern())[:size], usedforsecurity=False)


def etag(size: int, tail: bytes) -> str:
    """MD5 in hex of the pattern's stretch followed by the tail, `size` bytes in all."""
    state = _hashed_pattern(size - len(tail)).copy()
    state.update(tail)
    return state.hexdigest()


def tail(number: int, generation: int = 0) -> bytes:
    """The object's own end. Another generation is another content of the same size."""
    return b"%024x%08x" % (number, generation)


def content(size: int, end: bytes) -> bytes:
    """The whole object."""
    return pattern()[: size - len(end)] + end


@dataclass(frozen=True)
class Population:
    """The objects of a bucket, by description.

    Attributes:
        count: How many.
        size: Of each, in bytes; 0: the mix of a JuiceFS volume, about 238 KiB on average.
        layout: JuiceFS' keys (`vol/chunks/0/12/12345_0_4096`) or one flat prefix.
        skip_every: Every n-th object is left out; 0: none is.
        differ_every: Every n-th object has other content of the same size; 0: none has.
        page_keys: Keys in a page of its listing.
    """

    count: int
    size: int = 4 * KIB
    layout: Layout = "juicefs"
    skip_every: int = 0
    differ_every: int = 0
    page_keys: int = 1000

    def objects(self) -> Iterator[tuple[str, int, bytes]]:
        """Key, size and tail of each."""
        for number in range(1, self.count + 1):
            if self.skip_every and number % self.skip_every == 0:
                continue
            size = self.size or _mixed(number)
            generation = int(bool(self.differ_every) and number % self.differ_every == 0)
            if self.layout == "juicefs":
                key = f"vol/chunks/{number // 1_000_000}/{number // 1000}/{number}_0_{size}"
            else:
                key = f"vol/{number:012d}"
            yield key, size, tail(number, generation)


def _mixed(number: int) -> int:
    """Of twenty objects: one full block of 4 MiB, six of 32 to 160 KiB, thirteen of 4 to 16 KiB."""
    place = number % 20
    if place == 0:
        return 4 * MIB
    if place <= 6:
        return (32 + number * 4 % 132) * KIB
    return 4 * (1 + number % 4) * KIB

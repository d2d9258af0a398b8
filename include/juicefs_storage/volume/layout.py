"""From a slice of the metadata to the keys of the objects that hold it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from include.juicefs_storage.volume.setting import Setting

#: Below the volume's name: written by `juicefs format`, holds the volume's UUID; may be absent.
UUID_OBJECT = "juicefs_uuid"
_BLOCK = re.compile(r"/(\d+)_\d+_(\d+)$")
#: Output bytes that one byte of compressed data stands for at most: LZ4 spends a byte on every 255 of a long match
#: (lz4_Block_format.md), Zstandard four on a block of 128 KiB of one byte (RFC 8878, 3.1.1.2).
_MOST_FROM_A_BYTE = {"lz4": 255, "zstd": 32 * 1024}
#: A key wrapped by RSA of up to 16,384 bits, its lengths, a nonce and a tag (pkg/object/encrypt.go of JuiceFS 1.4).
_ENCRYPTION_BYTES = 2_200


@dataclass(frozen=True, slots=True)
class ObjectSizes:
    """How long the object of a block may be. Exact, unless the volume compresses or encrypts.

    Attributes:
        compression: Empty, `lz4` or `zstd`.
        encrypted: Whether something is added to each object.
    """

    compression: str = ""
    encrypted: bool = False

    @classmethod
    def of(cls, setting: Setting) -> ObjectSizes:
        """Take them from a volume's setting."""
        return cls(setting.compression, setting.encrypted)

    @property
    def exact(self) -> bool:
        """Whether an object is as long as its block."""
        return not self.compression and not self.encrypted

    def fit(self, length: int, size: int) -> bool:
        """Return whether an object of `size` bytes can hold a block of `length` bytes.

        What cannot be is an object that was cut. What can be is not proven to be whole, unless `exact`.
        """
        if self.exact:
            return size == length
        low = -(-length // _MOST_FROM_A_BYTE.get(self.compression, length or 1)) if self.compression else length
        # Both say how much incompressible data may grow by: n/255 + 16 (LZ4), n/256 + 64 at most (Zstandard).
        high = length + (length // 255 + 64 if self.compression else 0)
        return low <= size <= high + (_ENCRYPTION_BYTES if self.encrypted else 0)


def block_objects(setting: Setting, slice_id: int, size: int) -> Iterator[tuple[str, int]]:
    """Yield the objects of one slice: key and uncompressed length in bytes.

    The layout is `cachedStore.key` of JuiceFS 1.4 (pkg/chunk/cached_store.go); the volume's name is the prefix.

    Args:
        setting: The volume's setting: name, block size, hash prefix.
        slice_id: `chunkid` of table `jfs_chunk_ref`.
        size: `size` of that row in bytes.
    """
    block_bytes = setting.block_bytes
    if setting.hash_prefix:
        folder = f"{slice_id % 256:02X}/{slice_id // 1_000_000}"
    else:
        folder = f"{slice_id // 1_000_000}/{slice_id // 1_000}"
    start = f"{setting.name}/chunks/{folder}/{slice_id}_"
    for index in range((size + block_bytes - 1) // block_bytes):
        length = min(block_bytes, size - index * block_bytes)
        yield f"{start}{index}_{length}", length


def shard_of(key: str, shards: int) -> int:
    """Return the number, from 0, of the sharded volume's bucket in which an object lies.

    32-bit FNV-1a of the whole key, the volume's name included: `pick` in pkg/object/sharding.go, with the name put
    before the key by `createStorage` in cmd/format.go of JuiceFS 1.4.
    """
    value = 0x811C9DC5
    for byte in key.encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value % shards


def slice_of(key: str) -> int:
    """Return the id of the slice that a block belongs to; -1 where the key is not a block's."""
    found = _BLOCK.search(key)
    return int(found[1]) if found else -1


def length_of(key: str) -> int:
    """Return the uncompressed length in bytes of a block; -1 where the key is not a block's."""
    found = _BLOCK.search(key)
    return int(found[2]) if found else -1

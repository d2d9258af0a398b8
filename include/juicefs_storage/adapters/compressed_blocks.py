"""Find out whether compressed blocks are whole. No listing shows it: they are read and decompressed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from include.juicefs_storage.objects.bucket import Bucket

#: JuiceFS' names of the formats, and Arrow's: LZ4 blocks without a frame, Zstandard frames.
CODECS = {"lz4": "lz4_raw", "zstd": "zstd"}


@dataclass
class CompressedBlocks:
    """The compressed blocks of a volume in one bucket.

    Attributes:
        bucket: Where they are.
        compression: A key of CODECS.
        concurrency: Blocks that are read at once; each is held in memory.
    """

    bucket: Bucket
    compression: str
    concurrency: int = 8

    def problems(self, blocks: Sequence[tuple[str, int]]) -> list[str]:
        """Say what is wrong with each block, by key and length; empty where nothing is, or where it is gone by now.

        Raises:
            TransientError: One cannot be read.
            PermanentError: The store refuses.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return list(pool.map(lambda block: self._problem(*block), blocks))
            finally:
                pool.shutdown(cancel_futures=True)

    def _problem(self, key: str, length: int) -> str:
        found = self.bucket.read(key)
        if found is None or holds(found, length, self.compression):
            return ""
        return f"{len(found)} bytes that do not decompress to a block of {length} bytes"


def holds(content: bytes, length: int, compression: str) -> bool:
    """Report whether an object decompresses to exactly `length` bytes.

    Args:
        content: The object.
        length: The block's length in bytes.
        compression: `lz4` or `zstd`.
    """
    # Arrow does not return the decompressed length: it is at most `length`, and at least if all of that is needed.
    return _fits(content, length, compression) and not _fits(content, length - 1, compression)


def _fits(content: bytes, room: int, compression: str) -> bool:
    import pyarrow as pa

    if room <= 0:
        return False
    try:
        pa.decompress(content, decompressed_size=room, codec=CODECS[compression])
    except (OSError, pa.ArrowException):
        return False
    return True

"""Find out whether blocks are whole where no other copy is at hand. No listing shows it: they are read.

Two things tell: the checksum that JuiceFS left with the object, and that a compressed block decompresses to its length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.volume.checksum import Crc32c, checksum_problem, recorded_checksum
from include.juicefs_storage.volume.layout import ObjectSizes

#: JuiceFS' names of the formats, and Arrow's: LZ4 blocks without a frame, Zstandard frames.
CODECS = {"lz4": "lz4_raw", "zstd": "zstd"}
#: What is said of a block that a listing had and that is not there.
GONE = "listed, and not there when it was read"
#: What tells that a block is whole: its checksum, decompression alone, or its length alone, which is little.
How = Literal["checksum", "decompressed", "length"]


@dataclass
class BlockContents:
    """The blocks of a volume in one bucket.

    Attributes:
        bucket: Where they are.
        sizes: How the volume stores them. Those that are encrypted cannot be decompressed.
        concurrency: Blocks that are read at once. A compressed one is held in memory, 16 MiB at most.
        told_by: How many blocks were found whole by what.
    """

    bucket: Bucket
    sizes: ObjectSizes
    concurrency: int = 8
    told_by: Counter[How] = field(default_factory=Counter)

    def problems(self, blocks: Sequence[tuple[str, int]]) -> list[str]:
        """Say what is wrong with each block, by key and length; empty where nothing is, `GONE` where it is not there.

        Raises:
            TransientError: One cannot be read.
            PermanentError: The store refuses.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                found = list(pool.map(lambda block: self._look(*block), blocks))
            finally:
                pool.shutdown(cancel_futures=True)
        self.told_by.update(how for problem, how in found if not problem)
        return [problem for problem, _ in found]

    def _look(self, key: str, length: int) -> tuple[str, How]:
        sizes = self.sizes
        decompress = sizes.compression in CODECS and not sizes.encrypted
        found = self.bucket.read_into(key, lambda headers: _Content(headers, keep=decompress))
        if found is None:
            return GONE, "length"
        problem = checksum_problem(found.headers, found.checksum)
        if not problem and not sizes.fit(length, found.size_bytes):
            problem = f"{found.size_bytes} bytes that cannot hold a block of {length} bytes"
        if not problem and decompress and not holds(bytes(found.kept), length, sizes.compression):
            problem = f"{found.size_bytes} bytes that do not decompress to a block of {length} bytes"
        checked = recorded_checksum(found.headers) is not None
        return problem, "checksum" if checked else "decompressed" if decompress else "length"


class _Content:
    """An object as it comes in.

    Args:
        headers: Of the answer.
        keep: Keep the bytes.
    """

    def __init__(self, headers: Mapping[str, str], *, keep: bool) -> None:
        self.headers, self.checksum, self.size_bytes = headers, Crc32c(), 0
        self.kept, self._keep = bytearray(), keep

    def update(self, data: bytes | memoryview, /) -> None:
        self.size_bytes += len(data)
        self.checksum.update(data)
        if self._keep:
            self.kept += data


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

"""Whether compressed blocks are whole, which no listing tells: they are read and decompressed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from include.juicefs_storage.adapters.s3.client import ObjectError, S3Client, S3Store, digest
from include.juicefs_storage.adapters.s3.http import Limits, drive
from include.juicefs_storage.errors import TransientError

#: JuiceFS' names of the formats, and Arrow's: LZ4 blocks without a frame, Zstandard frames.
CODECS = {"lz4": "lz4_raw", "zstd": "zstd"}


class _Body:
    """Takes an object's bytes where a hash does otherwise."""

    def __init__(self) -> None:
        self.content = bytearray()

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        self.content += data

    def hexdigest(self) -> str:
        return ""


@dataclass
class CompressedBlocks:
    """The compressed blocks of a volume in one store.

    Attributes:
        compression: A key of CODECS.
        concurrency: Blocks that are read at once; each is held in memory.
    """

    store: S3Store
    compression: str
    concurrency: int = 8
    limits: Limits = field(default_factory=Limits)

    def problems(self, blocks: Sequence[tuple[str, int]]) -> list[str]:
        """What is wrong with each block, by key and length; empty where nothing is, or where it is not there any more.

        Raises:
            TransientError: One cannot be read.
            PermanentError: The store refuses.
        """
        own = threading.local()
        clients: list[S3Client] = []

        def problem(block: tuple[str, int]) -> str:
            if not hasattr(own, "client"):
                own.client = S3Client(self.store, self.limits)
                clients.append(own.client)
            return self._problem(own.client, *block)

        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return list(pool.map(problem, blocks))
            finally:
                pool.shutdown(cancel_futures=True)
                for client in clients:
                    client.close()

    def _problem(self, client: S3Client, key: str, length: int) -> str:
        bodies: list[_Body] = []

        def make() -> _Body:
            bodies[:] = [_Body()]  # a second try begins anew
            return bodies[0]

        try:
            found = drive(digest(client, key, make), self.limits)
        except ObjectError as error:
            raise TransientError(f"{self.store.name}: {error}.", next_step="look at the store") from None
        if found is None or holds(bytes(bodies[0].content), length, self.compression):
            return ""
        return f"{len(bodies[0].content)} bytes that do not decompress to a block of {length} bytes"


def holds(content: bytes, length: int, compression: str) -> bool:
    """Whether an object decompresses to exactly so many bytes."""
    # Arrow does not tell how many bytes came out: no more than it has room for, and no less if it needs all of that.
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

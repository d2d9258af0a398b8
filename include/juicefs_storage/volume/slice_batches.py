"""Which slices were committed at a moment, small enough for an XCom: a digest for each batch of ids.

A client takes slice ids in batches and uses one up however slowly, so a slice that is committed later may have an id
from long ago. It changes the digest of its batch.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from include.juicefs_storage.volume.needed import ID_BATCH

#: How many batches are recorded at most, the newest: 200 million ids, 400 KB.
_MOST_BATCHES = 50_000
_ID, _ROW = struct.Struct("<Q"), struct.Struct("<QI")


def batch_of(slice_id: int) -> int:
    """Return the number of the batch that an id belongs to."""
    return slice_id // ID_BATCH


def digest_of(slice_ids: Iterable[int]) -> int:
    """Return a digest of the ids in a batch, in any order. Two sets collide by chance once in 4 billion."""
    return sum(zlib.crc32(_ID.pack(slice_id)) for slice_id in slice_ids) & 0xFFFFFFFF


@dataclass(frozen=True)
class SliceBatches:
    """The digests of the batches, as they were at one moment.

    Attributes:
        digests: Number of a batch -> its digest; a batch without slices is left out.
        first: The lowest batch that was recorded. What is below is not known, and counts as unchanged.
    """

    digests: Mapping[int, int] = field(repr=False)
    first: int = 0

    @classmethod
    def of(cls, slices: Iterable[tuple[int, int]]) -> SliceBatches:
        """Read id and size of every slice, in whatever order."""
        sums: dict[int, int] = {}
        for slice_id, _ in slices:
            batch = batch_of(slice_id)
            sums[batch] = sums.get(batch, 0) + zlib.crc32(_ID.pack(slice_id))
        first = sorted(sums)[-_MOST_BATCHES] if len(sums) > _MOST_BATCHES else 0
        return cls({batch: total & 0xFFFFFFFF for batch, total in sums.items() if batch >= first}, first)

    def unchanged(self, batch: int, slice_ids: Iterable[int]) -> bool:
        """Return whether a batch still holds exactly these slices."""
        return batch < self.first or self.digests.get(batch, 0) == digest_of(slice_ids)

    def to_text(self) -> str:
        """Encode as text for an XCom."""
        rows = b"".join(_ROW.pack(*row) for row in sorted(self.digests.items()))
        return base64.b64encode(zlib.compress(_ROW.pack(self.first, 0) + rows)).decode()

    @classmethod
    def from_text(cls, text: str) -> SliceBatches:
        """Read what `to_text` wrote."""
        (first, _), *rows = _ROW.iter_unpack(zlib.decompress(base64.b64decode(text)))
        return cls(dict(rows), first)

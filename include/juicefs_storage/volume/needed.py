"""Which objects a volume needs, by its metadata, in the order of a listing: two streams to compare, nothing to hold.

Ids are numbers and keys are strings: `chunks/10/…` lies before `chunks/2/…`. Among ids with the same number of digits
both orders agree, so the keys in order are a merge of one stream per number of digits.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import groupby, islice
from typing import TYPE_CHECKING

from include.juicefs_storage.objects.model import KeyRange, Page
from include.juicefs_storage.volume.layout import block_objects, shard_of

if TYPE_CHECKING:
    from include.juicefs_storage.ports import MetadataStore
    from include.juicefs_storage.volume.setting import Setting

#: A client takes slice ids in batches of so many (sliceIdBatch in pkg/meta/base.go of JuiceFS 1.4).
ID_BATCH = 4096
_HASHES = 256
_DIGITS = 19  # of a 63-bit id
_PAGE_KEYS = 1_000
_ROW = struct.Struct("<QI")
#: How much of each hash's slices is held in memory: a million slices need no file.
_HELD_BYTES = 64 * 1024


def watermark(metadata: MetadataStore) -> int:
    """Return the slice id from which the next delta begins: below what was given out by now and live clients may use.

    Read it before the slices. A client uses up its batch of ids however slowly: what one that writes little commits
    later, under an id from long ago, no delta sees, and only a run without `since_id` does.
    """
    given_out = metadata.next_slice()
    return max(0, given_out - ID_BATCH * len(metadata.sessions()))


def needed_objects(
    metadata: MetadataStore, setting: Setting, first_id: int = 0, shard: int | None = None
) -> Iterator[tuple[str, int]]:
    """Yield key and uncompressed length of every block that some file refers to, ordered by the key's UTF-8 bytes.

    Memory does not grow with the number of slices: with HashPrefix, more than a million go through temporary files, 12
    bytes each. Blocks that a client has staged (writeback) and not uploaded yet are among them.

    Args:
        metadata: `jfs_chunk_ref` is read once, in ranges of its primary key.
        setting: The volume's name and layout.
        first_id: Leave out slices with a lower id.
        shard: Only what lies in this one of the volume's buckets, counted from 0; None: whatever bucket it lies in.
    """

    def blocks(slices: Iterator[tuple[int, int]]) -> Iterator[tuple[str, int]]:
        for slice_id, size in slices:
            found = sorted(block_objects(setting, slice_id, size))
            yield from found if shard is None else (it for it in found if shard_of(it[0], setting.shards) == shard)

    if setting.hash_prefix:
        for same_hash in _by_hash(metadata, first_id):
            yield from heapq.merge(*(blocks(slices) for slices in same_hash))
    else:
        bounds = [10**digits for digits in range(1, _DIGITS)]
        ranges = zip([0, *bounds], [*bounds, None], strict=True)
        yield from heapq.merge(
            *(
                blocks(metadata.slices(max(low, first_id), high))
                for low, high in ranges
                if high is None or high > first_id
            )
        )


def to_pages(
    blocks: Iterator[tuple[str, int]],
    prefix: str = "",
    keys: KeyRange | None = None,
    taken: Callable[[str], object] | None = None,
) -> Iterator[Page]:
    """Yield blocks in pages, as a side would list them.

    Args:
        blocks: Key and length, in the order of a listing.
        prefix: Of the side; the keys begin with it.
        keys: Only these.
        taken: Only the keys that it takes.
    """
    after, until = (keys.after, keys.until) if keys else (None, None)
    start = len(prefix)
    rows = (
        row
        for key, length in blocks
        if ((row := (key[start:], length)) and (after is None or row[0] > after) and (until is None or row[0] <= until))
        and (taken is None or taken(row[0]))
    )
    while page := list(islice(rows, _PAGE_KEYS)):
        yield Page([key for key, _ in page], [length for _, length in page], [""] * len(page))


def _by_hash(metadata: MetadataStore, first_id: int) -> Iterator[list[Iterator[tuple[int, int]]]]:
    """Group slices by id % 256, then by the number of digits of their ids."""
    from tempfile import SpooledTemporaryFile

    with ExitStack() as stack:
        files = [stack.enter_context(SpooledTemporaryFile(_HELD_BYTES)) for _ in range(_HASHES)]
        for slice_id, size in metadata.slices(first_id):
            files[slice_id % _HASHES].write(_ROW.pack(slice_id, size))
        for file in files:
            file.seek(0)
            rows = memoryview(file.read())
            starts = [
                next(group)[0] * _ROW.size
                for _, group in groupby(enumerate(_ROW.iter_unpack(rows)), key=lambda row: len(str(row[1][0])))
            ]
            ends = [*starts[1:], len(rows)]
            yield [_ROW.iter_unpack(rows[start:end]) for start, end in zip(starts, ends, strict=False)]

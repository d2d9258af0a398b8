"""Catch-up: what the clients wrote to one store while they were on their way to the other."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from include.juicefs_storage.core.blocks import block_objects
from include.juicefs_storage.core.ports import MetadataStore, ObjectStore, StoredObject
from include.juicefs_storage.core.setting import Setting

EXAMPLES = 5


@dataclass
class Difference:
    """How one set of objects differs from another: counts, and a few keys of each kind."""

    expected: int = 0
    present: int = 0
    missing: int = 0
    different: int = 0
    examples: list[str] = field(default_factory=list)

    def note(self, kind: str, key: str) -> None:
        """Keep an example."""
        if len(self.examples) < EXAMPLES:
            self.examples.append(f"{kind}: {key}")


def compare_listings(source: Iterable[StoredObject], target: Iterable[StoredObject]) -> Difference:
    """Compare two listings by key and size, as streams: memory does not grow with the number of objects.

    Objects that only the target has do not count: the copy may have been made from a later state.
    """
    result = Difference()
    tagged = heapq.merge(
        ((item.key.encode(), 0, item) for item in source), ((item.key.encode(), 1, item) for item in target)
    )
    for _, group in groupby(tagged, key=lambda row: row[0]):
        sides = {side: item for _, side, item in group}
        if 0 not in sides:
            continue
        result.expected += 1
        if 1 not in sides:
            result.missing += 1
            result.note("missing", sides[0].key)
        elif sides[0].size_bytes != sides[1].size_bytes:
            result.different += 1
            result.note("different size", sides[0].key)
        else:
            result.present += 1
    return result


def volume_objects(store: ObjectStore, setting: Setting) -> Iterator[StoredObject]:
    """The volume's blocks in a store."""
    return store.list(f"{setting.name}/chunks/")


def missing_blocks(metadata: MetadataStore, setting: Setting, store: ObjectStore) -> Difference:
    """Which blocks some file refers to (`jfs_chunk_ref`) that a store lacks or holds with another length.

    The metadata is read before the listing is made, so that a block written meanwhile is not taken for lost.
    """
    needed = {
        key: length for slice_id, size in metadata.slices() for key, length in block_objects(setting, slice_id, size)
    }
    result = Difference(expected=len(needed))
    for item in volume_objects(store, setting):
        length = needed.pop(item.key, None)
        if length is None:
            continue
        if setting.objects_have_plain_length and item.size_bytes != length:
            result.different += 1
            result.note(f"{item.size_bytes} bytes instead of {length}", item.key)
        else:
            result.present += 1
    # A file deleted since the metadata was read takes its blocks along: what is still needed decides.
    if needed:
        still = {key for slice_id, size in metadata.slices() for key, _ in block_objects(setting, slice_id, size)}
        for key in sorted(needed.keys() & still):
            if not store.exists(key):
                result.missing += 1
                result.note("missing", key)
    return result

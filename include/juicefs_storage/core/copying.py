"""Catch-up: what the clients wrote to one store while they were on their way to the other."""

from __future__ import annotations

import heapq
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from include.juicefs_storage.core.blocks import block_objects
from include.juicefs_storage.core.ports import MetadataStore, ObjectStore, StoredObject
from include.juicefs_storage.core.setting import Setting

EXAMPLES = 5
_PARALLEL_READS = 8
_SLICE_ID = re.compile(r"/(\d+)_\d+_\d+$")


@dataclass
class Difference:
    """How one set of objects differs from another: counts, and a few keys of each kind.

    Attributes:
        extra: Objects that are only in the other set.
        newest_extra: The one of them whose slice has the highest id.
        examples: `missing: …` and `different: …`, a few of each.
    """

    expected: int = 0
    present: int = 0
    missing: int = 0
    different: int = 0
    extra: int = 0
    newest_extra: tuple[int, str] = (-1, "")
    examples: list[str] = field(default_factory=list)

    def examples_of(self, kind: Literal["missing", "different"]) -> list[str]:
        """The examples of one kind."""
        return [example for example in self.examples if example.startswith(kind)]

    def note(self, kind: Literal["missing", "different"], text: str) -> None:
        """Keep an example."""
        if len(self.examples_of(kind)) < EXAMPLES:
            self.examples.append(f"{kind}: {text}")


def compare_listings(
    source: Iterable[StoredObject], target: Iterable[StoredObject], contents: Callable[[str], bool] | None = None
) -> Difference:
    """Compare two listings by key and size, as streams: memory does not grow with the number of objects.

    Args:
        source: What must be there, ordered by key.
        target: What is there, ordered by key.
        contents: Tells whether the object with this key is the same on both sides, where sizes alone do not suffice.
    """
    result = Difference()
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        waiting: deque[tuple[str, Future[bool]]] = deque()
        for key in _same_size(result, source, target):
            if contents is None:
                result.present += 1
                continue
            waiting.append((key, pool.submit(contents, key)))
            if len(waiting) > 4 * _PARALLEL_READS:
                _note_contents(result, *waiting.popleft())
        for row in waiting:
            _note_contents(result, *row)
    return result


def _note_contents(result: Difference, key: str, same: Future[bool]) -> None:
    if same.result():
        result.present += 1
    else:
        result.different += 1
        result.note("different", f"{key} (content)")


def _same_size(result: Difference, source: Iterable[StoredObject], target: Iterable[StoredObject]) -> Iterator[str]:
    """The keys that both sides hold with the same size; everything else goes into `result`."""
    tagged = heapq.merge(
        ((item.key.encode(), 0, item) for item in source), ((item.key.encode(), 1, item) for item in target)
    )
    for _, group in groupby(tagged, key=lambda row: row[0]):
        sides = {side: item for _, side, item in group}
        if 0 not in sides:
            result.extra += 1
            found = _SLICE_ID.search(sides[1].key)
            result.newest_extra = max(result.newest_extra, (int(found[1]) if found else -1, sides[1].key))
            continue
        result.expected += 1
        if 1 not in sides:
            result.missing += 1
            result.note("missing", sides[0].key)
        elif sides[0].size_bytes != sides[1].size_bytes:
            result.different += 1
            sizes = f"{sides[1].size_bytes} bytes instead of {sides[0].size_bytes}"
            result.note("different", f"{sides[0].key} ({sizes})")
        else:
            yield sides[0].key


def same_contents(source: ObjectStore, target: ObjectStore) -> Callable[[str], bool]:
    """Compare one object's content by its SHA-256; an object that the source lost meanwhile (deleted) is the same."""

    def same(key: str) -> bool:
        expected = source.digest(key)
        return expected is None or expected == target.digest(key)

    return same


def compare_sample(
    metadata: MetadataStore, setting: Setting, source: ObjectStore, target: ObjectStore, blocks: int
) -> Difference:
    """Compare the contents of some blocks, drawn at random from those that files refer to.

    Blocks that the old store lacks are left out: they were deleted meanwhile, or are not uploaded yet.
    """
    draw = random.SystemRandom()
    drawn: list[tuple[int, int]] = []
    for number, row in enumerate(metadata.slices()):
        # Algorithm R: every slice is equally likely, and no more than the sample is held.
        if number < blocks:
            drawn.append(row)
        elif (place := draw.randrange(number + 1)) < blocks:
            drawn[place] = row
    keys = [draw.choice([key for key, _ in block_objects(setting, *row)]) for row in drawn if row[1]]
    result = Difference()
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        for key, digests in zip(
            keys, pool.map(lambda key: (source.digest(key), target.digest(key)), keys), strict=True
        ):
            expected, found = digests
            if expected is None:
                continue
            result.expected += 1
            if found is None:
                result.missing += 1
                result.note("missing", key)
            elif found != expected:
                result.different += 1
                result.note("different", f"{key} (content)")
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
            result.note("different", f"{item.key} ({item.size_bytes} bytes instead of {length})")
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

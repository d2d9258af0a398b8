"""Catch-up: what the clients wrote to one store while they were on their way to the other."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.ports import MetadataStore, ObjectStore, StoredObject
from include.juicefs_storage.volume.layout import ObjectSizes, block_objects, slice_of
from include.juicefs_storage.volume.needed import needed_objects
from include.juicefs_storage.volume.setting import Setting

Kind = Literal["missing", "different", "lost"]

EXAMPLES = 5
_PARALLEL_READS = 8
_LOOKED_UP_AT_ONCE = 1_000


@dataclass
class Difference:
    """How one set of objects differs from another: counts, and a few keys of each kind.

    Attributes:
        extra: Objects that are only in the other set.
        newest_extra: The one of them whose slice has the highest id.
        lost: Objects that files refer to and no set has whole; only where the metadata was asked.
        examples: `missing: …`, `different: …` and `lost: …`, a few of each.
    """

    expected: int = 0
    present: int = 0
    missing: int = 0
    different: int = 0
    extra: int = 0
    newest_extra: tuple[int, str] = (-1, "")
    lost: int = 0
    examples: list[str] = field(default_factory=list)

    def examples_of(self, kind: Kind) -> list[str]:
        """The examples of one kind."""
        return [example for example in self.examples if example.startswith(kind)]

    def note(self, kind: Kind, text: str) -> None:
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
            result.newest_extra = max(result.newest_extra, (slice_of(sides[1].key), sides[1].key))
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


def files_of_examples(difference: Difference, metadata: MetadataStore) -> list[str]:
    """The paths of the files that refer to the examples; none where the metadata cannot be asked."""
    keys = [example.split(" ")[1] for example in difference.examples]
    try:
        return sorted({path for _, path in metadata.files_of({slice_of(key) for key in keys})})
    except StorageSwitchError:  # what is missing is to be told in any case
        return []


def volume_objects(store: ObjectStore, setting: Setting) -> Iterator[StoredObject]:
    """The volume's blocks in a store."""
    return store.list(f"{setting.name}/chunks/")


def missing_blocks(metadata: MetadataStore, setting: Setting, store: ObjectStore) -> Difference:
    """Which blocks some file refers to (`jfs_chunk_ref`) that a store lacks or holds with another length.

    Metadata and listing are read side by side, as streams: memory does not grow with the volume. What seems to be
    missing is looked up once more, as a block may be written, or its file deleted, between the two.
    """
    result, sizes = Difference(), ObjectSizes.of(setting)
    lost: list[str] = []
    for key, length, found in _side_by_side(needed_objects(metadata, setting), volume_objects(store, setting)):
        if length is None:
            result.extra += 1
            continue
        result.expected += 1
        if found is None:
            lost.append(key)
        elif not sizes.fit(length, found):
            result.different += 1
            result.note("different", f"{key} ({found} bytes instead of {length})")
        else:
            result.present += 1
        if len(lost) == _LOOKED_UP_AT_ONCE:
            _note_lost(result, lost, metadata, store)
            lost = []
    _note_lost(result, lost, metadata, store)
    return result


def _side_by_side(
    needed: Iterable[tuple[str, int]], stored: Iterable[StoredObject]
) -> Iterator[tuple[str, int | None, int | None]]:
    """Key, needed length and stored size; None where it is not needed, or not stored."""
    rest = iter(stored)
    item = next(rest, None)
    for key, length in needed:
        while item and item.key < key:
            yield item.key, None, item.size_bytes
            item = next(rest, None)
        if item and item.key == key:
            yield key, length, item.size_bytes
            item = next(rest, None)
        else:
            yield key, length, None
    while item:
        yield item.key, None, item.size_bytes
        item = next(rest, None)


def _note_lost(result: Difference, keys: Sequence[str], metadata: MetadataStore, store: ObjectStore) -> None:
    """Of the blocks that a listing lacked, count those that are still needed and still not there."""

    def lost(key: str) -> bool | None:
        if store.exists(key):
            return False
        slice_id = slice_of(key)
        return True if next(metadata.slices(slice_id, slice_id + 1), None) else None

    # So many are no race any more.
    answers: list[bool | None] = [True] * len(keys)
    if result.missing < _LOOKED_UP_AT_ONCE:
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            answers = list(pool.map(lost, keys))
    for key, answer in zip(keys, answers, strict=True):
        if answer:
            result.missing += 1
            result.note("missing", key)
        elif answer is None:
            result.expected -= 1
        else:
            result.present += 1

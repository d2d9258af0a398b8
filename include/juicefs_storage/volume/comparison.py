"""The blocks that the metadata says must exist, beside the listings of stores: three streams, memory does not grow.

The streams are snapshots of different moments: the metadata is read once, the listings after it. A block that a file
needs and no store seems to have is therefore looked up again, in the stores and in the metadata, before it is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from include.juicefs_storage.objects.comparison import OUTCOME_CODES, Classifier
from include.juicefs_storage.objects.merge import slice_page
from include.juicefs_storage.objects.model import Comparison, KeyRange, ObjectOutcome, Page
from include.juicefs_storage.volume.block_contents import GONE
from include.juicefs_storage.volume.layout import ObjectSizes, length_of, slice_of
from include.juicefs_storage.volume.needed import needed_objects, to_pages

if TYPE_CHECKING:
    from include.juicefs_storage.ports import MetadataStore
    from include.juicefs_storage.volume.setting import Setting

#: The detail of a block that VANISHED rightly: its file was deleted, and then the block.
UNNEEDED = "no file refers to it any more"


class Lister(Protocol):
    """The part of a bucket that a comparison uses."""

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """List a range in order."""


@dataclass(frozen=True)
class NeededBlocks:
    """The blocks that a volume needs, as the metadata had them at one moment.

    Attributes:
        chunks: Where a volume's blocks lie, below the prefix of a side. Other keys are compared as without metadata.
        sizes: How long their objects may be.
        pages: The blocks of a range of keys, in order; sizes are the blocks' lengths.
        still: Of some keys, those that the metadata needs now.
        problems: Reads blocks of the source, given by key and length, and says what is wrong with each, see
            `BlockContents`. None: the contents are not read.
        delta: Whether these are the blocks of new slices alone: then only their surroundings are listed.
        others: Whether blocks that no file needs are compared as well; else they are SKIPPED.
    """

    chunks: str
    sizes: ObjectSizes
    pages: Callable[[KeyRange], Iterator[Page]]
    still: Callable[[Collection[str]], Collection[str]]
    problems: Callable[[Sequence[tuple[str, int]]], Sequence[str]] | None = None
    delta: bool = False
    others: bool = False

    @classmethod
    def of(cls, metadata: MetadataStore, setting: Setting, *, others: bool = False) -> NeededBlocks:
        """Read the needed blocks from the metadata. Keys begin with the volume's name.

        Args:
            metadata: Which blocks files refer to.
            setting: The volume's setting.
            others: Keep the blocks as well that no file refers to.
        """
        return cls(
            chunks=f"{setting.name}/chunks/",
            sizes=ObjectSizes.of(setting),
            pages=lambda keys: to_pages(needed_objects(metadata, setting), keys=keys),
            still=still_needed(metadata),
            others=others,
        )

    def listing(self, side: Lister, keys: KeyRange) -> Iterator[Page]:
        """List what these blocks are compared with."""
        if not self.delta:
            return side.pages(keys)
        return near(side, (key for page in self.pages(keys) for key in page.keys), keys.after)


def still_needed(metadata: MetadataStore) -> Callable[[Collection[str]], set[str]]:
    """Make `NeededBlocks.still` from the metadata."""

    def still(keys: Collection[str]) -> set[str]:
        needed = metadata.still_needed({slice_of(key) for key in keys})
        return {key for key in keys if slice_of(key) in needed}

    return still


def near(side: Lister, keys: Iterable[str], after: str | None = None) -> Iterator[Page]:
    """List what a side has from the first to the last of these ordered keys in each of their folders.

    Args:
        side: The side.
        keys: Ordered.
        after: List nothing up to this key.
    """
    for _, folder in groupby(keys, key=lambda key: key.rpartition("/")[0]):
        run = list(folder)
        yield from side.pages(KeyRange(max(run[0][:-1], after or ""), run[-1]))


def batches(
    stretches: Iterator[tuple[Page, ...]],
    new: Callable[[], Classifier],
    needed: NeededBlocks | None = None,
    batch_keys: int = 1,
) -> Iterator[Classifier]:
    """Compare stretches, and collect the rows into batches.

    Args:
        stretches: From `merge.beside`: source and target; with `needed` its pages before them.
        new: Makes an empty batch.
        needed: The needed blocks; None: the two sides are compared without metadata.
        batch_keys: A batch ends behind the stretch that brings it to this size.
    """
    batch = new()
    for stretch in stretches:
        if needed:
            classify(batch, needed, *stretch)
        else:
            batch.add(*stretch)
        if len(batch.rows) >= batch_keys:
            yield batch
            batch = new()
    if len(batch.rows):
        yield batch


def classify(batch: Classifier, needed: NeededBlocks, wanted: Page, source: Page, target: Page) -> None:
    """Add a stretch of the three streams to a batch.

    What the source has whole, and what is no block, is compared as without metadata. What no side seems to have goes to
    `batch.lost`, to be looked up again.

    Args:
        batch: Gets the rows.
        needed: The needed blocks.
        wanted: Those of this range of keys.
        source: What the source has in this range.
        target: What the target has in this range; the same page where one store is compared with the metadata.
    """
    fit = needed.sizes.fit
    if source.keys == wanted.keys and not set(target.keys).difference(wanted.keys):
        exact = needed.sizes.exact
        if source.sizes == wanted.sizes if exact else all(map(fit, wanted.sizes, source.sizes)):
            batch.add(source, target)
            return
    lengths, ours, theirs = (dict(zip(page.keys, page.sizes, strict=True)) for page in (wanted, source, target))

    def outcome(key: str) -> ObjectOutcome | None:
        """Return a block's outcome; None: as without metadata."""
        length = lengths.get(key)
        if length is None:
            return ObjectOutcome.SKIPPED if key.startswith(needed.chunks) and not needed.others else None
        if key in ours:
            return None if fit(length, ours[key]) else ObjectOutcome.DAMAGED
        if key in theirs:
            return ObjectOutcome.EXTRA if fit(length, theirs[key]) else ObjectOutcome.DAMAGED
        return ObjectOutcome.LOST

    left = right = 0
    for kind, keys in groupby(sorted({*lengths, *ours, *theirs}), outcome):
        run = list(keys)
        ended = left + sum(key in ours for key in run), right + sum(key in theirs for key in run)
        one, other = slice_page(source, left, ended[0]), slice_page(target, right, ended[1])
        left, right = ended
        if kind is None:
            batch.add(one, other)
            continue
        etags = dict(zip(one.keys, one.etags, strict=True)), dict(zip(other.keys, other.etags, strict=True))
        first = len(batch.rows)
        batch.rows.add(
            run,
            [ours[key] if key in ours else theirs[key] if key in theirs else lengths[key] for key in run],
            [etags[0].get(key, "") for key in run],
            [etags[1].get(key, "") for key in run],
            kind,
            Comparison.NONE if kind in {ObjectOutcome.SKIPPED, ObjectOutcome.LOST} else Comparison.SIZE,
        )
        if kind is ObjectOutcome.LOST:
            batch.lost += range(first, len(batch.rows))
        if kind is ObjectOutcome.DAMAGED:
            for row, key in enumerate(run, first):
                batch.rows.details[row] = _damage(lengths[key], ours.get(key), theirs.get(key), needed.sizes)


def _damage(length: int, source: int | None, target: int | None, sizes: ObjectSizes) -> str:
    def side(name: str, size: int | None) -> str:
        return f"nothing on the {name}" if size is None else f"{size} bytes on the {name}"

    whole = " (which may be whole)" if target is not None and sizes.fit(length, target) else ""
    return f"a block of {length} bytes, {side('source', source)}, {side('target', target)}{whole}"


def settle_lost(batch: Classifier, needed: NeededBlocks, *sides: Lister) -> None:
    """Look up once more what no side seemed to have: it may have been uploaded, or its file deleted, meanwhile.

    Args:
        batch: `batch.lost` is emptied; what the source has now is treated like any other row.
        needed: Asked whether the keys are still needed.
        sides: Source and target.
    """
    rows, places = batch.rows, batch.lost
    if not places:
        return
    keys = [rows.keys[row] for row in places]
    source, target = (
        {item[0]: item for page in near(side, keys) for item in zip(*page, strict=True)} for side in sides
    )
    still = needed.still(keys)
    for row, key in zip(places, keys, strict=True):
        length, found = rows.sizes[row], source.get(key) or target.get(key)
        if key not in still:
            rows.put(row, ObjectOutcome.VANISHED, Comparison.NONE, detail=UNNEEDED)
        elif found is None:
            continue
        elif not needed.sizes.fit(length, found[1]):
            ours, theirs = ((side[key][1] if key in side else None) for side in (source, target))
            rows.sizes[row] = found[1]
            rows.put(row, ObjectOutcome.DAMAGED, Comparison.SIZE, detail=_damage(length, ours, theirs, needed.sizes))
        elif key not in source:
            _, rows.sizes[row], rows.target_etags[row] = found
            rows.put(row, ObjectOutcome.EXTRA, Comparison.SIZE)
        else:
            _, rows.sizes[row], rows.source_etags[row] = found
            if key not in target:
                rows.put(row, ObjectOutcome.MISSING, Comparison.NONE)
                batch.missing.append(row)
                continue
            _, size, rows.target_etags[row] = target[key]
            rows.put(row, ObjectOutcome.SAME if size == found[1] else ObjectOutcome.DIFFERENT, Comparison.SIZE)
            if size == found[1] and not batch.by_size:
                batch.unsure.append(row)
    batch.lost = []


def settle_vanished(batch: Classifier, needed: NeededBlocks, *sides: Lister) -> None:
    """Ask the metadata about blocks that VANISHED: one that a file still refers to is LOST, or on the target alone.

    Clients delete a block's row before the block, so that the metadata knows of every deletion.

    Args:
        batch: Gets the outcomes.
        needed: Asked whether the keys are still needed.
        sides: Source and target.
    """
    rows, vanished = batch.rows, OUTCOME_CODES[ObjectOutcome.VANISHED]
    for row, code in enumerate(rows.outcomes if vanished in rows.outcomes else ()):
        if code == vanished and rows.details.get(row) != UNNEEDED and rows.keys[row].startswith(needed.chunks):
            rows.sizes[row] = length_of(rows.keys[row])
            rows.put(row, ObjectOutcome.LOST, Comparison.NONE)
            batch.lost.append(row)
    settle_lost(batch, needed, *sides)


def read_blocks(batch: Classifier, needed: NeededBlocks, where: str = ", on the source") -> None:
    """Read the source's blocks, and mark as damaged those that do not hold what they must.

    Args:
        batch: Gets the outcomes.
        needed: Reads the blocks.
        where: What to add to a problem.
    """
    if needed.problems is None:
        return
    rows = batch.rows
    on_source = {OUTCOME_CODES[kind] for kind in (ObjectOutcome.SAME, ObjectOutcome.MISSING, ObjectOutcome.DIFFERENT)}
    places = [
        row
        for row, key in enumerate(rows.keys)
        if rows.outcomes[row] in on_source and key.startswith(needed.chunks) and length_of(key) >= 0
    ]
    found = needed.problems([(rows.keys[row], length_of(rows.keys[row])) for row in places])
    damaged = {row: problem for row, problem in zip(places, found, strict=True) if problem}
    gone = {rows.keys[row] for row, problem in damaged.items() if problem == GONE}
    deleted = gone.difference(needed.still(gone)) if gone else ()
    damaged = {row: problem for row, problem in damaged.items() if rows.keys[row] not in deleted}
    for row, problem in damaged.items():
        rows.put(row, ObjectOutcome.DAMAGED, Comparison.CONTENT, detail=f"{problem}{where}")
    batch.missing = [row for row in batch.missing if row not in damaged]
    batch.unsure = [row for row in batch.unsure if row not in damaged]

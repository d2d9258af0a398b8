"""What the checks and the proofs of a switch count: the blocks that a store lacks."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.comparison import COMPARISONS, OUTCOME_CODES, OUTCOMES, Classifier
from include.juicefs_storage.objects.merge import beside
from include.juicefs_storage.objects.model import Comparison, KeyRange, ObjectOutcome, Page, below
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.volume.block_contents import BlockContents
from include.juicefs_storage.volume.comparison import NeededBlocks, batches, read_blocks, settle_lost
from include.juicefs_storage.volume.layout import block_objects, length_of, slice_of
from include.juicefs_storage.volume.setting import Setting

Kind = Literal["missing", "different", "lost"]
Count = Literal["present", "missing", "different", "lost", "extra"]

EXAMPLES = 5
_PARALLEL_READS = 8
_Outcome = ObjectOutcome

#: How outcomes count: two stores beside the metadata.
_OF_TWO_STORES: dict[ObjectOutcome, Count] = {
    _Outcome.SAME: "present", _Outcome.EXTRA: "present", _Outcome.MISSING: "missing", _Outcome.DIFFERENT: "different",
    _Outcome.LOST: "lost", _Outcome.DAMAGED: "lost",
}  # fmt: skip
#: One store beside the metadata.
_OF_ONE_STORE: dict[ObjectOutcome, Count] = {
    _Outcome.SAME: "present", _Outcome.LOST: "missing", _Outcome.DAMAGED: "different", _Outcome.SKIPPED: "extra",
}  # fmt: skip
#: The same, where no other store can have what this one lacks.
_OF_THE_ONLY_STORE: dict[ObjectOutcome, Count] = {**_OF_ONE_STORE, _Outcome.LOST: "lost", _Outcome.DAMAGED: "lost"}


@dataclass
class Difference:
    """How one set of objects differs from another: counts, and a few keys of each kind.

    Attributes:
        extra: Objects that are only in the other set.
        newest_extra: The one of them whose slice has the highest id.
        lost: Blocks that files refer to and the old store does not hold whole. Of one store alone: those that were lost
            before, and those whose contents are wrong; they are neither `missing` nor `different`.
        lost_keys: The keys of those, `keep_lost` at most.
        examples: `missing: …`, `different: …` and `lost: …`, a few of each.
    """

    expected: int = 0
    present: int = 0
    missing: int = 0
    different: int = 0
    extra: int = 0
    newest_extra: tuple[int, str] = (-1, "")
    lost: int = 0
    lost_keys: list[str] = field(default_factory=list)
    keep_lost: int = EXAMPLES
    examples: list[str] = field(default_factory=list)

    def examples_of(self, kind: Kind) -> list[str]:
        """Return the examples of one kind."""
        return [example for example in self.examples if example.startswith(kind)]

    def note(self, kind: Kind, text: str) -> None:
        """Keep an example."""
        if len(self.examples_of(kind)) < EXAMPLES:
            self.examples.append(f"{kind}: {text}")

    def add(
        self, batch: Classifier, counts: Mapping[ObjectOutcome, Count], lost_before: Collection[str] = frozenset()
    ) -> None:
        """Count the rows of a batch.

        Args:
            batch: Compared in full.
            counts: What each outcome counts as; others are left out.
            lost_before: Keys of blocks that count as `lost` where they are missing or different.
        """
        rows = batch.rows
        same = rows.outcomes.count(OUTCOME_CODES[ObjectOutcome.SAME])
        self.expected += same
        self.present += same
        if same == len(rows):
            return
        for row, code in enumerate(rows.outcomes):
            outcome, key = OUTCOMES[code], rows.keys[row]
            count = counts.get(outcome)
            if count is None or outcome is ObjectOutcome.SAME:
                continue
            if count == "extra":
                self.add_extra(key)
                continue
            if outcome is ObjectOutcome.EXTRA and COMPARISONS[rows.comparisons[row]] is Comparison.NONE:
                continue  # no file needs it
            detail = rows.details.get(row, "")
            if COMPARISONS[rows.comparisons[row]] is Comparison.CONTENT and outcome is ObjectOutcome.DAMAGED:
                count = "lost"
            elif count == "different" and outcome is ObjectOutcome.DAMAGED:
                detail = f"{rows.sizes[row]} bytes instead of {length_of(key)}"
            if count in {"missing", "different"} and key in lost_before:
                count = "lost"
            self.expected += 1
            setattr(self, count, getattr(self, count) + 1)
            if count != "present":
                self.note(count, f"{key} ({detail})" if detail else key)
            if count == "lost" and len(self.lost_keys) < self.keep_lost:
                self.lost_keys.append(key)

    def add_extra(self, key: str) -> None:
        """Count an object that is only in the other set."""
        self.extra += 1
        self.newest_extra = max(self.newest_extra, (slice_of(key), key))


def compare_blocks(
    metadata: MetadataStore,
    setting: Setting,
    source: Bucket,
    target: Bucket,
    *,
    others: bool = False,
    contents: bool = False,
    keep_lost: int = EXAMPLES,
) -> Difference:
    """Compare the blocks of a volume on two stores by key and size, and both with the metadata.

    Args:
        metadata: Which blocks files refer to.
        setting: The volume's setting.
        source: The old store.
        target: The new store.
        others: Whether blocks that no file refers to are compared as well.
        contents: Whether blocks of one size are read on both sides and compared.
        keep_lost: How many keys of lost blocks are kept.

    Returns:
        `missing` and `different`: what the target lacks of the source's. `lost`: the blocks that files refer to and the
        source does not hold whole; what the target alone holds whole is present.
    """
    needed, result = NeededBlocks.of(metadata, setting, others=others), Difference(keep_lost=keep_lost)
    listings = (volume_pages(store, setting) for store in (source, target))
    for wanted, left, right in beside(needed.pages(KeyRange()), *listings):
        for batch in batches(iter([(wanted, left, right)]), lambda: Classifier(by_size=not contents), needed):
            settle_lost(batch, needed, source, target)
            _compare_contents(batch, source, target)
            result.add(batch, _OF_TWO_STORES)
        for key in sorted(set(right.keys).difference(left.keys, wanted.keys)):
            result.add_extra(key)
    return result


def _compare_contents(batch: Classifier, source: Bucket, target: Bucket) -> None:
    """Compare by SHA-256 what sizes do not settle; an object that the source lost meanwhile (deleted) is the same."""

    def same(row: int) -> bool:
        key = batch.rows.keys[row]
        expected = source.digest(key)
        return expected is None or expected == target.digest(key)

    if batch.unsure:
        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            for row, found in zip(batch.unsure, pool.map(same, batch.unsure), strict=True):
                if not found:
                    batch.rows.put(row, ObjectOutcome.DIFFERENT, Comparison.CONTENT, detail="content")


def compare_sample(
    metadata: MetadataStore, setting: Setting, source: Bucket, target: Bucket, blocks: int
) -> Difference:
    """Compare the contents of some blocks, drawn at random from those that files refer to.

    Blocks that the old store lacks are left out: they were deleted meanwhile, or are not uploaded yet.

    Args:
        metadata: Which slices files refer to.
        setting: The volume's setting.
        source: The old store.
        target: The new store.
        blocks: How many are drawn.
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


def lost_blocks(
    metadata: MetadataStore,
    setting: Setting,
    store: Bucket,
    keep_lost: int = EXAMPLES,
    contents: BlockContents | None = None,
) -> Difference:
    """Find the blocks that some file refers to and the only store there is does not hold whole: they are `lost`.

    Args:
        metadata: Which blocks files refer to.
        setting: The volume's setting.
        store: The store.
        keep_lost: How many keys of lost blocks are kept.
        contents: Reads the blocks; None: their sizes alone are compared.
    """
    result = Difference(keep_lost=keep_lost)
    return _compare_needed(metadata, setting, store, result, _OF_THE_ONLY_STORE, contents=contents)


def missing_blocks(
    metadata: MetadataStore,
    setting: Setting,
    store: Bucket,
    lost_before: Collection[str] = frozenset(),
    keep_lost: int = EXAMPLES,
    contents: BlockContents | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> Difference:
    """Find the blocks that some file refers to (`jfs_chunk_ref`) and a store lacks or holds with another length.

    A block that seems to be missing is looked up once more: it may be written, or its file deleted, meanwhile.

    Args:
        metadata: Which blocks files refer to.
        setting: The volume's setting.
        store: The store.
        lost_before: Keys of blocks that were lost before the volume was moved: they count as `lost` alone.
        keep_lost: How many keys of lost blocks are kept.
        contents: Reads the blocks: those whose contents are wrong count as `lost`. None: sizes alone are compared.
        told: Called now and then with the number of blocks that were looked at so far.
    """
    result = Difference(keep_lost=keep_lost)
    return _compare_needed(metadata, setting, store, result, _OF_ONE_STORE, lost_before, contents, told)


def _compare_needed(
    metadata: MetadataStore,
    setting: Setting,
    store: Bucket,
    result: Difference,
    counts: Mapping[ObjectOutcome, Count],
    lost_before: Collection[str] = frozenset(),
    contents: BlockContents | None = None,
    told: Callable[[int], None] = lambda _: None,
) -> Difference:
    needed = replace(NeededBlocks.of(metadata, setting), problems=contents.problems if contents else None)
    # The store is both sides: what one side lacks the other cannot have.
    stretches = (
        (wanted, found, found) for wanted, found in beside(needed.pages(KeyRange()), volume_pages(store, setting))
    )
    for batch in batches(stretches, lambda: Classifier(by_size=True), needed):
        settle_lost(batch, needed, store, store)
        read_blocks(batch, needed, where="")
        result.add(batch, counts, lost_before)
        told(result.expected)
    return result


def files_of(keys: Collection[str], metadata: MetadataStore) -> list[str]:
    """List the paths of the files that refer to some blocks; none where the metadata cannot be asked."""
    try:
        return sorted({path for _, path in metadata.files_of({slice_of(key) for key in keys})})
    except StorageSwitchError:  # the blocks are named in any case
        return []


def files_of_examples(difference: Difference, metadata: MetadataStore) -> list[str]:
    """List the paths of the files that refer to the examples; none where the metadata cannot be asked."""
    return files_of([example.split(" ")[1] for example in difference.examples], metadata)


def volume_pages(store: Bucket, setting: Setting) -> Iterator[Page]:
    """List a volume's blocks in a store."""
    return store.pages(below(f"{setting.name}/chunks/"))

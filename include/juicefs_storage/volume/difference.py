"""What the checks and the proofs of a switch count: the blocks that a store lacks."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket, StoredObject
from include.juicefs_storage.objects.comparison import OUTCOME_CODES, OUTCOMES, Classifier
from include.juicefs_storage.objects.merge import beside
from include.juicefs_storage.objects.model import Comparison, KeyRange, ObjectOutcome, Page
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.volume.comparison import NeededBlocks, batches, settle_lost
from include.juicefs_storage.volume.layout import block_objects, length_of, slice_of
from include.juicefs_storage.volume.setting import Setting

Kind = Literal["missing", "different", "lost"]
Count = Literal["present", "missing", "different", "lost", "extra"]

EXAMPLES = 5
_PARALLEL_READS = 8
_PAGE_KEYS = 1_000
_Outcome = ObjectOutcome

#: How outcomes count: two listings beside each other.
_OF_LISTINGS: dict[ObjectOutcome, Count] = {
    _Outcome.SAME: "present", _Outcome.MISSING: "missing", _Outcome.DIFFERENT: "different", _Outcome.EXTRA: "extra",
}  # fmt: skip
#: Two stores beside the metadata.
_OF_NEEDED: dict[ObjectOutcome, Count] = {
    _Outcome.SAME: "present", _Outcome.EXTRA: "present", _Outcome.MISSING: "missing", _Outcome.DIFFERENT: "different",
    _Outcome.LOST: "lost", _Outcome.DAMAGED: "lost",
}  # fmt: skip
#: One store beside the metadata.
_OF_ONE_STORE: dict[ObjectOutcome, Count] = {
    _Outcome.SAME: "present", _Outcome.LOST: "missing", _Outcome.DAMAGED: "different", _Outcome.SKIPPED: "extra",
}  # fmt: skip


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

    def add(self, batch: Classifier, counts: Mapping[ObjectOutcome, Count]) -> None:
        """Count the rows of a batch.

        Args:
            batch: Compared in full.
            counts: What each outcome counts as; others are left out.
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
            if outcome is ObjectOutcome.SAME or count is None:
                continue
            if count == "extra":
                self.add_extra(key)
                continue
            self.expected += 1
            setattr(self, count, getattr(self, count) + 1)
            if count != "present":
                detail = rows.details.get(row, "")
                if counts is _OF_ONE_STORE and count == "different":
                    detail = f"{rows.sizes[row]} bytes instead of {length_of(key)}"
                self.note(count, f"{key} ({detail})" if detail else key)

    def add_extra(self, key: str) -> None:
        """Count an object that is only in the other set."""
        self.extra += 1
        self.newest_extra = max(self.newest_extra, (slice_of(key), key))


def compare_listings(source: Bucket, target: Bucket, setting: Setting, *, contents: bool = False) -> Difference:
    """Compare all blocks of a volume on two stores by key and size.

    Args:
        source: What must be there.
        target: What is there.
        setting: The volume's setting.
        contents: Whether blocks of one size are read on both sides and compared.
    """
    result = Difference()
    listings = (volume_pages(store, setting) for store in (source, target))
    for batch in batches(beside(*listings), lambda: Classifier(by_size=not contents)):
        _compare_contents(batch, source, target)
        result.add(batch, _OF_LISTINGS)
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


def compare_needed(metadata: MetadataStore, setting: Setting, source: Bucket, target: Bucket) -> Difference:
    """Compare the blocks that files refer to on two stores by key and size.

    Args:
        metadata: Which blocks files refer to.
        setting: The volume's setting.
        source: The old store.
        target: The new store.

    Returns:
        `missing` and `different` as the target has them; `lost`: the blocks that the source does not hold whole.
    """
    needed, result = NeededBlocks.of(metadata, setting), Difference()
    listings = (volume_pages(store, setting) for store in (source, target))
    for wanted, left, right in beside(needed.pages(KeyRange()), *listings):
        for batch in batches(iter([(wanted, left, right)]), _by_size, needed):
            settle_lost(batch, needed, _StoreLister(source), _StoreLister(target))
            result.add(batch, _OF_NEEDED)
        for key in sorted(set(right.keys).difference(left.keys, wanted.keys)):
            result.add_extra(key)
    return result


def missing_blocks(metadata: MetadataStore, setting: Setting, store: Bucket) -> Difference:
    """Find the blocks that some file refers to (`jfs_chunk_ref`) and a store lacks or holds with another length.

    A block that seems to be missing is looked up once more: it may be written, or its file deleted, meanwhile.

    Args:
        metadata: Which blocks files refer to.
        setting: The volume's setting.
        store: The store.
    """
    needed, result, lister = NeededBlocks.of(metadata, setting), Difference(), _StoreLister(store)
    # The store is both sides: what one side lacks the other cannot have.
    stretches = (
        (wanted, found, found) for wanted, found in beside(needed.pages(KeyRange()), volume_pages(store, setting))
    )
    for batch in batches(stretches, _by_size, needed):
        settle_lost(batch, needed, lister, lister)
        result.add(batch, _OF_ONE_STORE)
    return result


def _by_size() -> Classifier:
    return Classifier(by_size=True)


def files_of(keys: Collection[str], metadata: MetadataStore) -> list[str]:
    """The paths of the files that refer to some blocks; none where the metadata cannot be asked."""
    try:
        return sorted({path for _, path in metadata.files_of({slice_of(key) for key in keys})})
    except StorageSwitchError:  # the blocks are named in any case
        return []


def files_of_examples(difference: Difference, metadata: MetadataStore) -> list[str]:
    """The paths of the files that refer to the examples; none where the metadata cannot be asked."""
    return files_of([example.split(" ")[1] for example in difference.examples], metadata)


def volume_pages(store: Bucket, setting: Setting) -> Iterator[Page]:
    """List a volume's blocks in a store."""
    return _to_pages(store.list(f"{setting.name}/chunks/"))


def _to_pages(objects: Iterator[StoredObject]) -> Iterator[Page]:
    while page := list(islice(objects, _PAGE_KEYS)):
        yield Page([item.key for item in page], [item.size_bytes for item in page], [item.etag for item in page])


@dataclass(frozen=True)
class _StoreLister:
    store: Bucket

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """List a range inside of one folder."""
        after, until = keys.after or "", keys.until or ""
        listed = self.store.list(f"{until.rpartition('/')[0]}/")
        return _to_pages(item for item in listed if after < item.key <= until)

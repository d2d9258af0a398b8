"""What the metadata says must exist beside two listings: three streams, and nothing to hold.

Snapshots, not moments: the metadata is read once, the listings after it. What a file needs and nobody seems to have is
therefore looked up again, in the stores and in the metadata, before it is called lost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Protocol

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.comparison import EMPTY, OUTCOME_CODES, OUTCOMES, Classifier, cut_page, slice_page
from include.juicefs_storage.objects.model import Comparison, KeyRange, ObjectOutcome, Page
from include.juicefs_storage.ports import MetadataStore, ObjectStore, StoredObject
from include.juicefs_storage.volume.comparison import Difference
from include.juicefs_storage.volume.layout import ObjectSizes, length_of, slice_of
from include.juicefs_storage.volume.needed import needed_objects
from include.juicefs_storage.volume.setting import Setting, normal_endpoint

_PAGE_KEYS = 1_000


@dataclass(frozen=True)
class Needed:
    """The blocks that a volume needs, as the metadata had them at one moment.

    Attributes:
        chunks: Where a volume's blocks lie, below the prefix of a side. What else lies there is treated as without
            metadata.
        sizes: How long their objects may be.
        pages: The blocks of a range of keys, in order; sizes are the blocks' lengths.
        still: Of some keys, those that the metadata needs now.
        problems: Reads blocks of the source, given by key and length, and says what is wrong with each: for those whose
            size does not tell. None: it is not asked for.
        delta: Whether these are the blocks of new slices alone: then only their surroundings are listed.
    """

    chunks: str
    sizes: ObjectSizes
    pages: Callable[[KeyRange], Iterator[Page]]
    still: Callable[[Collection[str]], Collection[str]]
    problems: Callable[[Sequence[tuple[str, int]]], Sequence[str]] | None = None
    delta: bool = False

    def listing(self, side: Lister, keys: KeyRange) -> Iterator[Page]:
        """What is to be listed of a side."""
        if not self.delta:
            return side.pages(keys)
        return near(side, (key for page in self.pages(keys) for key in page.keys), keys.after)


def below_prefix(setting: Setting, prefix: str) -> str:
    """Where the volume's blocks lie below a prefix.

    Raises:
        PermanentError: The prefix leads elsewhere.
    """
    chunks = f"{setting.name}/chunks/"
    if not chunks.startswith(prefix):
        raise PermanentError(
            f"Param `source_prefix`: expected `{setting.name}/`, where volume {setting.name} keeps its blocks; "
            f"found {prefix!r}.",
            next_step="correct `source_prefix`, or `volume` or `meta_conn_id`",
        )
    return chunks.removeprefix(prefix)


def shard_at(setting: Setting, endpoint: str, bucket: str) -> int | None:
    """Which of the volume's shards a bucket is, counted from 0; None: the volume keeps all its blocks in one.

    Args:
        setting: The volume's.
        endpoint: Of the bucket. It counts only where the buckets at several endpoints have one name: clients may reach
            a store by another name than the workers.
        bucket: Its name.

    Raises:
        PermanentError: It is none of them.
    """
    if setting.shards <= 1:
        return None
    places = setting.shard_places
    found = [shard for shard, (_, name) in enumerate(places) if name == bucket]
    if len(found) > 1:
        found = [shard for shard in found if normal_endpoint(places[shard][0]) == normal_endpoint(endpoint)]
    if len(found) != 1:
        expected = ", ".join(f"`{name}`" for name in dict.fromkeys(name for _, name in places))
        raise PermanentError(
            f"Param `source_bucket`: volume {setting.name} spreads its blocks over {setting.shards} buckets, and a run "
            f"compares one of them: expected {expected}; found `{bucket}` at {endpoint}.",
            next_step="start a run for each of the buckets; where they have one name, the endpoint tells, and "
            "`source_conn_id` needs it as the setting has it",
        )
    return found[0]


def to_pages(
    blocks: Iterator[tuple[str, int]],
    prefix: str = "",
    keys: KeyRange | None = None,
    taken: Callable[[str], object] | None = None,
) -> Iterator[Page]:
    """Blocks as a side would list them.

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


def still_needed(metadata: MetadataStore) -> Callable[[Collection[str]], set[str]]:
    """`Needed.still` by asking the metadata."""

    def still(keys: Collection[str]) -> set[str]:
        needed = metadata.still_needed({slice_of(key) for key in keys})
        return {key for key in keys if slice_of(key) in needed}

    return still


class Lister(Protocol):
    """As much of a `Side` as looking up keys takes."""

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """List a range in order."""


def near(side: Lister, keys: Iterable[str], after: str | None = None) -> Iterator[Page]:
    """What a side has from the first to the last of these ordered keys in each of their folders, and behind `after`."""
    for _, folder in groupby(keys, key=lambda key: key.rpartition("/")[0]):
        run = list(folder)
        yield from side.pages(KeyRange(max(run[0][:-1], after or ""), run[-1]))


def beside(*listings: Iterator[Page]) -> Iterator[tuple[Page, ...]]:
    """Cut listings into stretches of the same range of keys; some, but not all, may be empty in a stretch."""
    pages = [next(listing, EMPTY) for listing in listings]
    while any(page.keys for page in pages):
        last = min(page.keys[-1] for page in pages if page.keys)
        stretch, rest = zip(*(cut_page(page, last) for page in pages), strict=True)
        yield stretch
        pages = [left if left.keys else next(listing, EMPTY) for left, listing in zip(rest, listings, strict=True)]


def classify(batch: Classifier, needed: Needed, wanted: Page, source: Page, target: Page) -> None:
    """Add a stretch of the three streams to a batch.

    What the source has whole, and what is no block, is compared as without metadata. What nobody seems to have is
    noted in `batch.lost`, to be looked up again.
    """
    fit = needed.sizes.fit
    if source.keys == wanted.keys and not set(target.keys).difference(wanted.keys):
        exact = needed.sizes.exact
        if source.sizes == wanted.sizes if exact else all(map(fit, wanted.sizes, source.sizes)):
            batch.add(source, target)
            return
    lengths = dict(zip(wanted.keys, wanted.sizes, strict=True))
    ours = dict(zip(source.keys, source.sizes, strict=True))
    theirs = dict(zip(target.keys, target.sizes, strict=True))

    def outcome(key: str) -> ObjectOutcome | None:
        """None: as without metadata."""
        length = lengths.get(key)
        if length is None:
            return ObjectOutcome.SKIPPED if key.startswith(needed.chunks) else None
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


def settle_lost(batch: Classifier, needed: Needed, *sides: Lister) -> None:
    """Look again for what nobody seemed to have: it may have been uploaded, or its file deleted, meanwhile.

    Args:
        batch: `batch.lost` is taken from it; what the source has now goes where any other row goes.
        needed: Asked whether the keys are needed still.
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
            rows.put(row, ObjectOutcome.VANISHED, Comparison.NONE, detail="no file refers to it any more")
        elif found is None:
            continue
        elif not needed.sizes.fit(length, found[1]):
            ours, theirs = ((side[key][1] if key in side else None) for side in (source, target))
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


def read_blocks(batch: Classifier, needed: Needed) -> None:
    """Read the source's blocks, and take those out that do not hold what they must."""
    if needed.problems is None:
        return
    rows, on_source = (
        batch.rows,
        {OUTCOME_CODES[kind] for kind in (ObjectOutcome.SAME, ObjectOutcome.MISSING, ObjectOutcome.DIFFERENT)},
    )
    places = [
        row
        for row, key in enumerate(rows.keys)
        if rows.outcomes[row] in on_source and key.startswith(needed.chunks) and length_of(key) >= 0
    ]
    found = needed.problems([(rows.keys[row], length_of(rows.keys[row])) for row in places])
    damaged = {row: problem for row, problem in zip(places, found, strict=True) if problem}
    for row, problem in damaged.items():
        rows.put(row, ObjectOutcome.DAMAGED, Comparison.CONTENT, detail=f"{problem}, on the source")
    batch.missing = [row for row in batch.missing if row not in damaged]
    batch.unsure = [row for row in batch.unsure if row not in damaged]


def compare_needed(metadata: MetadataStore, setting: Setting, source: ObjectStore, target: ObjectStore) -> Difference:
    """Which blocks that files refer to the target lacks or holds with another size, as three streams.

    `lost` are those that the source has not whole. Memory does not grow with the volume.
    """
    listers = _StoreLister(source), _StoreLister(target)
    prefix = f"{setting.name}/chunks/"
    needed = Needed(
        chunks=prefix,
        sizes=ObjectSizes.of(setting),
        pages=lambda keys: to_pages(needed_objects(metadata, setting), keys=keys),
        still=still_needed(metadata),
    )
    result = Difference()
    listings = (needed.pages(KeyRange()), *(_to_listing(store.list(prefix)) for store in (source, target)))
    for wanted, left, right in beside(*listings):
        batch = Classifier(by_size=True, trusted=lambda *_: False)
        classify(batch, needed, wanted, left, right)
        settle_lost(batch, needed, *listers)
        _count(result, batch)
        for key in sorted(set(right.keys).difference(left.keys, wanted.keys)):
            result.extra += 1
            result.newest_extra = max(result.newest_extra, (slice_of(key), key))
    return result


def _count(result: Difference, batch: Classifier) -> None:
    rows = batch.rows
    for row, code in enumerate(rows.outcomes):
        outcome, detail = OUTCOMES[code], rows.details.get(row, "")
        if outcome in {ObjectOutcome.SKIPPED, ObjectOutcome.VANISHED}:
            continue
        result.expected += 1
        text = f"{rows.keys[row]} ({detail})" if detail else rows.keys[row]
        match outcome:
            case ObjectOutcome.MISSING:
                result.missing += 1
                result.note("missing", text)
            case ObjectOutcome.DIFFERENT:
                result.different += 1
                result.note("different", text)
            case ObjectOutcome.LOST | ObjectOutcome.DAMAGED:
                result.lost += 1
                result.note("lost", text)
            case _:
                result.present += 1


def _to_listing(objects: Iterator[StoredObject]) -> Iterator[Page]:
    while page := list(islice(objects, _PAGE_KEYS)):
        yield Page([item.key for item in page], [item.size_bytes for item in page], [item.etag for item in page])


@dataclass(frozen=True)
class _StoreLister:
    store: ObjectStore

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """A range inside of one folder."""
        after, until = keys.after or "", keys.until or ""
        listed = self.store.list(f"{until.rpartition('/')[0]}/")
        return _to_listing(item for item in listed if after < item.key <= until)

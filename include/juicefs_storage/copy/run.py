"""What one task does with one partition: list, compare, copy, write down, a checkpoint at a time."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime

from include.juicefs_storage.copy.manifest import WRITTEN_SINCE, Manifest, written_since
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.objects.bucket import Bucket, StoredObject
from include.juicefs_storage.objects.comparison import (
    OUTCOME_CODES,
    Classifier,
    Rows,
    plain_md5,
)
from include.juicefs_storage.objects.merge import beside, filtered, key_filter
from include.juicefs_storage.objects.model import (
    Compare,
    Comparison,
    Engine,
    KeyRange,
    MirrorTool,
    ObjectOutcome,
    Page,
    misread,
)
from include.juicefs_storage.objects.progress import Status
from include.juicefs_storage.objects.totals import Totals
from include.juicefs_storage.volume.comparison import NeededBlocks, batches, read_blocks, settle_lost, settle_vanished

#: A batch ends after so many keys; the engine is given so many bytes of it at once, between two looks at the status.
BATCH_KEYS, CALL_BYTES = 10_000, 4 * 2**30
#: Batches in which nothing had to be moved or read are written down together, up to so many keys.
CHECKPOINT_KEYS = 100_000
#: A batch's worth: the next one is listed while this one is copied.
_PAGES_AHEAD = 10
_PARALLEL_LOOKS = 8
#: A sample of this size at most tells whether ETags are MD5.
_SAMPLE_BYTES = 64 * 2**20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How partitions are compared and copied; see docs/sync.md."""

    compare: Compare = "etag"
    overwrite: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Transfer:
    """From where to where objects are copied, by what, and how they are compared.

    Attributes:
        source: Only read.
        target: Written to by `copy` and `mirror` alone; nothing is ever deleted there.
        engine: Copies objects and compares contents.
        options: How objects are compared, and which are left out.
        needed: The blocks that a volume's metadata says must exist; None: whatever the source has is copied.
        since: When the copy was planned, by the source's clock: `verify` then tells which of the missing objects were
            written since (WRITTEN_SINCE).
        lists_copied: List what was copied, where no `verify` follows: a store may keep a key under another name.
    """

    source: Bucket
    target: Bucket
    engine: Engine
    options: Options = field(default_factory=Options)
    needed: NeededBlocks | None = None
    since: datetime | None = None
    lists_copied: bool = False

    def copy(self, keys: KeyRange, manifest: Manifest, status: Status | None = None) -> Totals:
        """Copy what the target lacks within a range of keys, compare what it has, write a row for each key.

        An object that is there already is overwritten only if it is different and `options.overwrite` is set. The call
        may be killed at any moment and repeated: it resumes behind the last checkpoint.

        Args:
            keys: The range.
            manifest: Gets the rows.
            status: Told how far it is; its flow is that of the engine.

        Raises:
            PermanentError: The stores refuse what is asked (keys, bucket).
            TransientError: A store failed for longer than the retries last.
        """
        return _Partition(self, manifest, status or Status(), copies=True).run(keys)

    def verify(self, keys: KeyRange, manifest: Manifest, status: Status | None = None) -> Totals:
        """Compare a range of keys, write a row for each. Neither side is changed.

        Args:
            keys: The range.
            manifest: Gets the rows.
            status: Told how far it is; its flow is that of the engine.

        Raises:
            PermanentError: The stores refuse what is asked (keys, bucket).
            TransientError: A store failed for longer than the retries last.
        """
        return _Partition(self, manifest, status or Status(), copies=False, since=self.since).run(keys)

    def mirror(
        self, tool: MirrorTool, keys: KeyRange, manifest: Manifest, status: Status | None = None
    ) -> tuple[Totals, str]:
        """Let a tool copy a range of keys, then copy what it left out: nothing that a tool says is trusted.

        In the manifest, what the tool copied is SAME, since it does not say which objects these were; what it left out
        is COPIED. A tool never sees a range with a key that it may take for another one (see `misread`).

        Args:
            tool: Not run where nothing is missing (and nothing different is to be overwritten).
            keys: The range.
            manifest: Gets the rows.
            status: Told how far it is. It counts the copy afterwards alone: the tool tells nothing meanwhile.

        Returns:
            What was counted, and a sentence about the tool; empty: there was nothing to do for it.

        Raises:
            PermanentError: The stores or the tool refuse what is asked.
            TransientError: A store or the tool failed.
        """
        options, status = self.options, status or Status()
        status.doing = "comparing before the copy"
        misread_keys: list[str] = []
        before = _Partition(self, _Nowhere(), Status(flow=status.flow), copies=False, misread_keys=misread_keys).run(
            keys
        )
        status.settle(Totals())  # what the plan counted is still to be done
        wanted = before.objects(ObjectOutcome.MISSING, *([ObjectOutcome.DIFFERENT] if options.overwrite else []))
        said = ""
        if wanted and misread_keys:
            said = (
                f"`{tool.name}` may take a key such as {misread_keys[0]!r} for another one and was not run after "
                f"{keys.after!r}: the native engine copied these objects."
            )
        elif wanted:
            status.doing = f"{tool.name} copies {counted(wanted, 'object')}"
            status.flow.await_resumed()
            done = tool.mirror(keys, compare=options.compare, overwrite=options.overwrite)
            said = done.sentence
            if done.copied != wanted:
                log.warning("%s; the comparison before had found %d objects to be copied.", said, wanted)
        if said:
            log.info("%s", said)
        return self.copy(keys, manifest, status), said


class _Nowhere:
    """A manifest that is not kept."""

    def resume(self) -> tuple[str | None, Totals]:
        return None, Totals()

    def append(self, rows: Rows) -> None:
        pass

    def finish(self) -> None:
        pass


@dataclass
class _Partition:
    transfer: Transfer
    manifest: Manifest
    status: Status
    copies: bool
    since: datetime | None = None
    misread_keys: list[str] | None = None
    totals: Totals = field(default_factory=Totals)
    _md5: bool | None = None

    def run(self, keys: KeyRange) -> Totals:
        start, transfer = time.monotonic(), self.transfer
        last, self.totals = self.manifest.resume()
        if last is not None:
            log.info("Resuming behind the last checkpoint, with %d objects done.", self.totals.objects())
            keys = KeyRange(last, keys.until)
        taken = key_filter(transfer.options.include, transfer.options.exclude)
        self.status.resume(self.totals)
        needed, await_resumed = transfer.needed, self.status.flow.await_resumed
        await_resumed()
        left, right = (
            filtered(
                self._spotted(_ahead(needed.listing(side, keys) if needed else side.pages(keys), await_resumed)), taken
            )
            for side in (transfer.source, transfer.target)
        )
        stretches = beside(needed.pages(keys), left, right) if needed else beside(left, right)
        waiting: Rows | None = None
        for batch in batches(stretches, self._classifier, needed, BATCH_KEYS):
            self.status.doing = "comparing listings"
            idle = not batch.missing and not batch.unsure and not batch.lost
            self._treat(batch)
            if needed:
                settle_vanished(batch, needed, transfer.source, transfer.target)
            if waiting is not None:
                waiting.extend(batch.rows)
            else:
                waiting = batch.rows
            if not idle or len(waiting) >= CHECKPOINT_KEYS:
                self._checkpoint(waiting)
                waiting = None
            else:
                self.status.settle(self.totals, waiting)
        if waiting is not None:
            self._checkpoint(waiting)
        self.manifest.finish()
        self.totals.seconds += time.monotonic() - start
        return self.totals

    def _classifier(self) -> Classifier:
        return Classifier(self.transfer.options.compare == "size", self._trusted)

    def _trusted(self, source: Page, target: Page) -> bool:
        """Return whether ETags are MD5 on both sides: a sample of each is read once a partition."""
        if self.transfer.options.compare != "etag":
            return False
        if self._md5 is None:
            one, other = self._sampled(self.transfer.source, source), self._sampled(self.transfer.target, target)
            if one is None or other is None:
                return False  # nothing here to find out by; later pages may have it
            self._md5 = one and other
            if not self._md5:
                log.info("ETags are not MD5 on both sides: contents are compared instead.")
        return self._md5

    def _sampled(self, side: Bucket, page: Page) -> bool | None:
        plain = [
            (size, key, etag)
            for key, size, etag in zip(*page, strict=True)
            if 0 < size <= _SAMPLE_BYTES and plain_md5((etag,))
        ]
        if not plain:
            return None
        _, key, etag = min(plain)
        found = side.md5(key)
        return None if found is None else found == etag.lower()

    def _treat(self, batch: Classifier) -> None:
        """Compare what listings did not settle, then copy what is missing, and different where that is wanted."""
        if needed := self.transfer.needed:
            settle_lost(batch, needed, self.transfer.source, self.transfer.target)
            read_blocks(batch, needed)
        rows, missing = batch.rows, batch.missing

        def compare(places: list[int]) -> None:
            found = self.transfer.engine.compare([rows.listed(row) for row in places])
            for row, compared in zip(places, found, strict=True):
                rows.put(row, compared.outcome, Comparison.CONTENT, checksum=compared.checksum, detail=compared.detail)

        for places in self._calls(rows, batch.unsure, "comparing the contents of"):
            self._treat_twice(rows, places, compare)
            absent = [row for row in places if rows.outcomes[row] == OUTCOME_CODES[ObjectOutcome.MISSING]]
            missing += absent
            self.status.again(len(absent), sum(rows.sizes[row] for row in absent))
        if not self.copies:
            self._date(rows, missing)
            return
        self._copy(rows, sorted(missing), overwrite=False)
        if self.transfer.options.overwrite:
            different = OUTCOME_CODES[ObjectOutcome.DIFFERENT]
            self._copy(rows, [row for row, code in enumerate(rows.outcomes) if code == different], overwrite=True)

    def _copy(self, rows: Rows, wanted: list[int], *, overwrite: bool) -> None:
        def copy(places: list[int]) -> None:
            done = self.transfer.engine.copy([rows.listed(row) for row in places], overwrite=overwrite)
            for row, copied in zip(places, done, strict=True):
                rows.put(row, copied.outcome, copied.comparison, checksum=copied.checksum, detail=copied.detail)
                rows.target_etags[row] = copied.target_etag or rows.target_etags[row]

        for places in self._calls(rows, wanted, "copying"):
            self._treat_twice(rows, places, copy)
        if self.transfer.lists_copied:
            self._list_copied(rows, wanted)

    def _list_copied(self, rows: Rows, wanted: list[int]) -> None:
        """Fail what the target was given and does not list: it took the key for another one."""
        done = {OUTCOME_CODES[ObjectOutcome.COPIED], OUTCOME_CODES[ObjectOutcome.OVERWRITTEN]}
        copied = [row for row in wanted if rows.outcomes[row] in done]
        if not copied:
            return
        keys = KeyRange(rows.keys[copied[0]][:-1] or None, rows.keys[copied[-1]])
        listed = {key for page in self.transfer.target.pages(keys) for key in page.keys}
        for row in copied:
            if rows.keys[row] not in listed:
                detail = "it was written, and the target does not list it: it may keep it under another key"
                rows.put(row, ObjectOutcome.FAILED, Comparison.NONE, detail=detail)

    def _treat_twice(self, rows: Rows, places: list[int], treat: Callable[[list[int]], None]) -> None:
        """Treat rows; look again for what the source listed and then did not have, and treat again what is there."""
        treat(places)
        vanished = OUTCOME_CODES[ObjectOutcome.VANISHED]
        there = self._looked_up(rows, [row for row in places if rows.outcomes[row] == vanished])
        if again := [row for row, found in there.items() if found]:
            treat(again)
        for row in again:
            if rows.outcomes[row] == vanished:
                detail = "the source has it, and answers 404 when it is read"
                rows.put(row, ObjectOutcome.FAILED, Comparison.NONE, detail=detail)

    def _looked_up(self, rows: Rows, places: list[int]) -> dict[int, StoredObject | None]:
        """Ask the source for objects, and list those again that it does not have."""
        source = self.transfer.source

        def look(row: int) -> StoredObject | None:
            key = rows.keys[row]
            # The key itself comes before all others that begin with it.
            first = source.head(key) or next(source.list(key), None)
            return first if first is not None and first.key == key else None

        if not places:
            return {}
        with ThreadPoolExecutor(_PARALLEL_LOOKS) as pool:
            return dict(zip(places, pool.map(look, places), strict=True))

    def _date(self, rows: Rows, missing: list[int]) -> None:
        """Tell what the target lacks because it was written since the plan was made, or because it is gone since."""
        if self.since is None:
            return
        for row, found in self._looked_up(rows, missing).items():
            if found is None:
                rows.put(row, ObjectOutcome.VANISHED, Comparison.NONE)
            elif written_since(found.modified, self.since):
                rows.details[row] = WRITTEN_SINCE

    def _spotted(self, pages: Iterator[Page]) -> Iterator[Page]:
        """Keep a key that a tool may misread, where there is one, also of those that are left out."""
        if self.misread_keys is None:
            return pages
        kept = self.misread_keys

        def spotting() -> Iterator[Page]:
            for page in pages:
                kept.extend(filter(misread, page.keys) if not kept else ())
                yield page

        return spotting()

    def _calls(self, rows: Rows, places: list[int], doing: str) -> Iterator[list[int]]:
        """Group what the engine is to do into calls."""
        if places:
            self.status.doing = f"{doing} {counted(len(places), 'object')}"
        return rows.groups(places, CALL_BYTES)

    def _checkpoint(self, rows: Rows) -> None:
        rows.time_s = time.time()
        self.manifest.append(rows)
        self.totals.add_rows(rows)
        self.status.settle(self.totals)


def _ahead(pages: Iterator[Page], await_resumed: Callable[[], None]) -> Iterator[Page]:
    """Fetch the next pages in a thread while one is worked on; no more of them in a pause."""
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[Future[Page | None]] = deque(pool.submit(next, pages, None) for _ in range(_PAGES_AHEAD))
        try:
            while (page := waiting.popleft().result()) is not None:
                await_resumed()
                waiting.append(pool.submit(next, pages, None))
                yield page
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

"""Following the clients' writes while they move: what still lands on the store they leave is copied at once.

Others read from the new store already, and would get EIO for a block that is not there. What this misses is no loss:
the copy after the last client has moved finds it.
"""

from __future__ import annotations

import logging
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import TypeVar

from include.juicefs_storage.errors import NeedsHumanError, StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.model import Copied, Listed, ObjectOutcome
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.switch.step import LeaseCheck
from include.juicefs_storage.volume.canary import CANARY_PREFIX
from include.juicefs_storage.volume.comparison import near
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.needed import watermark
from include.juicefs_storage.volume.setting import Setting
from include.juicefs_storage.volume.slice_batches import SliceBatches, batch_of

#: How many blocks one look treats at most, the newest first: the next look must not wait for a long past.
_AT_ONCE = 2_000
#: From so many blocks in one folder on, the range that they span is listed instead.
_LISTED_FROM = 40
_PARALLEL_REQUESTS = 8
_LOOK_EVERY_S = 1.0
#: How long the first pass through older slices may take, and each look's part of the next ones, in seconds.
_FIRST_PASS_S, _PASS_S = 20.0, 0.25
#: Rows between two looks at the clock; and how many ids are held at most, in 8 bytes each.
_OLD_ROWS, _MOST_OLD_IDS = 10_000, 20_000_000

log = logging.getLogger(__name__)

Copy = Callable[[Sequence[Listed]], Sequence[Copied]]
_Answer = TypeVar("_Answer")


@dataclass
class Follower:
    """Copies the blocks of slices that are committed from now on, wherever only the source has them.

    It leaves canaries alone. At every look it reads the newest ids: one batch for each session, and all above. A client
    that writes little may hold ids of an older batch: what is below is read bit by bit, which takes some seconds for a
    million slices.

    Attributes:
        metadata: Asked for slices at every look.
        setting: The volume's.
        source: The store that clients leave.
        target: The store that they move to.
        copy: Copies objects; overwrites none.
        confirm_lease: Called before each copy.
        clock: A monotonic clock.
        compared: What the copy before has compared. What was committed since is copied too. None: not known, all that
            the first look finds below its watermark counts as compared.
        copied: Blocks.
        copied_bytes: Of these blocks.
        slowest_s: The longest time between the look that saw a block's slice and the end of its copy, in seconds.
        waiting: Blocks that the last look left: on neither store, not readable, or too many for one look.
        problem: Why the last look failed; empty where it did not.
    """

    metadata: MetadataStore
    setting: Setting
    source: Bucket
    target: Bucket
    copy: Copy
    confirm_lease: LeaseCheck
    clock: Callable[[], float]
    compared: SliceBatches | None = None
    copied: int = 0
    copied_bytes: int = 0
    slowest_s: float = 0.0
    waiting: int = 0
    problem: str = ""
    _first_id: int | None = field(init=False, default=None)
    _old_ids: array[int] = field(init=False, default_factory=lambda: array("Q"))
    _old_rows: Iterator[tuple[int, int]] = field(init=False, default=iter(()))
    _first_pass_done: bool = field(init=False, default=False)
    _batch: list[tuple[int, int]] = field(init=False, default_factory=list)
    _read_to: int = field(init=False, default=0)
    _settled: set[int] = field(init=False, default_factory=set)
    _waiting: dict[int, tuple[float, list[str]]] = field(init=False, default_factory=dict)

    def follow(
        self,
        over: Callable[[], bool],
        begun: Callable[[], None],
        sleep: Callable[[float], None],
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Poll every second, ignoring transient errors; poll once more at the end unless cancelled.

        Args:
            over: Asked before each look.
            begun: Called after the first look.
            sleep: Waits the given seconds.
            cancelled: Asked when it is over: what follows waits, and a store that hangs would make it wait for long.

        Raises:
            NeedsHumanError: The run must no longer write.
        """
        last, first = False, True
        while not last:
            last, started = over(), self.clock()
            if last and cancelled():
                return
            try:
                self.look()
                self.problem = ""
            except NeedsHumanError:
                raise
            except StorageSwitchError as error:
                if error.problem != self.problem:
                    log.warning("Not seen, or not copied; tried again: %s", error.problem)
                self.problem = error.problem
            if first:
                begun()
                first = False
            if not last:
                sleep(max(0.0, started + _LOOK_EVERY_S - self.clock()))

    @property
    def state(self) -> str:
        """What waits, how long it took, and why the last look failed, for the log."""
        slowest = f", the slowest copy ended {self.slowest_s:.1f} s after it was seen" if self.copied else ""
        return f"{self.waiting:,} wait{slowest}{f'; tried again: {self.problem}' if self.problem else ''}"

    def look(self) -> None:
        """Copy what has been committed since the last look, and what could not be copied then.

        Raises:
            StorageSwitchError: Metadata or a store failed; the next look tries again.
        """
        seen_at = self.clock()
        if self._first_id is None:
            self._first_id = watermark(self.metadata)
            self._old_rows = self.metadata.slices(0, self._first_id)
            since = self._go_through_old(_FIRST_PASS_S)
        else:
            since = self._go_through_old(_PASS_S)
        committed = dict(self.metadata.slices(self._first_id)) | since
        for slice_id in committed.keys() - self._settled - self._waiting.keys():
            keys = [key for key, _ in block_objects(self.setting, slice_id, committed[slice_id])]
            self._waiting[slice_id] = (seen_at, keys)
        unseen = self._waiting.keys() - committed.keys()
        for slice_id in unseen - self.metadata.still_needed(unseen):
            del self._waiting[slice_id]  # deleted, or compacted, meanwhile
        # A canary proves by where its client put it: copied by others it would prove nothing. Asked after the slices:
        # none of these is a canary's that is not known yet.
        canaries = self.metadata.slices_of_files(CANARY_PREFIX) if self._waiting else set()
        chosen, count = [], 0
        for slice_id in sorted(self._waiting.keys() - canaries, reverse=True):
            chosen.append(slice_id)
            count += len(self._waiting[slice_id][1])
            if count >= _AT_ONCE:
                break
        try:
            self._treat(chosen)
        finally:
            self.waiting = sum(len(keys) for _, keys in self._waiting.values())

    def _go_through_old(self, for_s: float) -> dict[int, int]:
        """Continue through the slices with lower ids; those that the copy before has not compared, id to size."""
        new: dict[int, int] = {}
        until = self.clock() + for_s
        while self.clock() < until and len(self._old_ids) < _MOST_OLD_IDS:
            try:
                rows = list(islice(self._old_rows, _OLD_ROWS))
            except StorageSwitchError:
                self._batch = []
                self._old_rows = self.metadata.slices(0 if self._first_pass_done else self._read_to, self._first_id)
                raise
            last = len(rows) < _OLD_ROWS
            if not self._first_pass_done:
                new |= self._take_for_old(rows, last=last)
            else:
                new |= {slice_id: size for slice_id, size in rows if not self._is_old(slice_id)}
            if last:
                self._first_pass_done, self._old_rows = True, self.metadata.slices(0, self._first_id)
                break
        return new

    def _take_for_old(self, rows: list[tuple[int, int]], *, last: bool) -> dict[int, int]:
        """Take the slices for old whose batch has not changed since the copy before; return the others, id to size."""
        new: dict[int, int] = {}
        batches = [list(group) for _, group in groupby([*self._batch, *rows], key=lambda row: batch_of(row[0]))]
        # The rest of the last batch may be in the next rows.
        self._batch = [] if last or not batches else batches.pop()
        for batch in batches:
            ids = [slice_id for slice_id, _ in batch]
            if self.compared is None or self.compared.unchanged(batch_of(ids[0]), ids):
                self._old_ids.extend(ids)
            else:
                new |= dict(batch)
            self._read_to = ids[-1] + 1
        return new

    def _is_old(self, slice_id: int) -> bool:
        place = bisect_left(self._old_ids, slice_id)
        return place < len(self._old_ids) and self._old_ids[place] == slice_id

    def _treat(self, slice_ids: Sequence[int]) -> None:
        since = {key: self._waiting[slice_id][0] for slice_id in slice_ids for key in self._waiting[slice_id][1]}
        done = self._present(since)
        absent = [key for key in since if key not in done]
        if found := [item for item in _ask(self.source.head, absent) if item]:
            self.confirm_lease()
            done |= self._copy([(item.key, item.size_bytes, item.etag) for item in found], since)
        for slice_id in slice_ids:
            seen_at, keys = self._waiting.pop(slice_id)
            if left := [key for key in keys if key not in done]:
                self._waiting[slice_id] = (seen_at, left)
            else:
                self._settled.add(slice_id)

    def _copy(self, objects: Sequence[Listed], since: dict[str, float]) -> set[str]:
        done = set()
        for item, result in zip(objects, self.copy(objects), strict=True):
            if result.outcome is ObjectOutcome.COPIED:
                self.copied += 1
                self.copied_bytes += item[1]
                self.slowest_s = max(self.slowest_s, self.clock() - since[item[0]])
            if result.outcome in {ObjectOutcome.COPIED, ObjectOutcome.SAME}:
                done.add(item[0])
            else:
                log.warning("%s is not copied yet: %s %s", item[0], result.outcome, result.detail)
        return done

    def _present(self, keys: Collection[str]) -> set[str]:
        """Return those of these keys that the target has."""
        folders: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            folders[f"{key.rpartition('/')[0]}/"].append(key)
        few = [key for wanted in folders.values() if len(wanted) < _LISTED_FROM for key in wanted]
        many = sorted(set(keys).difference(few))
        listed = {key for page in near(self.target, many) for key in page.keys}
        asked = {key for key, there in zip(few, _ask(self.target.exists, few), strict=True) if there}
        return asked | listed.intersection(many)


def _ask(ask: Callable[[str], _Answer], keys: Sequence[str]) -> list[_Answer]:
    """Ask for some keys at a time; after one that fails ask for no other, since each may take as long to fail."""
    pool = ThreadPoolExecutor(_PARALLEL_REQUESTS)
    try:
        return list(pool.map(ask, keys))
    finally:
        pool.shutdown(cancel_futures=True)

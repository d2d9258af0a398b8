"""Writers that no session shows: what they put on the store that the clients have left.

`juicefs gc --compact` has no session and keeps the storage that it began with. A client that was suspended for longer
than its session lives wakes up, writes what it had in memory to the old store, and commits it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import islice

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.objects.bucket import Bucket, StoredObject
from include.juicefs_storage.objects.model import Engine, ObjectOutcome
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.volume.layout import slice_of
from include.juicefs_storage.volume.setting import Setting

log = logging.getLogger(__name__)

_PARALLEL_REQUESTS = 8
_BATCH = 1_000
_EXAMPLES = 5
#: So many objects that are newer and on both stores show that both are one, or that one replicates to the other.
_SAME_STORE = 10_000
#: How often the store is looked at, as long as something is found.
_LOOKS = 3
#: Whole seconds of the store's clock, and what was in flight when it was read. What is found twice does no harm.
_MARGIN = timedelta(seconds=5)
#: How many folders of 1,000 slices are listed at most.
_MOST_FOLDERS = 1_000


@dataclass
class LateWrites:
    """Finds the blocks on a store that were written after the last client had left it, and copies them.

    A block is copied before a file refers to it as well: its slice may be committed at any moment.

    Attributes:
        metadata: Tells which slice ids were given out.
        setting: The volume's.
        left: The store that the clients have left.
        target: The store that they use.
        engine: Copies from the first to the second; overwrites nothing.
        confirm_lease: Called before each copy.
        left_at: When the last client had left, by the clock of the store that it left.
        next_slice: Slices with this id or a higher one were given out after that.
        pause_s: Between two looks, in seconds.
        found: Blocks that were found so far.
        examples: Keys of some of them.
    """

    metadata: MetadataStore
    setting: Setting
    left: Bucket
    target: Bucket
    engine: Engine
    confirm_lease: Callable[[], None]
    left_at: datetime
    next_slice: int
    pause_s: float = 60.0
    found: int = 0
    examples: list[str] = field(default_factory=list)

    def run(self, sleep: Callable[[float], None]) -> None:
        """Look until nothing is found any more.

        Args:
            sleep: Waits the given seconds.

        Raises:
            NeedsHumanError: Something is found at every look: a writer is still at work.
            StorageSwitchError: A store cannot be read.
        """
        for looks_left in reversed(range(_LOOKS)):
            if not self.look():
                return
            if looks_left:
                sleep(self.pause_s)
        raise NeedsHumanError(
            f"Something keeps writing blocks to {self.left.name}: {self.found} since the last client had left, such as "
            f"{'; '.join(self.examples)}. No session shows it.",
            state=f"these blocks are copied to {self.target.name}; the next ones will be missing there",
            next_step="find it: a `juicefs gc --compact`, a suspended machine, a mount outside of the cluster; stop "
            "it, or withdraw the key of the store that was left; then clear this task with Downstream",
        )

    def look(self) -> int:
        """Look once.

        Returns:
            How many blocks were found and copied.
        """
        found, both = 0, 0
        newer = self._newer()
        while batch := list(islice(newer, _BATCH)):
            with ThreadPoolExecutor(_PARALLEL_REQUESTS) as pool:
                there = list(pool.map(lambda item: self.target.exists(item.key), batch))
            missing = [item for item, is_there in zip(batch, there, strict=True) if not is_there]
            both += len(batch) - len(missing)
            if missing:
                self._copy(missing)
                found += len(missing)
            if both >= _SAME_STORE and not found:
                log.info(
                    "%s and %s have the same new blocks: they are one store, or replicate.", self.left, self.target
                )
                break
        self.found += found
        return found

    def _newer(self) -> Iterator[StoredObject]:
        """Yield the blocks that were written later, by the store's dates and by their ids."""
        chunks = f"{self.setting.name}/chunks/"
        dated = set[str]()
        for item in self.left.newer(chunks, self.left_at - _MARGIN):
            if slice_of(item.key) >= self.next_slice:
                dated.add(item.key)
            yield item
        if self.setting.hash_prefix:
            return  # its folders hold ids of any age
        # The ids show late writes where the store's clock went back, or where it keeps the dates of copied objects.
        first, end = self.next_slice // 1_000, self.metadata.next_slice() // 1_000 + 1
        for folder in range(first, min(end, first + _MOST_FOLDERS)):
            for item in self.left.list(f"{chunks}{folder // 1_000}/{folder}/"):
                if slice_of(item.key) >= self.next_slice and item.key not in dated:
                    yield item

    def _copy(self, missing: list[StoredObject]) -> None:
        self.confirm_lease()
        results = self.engine.copy([(item.key, item.size_bytes, item.etag) for item in missing])
        for item, result in zip(missing, results, strict=True):
            if result.outcome not in {ObjectOutcome.COPIED, ObjectOutcome.SAME, ObjectOutcome.VANISHED}:
                log.warning("%s is not copied: %s %s", item.key, result.outcome, result.detail)
            if len(self.examples) < _EXAMPLES:
                self.examples.append(item.key)

"""Copy the blocks that only one store has to the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.comparison import Classifier, Rows
from include.juicefs_storage.objects.merge import beside
from include.juicefs_storage.objects.model import Engine, ObjectOutcome
from include.juicefs_storage.objects.progress import Status
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.volume.comparison import batches
from include.juicefs_storage.volume.difference import Difference, missing_blocks, volume_pages
from include.juicefs_storage.volume.setting import Setting
from include.juicefs_storage.volume.slice_batches import SliceBatches

_COPY_PASSES = 5
#: Keys that are compared before the missing ones are copied; bytes that the engine gets between two looks at the clock.
_BATCH_KEYS, _CALL_BYTES = 10_000, 512 * 2**20
_EXAMPLES = 5

log = logging.getLogger(__name__)


@dataclass
class CatchUp:
    """Copies every block of a volume that one store has and the other lacks. Overwrites nothing, deletes nothing.

    Attributes:
        metadata: Which blocks must exist.
        setting: The volume's setting.
        source: Where the blocks are.
        target: Where they must be.
        engine: Copies from the source to the target.
        confirm_lease: Called before each write; raises where this run must not write any more.
        clock: A monotonic clock.
        timeout_s: The limit of one pass, in seconds.
        lost_before: Keys of blocks that no store has, which nobody waits for.
        remember: Remember in `compared` what the last pass compared, for a follower: one more pass over the slices.
        status: Told what happens. Its flow, which is the engine's, counts the blocks that are copied.
        damaged: Keys of blocks that are copied as they are, although their content does not match their checksum.
        copied: Blocks copied so far.
        copied_bytes: Of these blocks.
        compared: The slices that were committed when the last pass began; None where they are not remembered.
    """

    metadata: MetadataStore
    setting: Setting
    source: Bucket
    target: Bucket
    engine: Engine
    confirm_lease: Callable[[], None]
    clock: Callable[[], float]
    timeout_s: float
    lost_before: Collection[str] = frozenset()
    remember: bool = False
    status: Status = field(default_factory=Status)
    damaged: list[str] = field(default_factory=list)
    copied: int = 0
    copied_bytes: int = 0
    compared: SliceBatches | None = None
    _failed: list[str] = field(default_factory=list)

    def run(self) -> Difference:
        """Copy until a pass finds nothing to copy and the metadata misses nothing on the target; five passes at most.

        A pass that copied something is followed by another: an upload in flight when its client moved may land late.

        Returns:
            What the metadata still misses on the target.

        Raises:
            TransientError: A block could not be copied, or a pass took longer than `timeout_s`.
            NeedsHumanError: The run must not write any more.
        """
        difference = Difference()
        for _ in range(_COPY_PASSES):
            before = self.copied
            self._pass()
            self.status.doing = "comparing the target with the metadata"
            difference = missing_blocks(self.metadata, self.setting, self.target, self.lost_before)
            if self.copied == before and not difference.missing:
                break
        return difference

    def _pass(self) -> None:
        """Compare both listings, and copy what the target lacks."""
        deadline, compared = self.clock() + self.timeout_s, 0
        if self.remember:
            # Before the listings: the blocks of these slices are in them.
            self.compared = SliceBatches.of(self.metadata.slices())
        stretches = beside(*(volume_pages(store, self.setting) for store in (self.source, self.target)))
        # By size: blocks are never rewritten, and what the target has is never overwritten here.
        for batch in batches(stretches, lambda: Classifier(by_size=True), batch_keys=_BATCH_KEYS):
            for places in batch.rows.groups(batch.missing, _CALL_BYTES):
                if self.clock() > deadline:
                    raise TransientError(
                        f"The copy did not end within {self.timeout_s:g} s; {self.copied} blocks are copied.",
                        state="nothing was overwritten or deleted; some blocks are not copied yet",
                        next_step="the task tries again and copies the rest",
                    )
                self.confirm_lease()
                self.status.doing = f"copying {counted(len(batch.missing), 'block')}"
                self._copy(batch.rows, places)
            compared += len(batch.rows)
            self.status.doing = f"comparing listings, {counted(compared, 'block')} so far"
        if self._failed:
            examples, count = "; ".join(self._failed[:_EXAMPLES]), len(self._failed)
            raise TransientError(
                f"{count} blocks could not be copied, such as {examples}.",
                state="nothing was overwritten or deleted; the other blocks are copied",
                next_step="the task tries again; then look at both stores",
            )

    def _copy(self, rows: Rows, places: list[int]) -> None:
        results = self.engine.copy([rows.listed(row) for row in places])
        for row, result in zip(places, results, strict=True):
            rows.put(row, result.outcome, result.comparison)
            match result.outcome:
                case ObjectOutcome.COPIED:
                    if result.detail:
                        log.warning("%s is damaged, and copied as it is: %s.", rows.keys[row], result.detail)
                        self.damaged.append(rows.keys[row])
                    self.copied += 1
                    self.copied_bytes += rows.sizes[row]
                # Copied by the follower meanwhile; deleted by a client meanwhile.
                case ObjectOutcome.SAME | ObjectOutcome.VANISHED:
                    pass
                case outcome:
                    self._failed.append(f"{rows.keys[row]} ({outcome} {result.detail})")

"""Copy the blocks that only one store has to the other."""

from __future__ import annotations

from include.juicefs_storage.ports import JuiceFS, MetadataStore, ObjectStore
from include.juicefs_storage.volume.difference import Difference, missing_blocks
from include.juicefs_storage.volume.setting import Setting, StorageConfig

_COPY_PASSES = 5


def catch_up(
    juicefs: JuiceFS,
    metadata: MetadataStore,
    setting: Setting,
    source: StorageConfig,
    target: StorageConfig,
    target_store: ObjectStore,
    *,
    timeout_s: float,
) -> tuple[int, Difference]:
    """Copy blocks that only one store has to the other, until the metadata misses none there.

    Nothing is overwritten and nothing is deleted. A pass that copied something is followed by another: an upload that
    was under way when its client moved may land late.

    Args:
        juicefs: Makes the copy.
        metadata: Tells which blocks must exist.
        setting: Tells their keys.
        source: Where the blocks are.
        target: Where they must be.
        target_store: The same, to look into.
        timeout_s: How long one pass may take, in seconds.

    Returns:
        The number of blocks copied, and what the metadata still misses on the target.
    """
    copied = 0
    difference = Difference()
    for _ in range(_COPY_PASSES):
        result = juicefs.copy_missing(source, target, f"{setting.name}/chunks/", timeout_s=timeout_s)
        copied += result.copied
        difference = missing_blocks(metadata, setting, target_store)
        if not result.copied and not difference.missing:
            break
    return copied, difference

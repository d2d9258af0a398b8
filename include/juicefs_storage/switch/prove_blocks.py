"""Prove that no block that a file refers to is missing."""

from __future__ import annotations

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.volume.difference import Difference, files_of_examples

_COPY = "clear {task} with Downstream; if they are in neither store, restore the files from elsewhere"
_NO_COPY = (
    "find out who removed them: this run copies nothing here. Bring the objects back (an older version of them, a copy "
    "of the bucket), or restore the files from elsewhere; then clear this task with Downstream"
)


def blocks_there(present: int, lost_before: int) -> str:
    """Say how many blocks are there, and how many were lost before the volume was moved."""
    if not lost_before:
        return f"all {present} blocks"
    return f"{present} blocks (all but {lost_before} that were lost before the run and accepted as lost)"


def require_all_blocks(
    difference: Difference, bucket: str, metadata: MetadataStore, *, copied_by: str = "catch_up"
) -> None:
    """Refuse to call anything done while a block that some file refers to is missing or cut.

    Args:
        difference: What a store lacks.
        bucket: Of the store, for the message.
        metadata: Tells which files these are; read in full, and only where something is missing.
        copied_by: The task that copies to this store; empty: nothing is copied, as where the clients keep their store.

    Raises:
        NeedsHumanError: Blocks are missing or differ.
    """
    if difference.missing or difference.different:
        files = ", ".join(files_of_examples(difference, metadata)) or "not known"
        raise NeedsHumanError(
            f"{difference.missing} of {difference.expected} blocks that files refer to are not in {bucket}, "
            f"{difference.different} have another length: {'; '.join(difference.examples)}. Files of these: {files}.",
            state="reads of these blocks fail until they are there",
            next_step=_COPY.format(task=copied_by) if copied_by else _NO_COPY,
        )

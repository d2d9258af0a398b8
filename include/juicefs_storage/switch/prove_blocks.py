"""Prove that no block that a file refers to is missing."""

from __future__ import annotations

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.ports import MetadataStore
from include.juicefs_storage.volume.difference import Difference, files_of_examples


def blocks_there(present: int, lost_before: int) -> str:
    """Say how many blocks are there, and how many were lost before the volume was moved."""
    if not lost_before:
        return f"all {present} blocks"
    return f"{present} blocks (all but {lost_before} that were lost before the run and accepted as lost)"


def require_all_blocks(difference: Difference, bucket: str, metadata: MetadataStore) -> None:
    """Refuse to call anything done while a block that some file refers to is missing or cut.

    Args:
        difference: What a store lacks.
        bucket: Of the store, for the message.
        metadata: Tells which files these are; read in full, and only where something is missing.

    Raises:
        NeedsHumanError: Blocks are missing or differ.
    """
    if difference.missing or difference.different:
        files = ", ".join(files_of_examples(difference, metadata)) or "not known"
        raise NeedsHumanError(
            f"{difference.missing} of {difference.expected} blocks that files refer to are not in {bucket}, "
            f"{difference.different} have another length: {'; '.join(difference.examples)}. Files of these: {files}.",
            state="reads of these blocks fail until they are there",
            next_step="clear catch_up with Downstream; if they are in neither store, restore the files from elsewhere",
        )

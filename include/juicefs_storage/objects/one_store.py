"""Whether two buckets are one, whatever they are called: found out by what is in them."""

from __future__ import annotations

import uuid

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket


def new_probe_key(folder: str) -> str:
    """Return a new key, below a folder, for an object that is written, read and deleted again."""
    return f"{folder}storage-switch-probe-{uuid.uuid4().hex}"


def shows_up(key: str, written_to: Bucket, looked_for_in: Bucket) -> bool:
    """Return whether an object that is written to one bucket is in another one too; it is deleted again.

    Args:
        key: Of the object. Nothing may be there.
        written_to: The bucket that is written to.
        looked_for_in: Only read.

    Raises:
        PermanentError: The bucket that is written to cannot be used.
        TransientError: A store does not answer.
    """
    seen: list[bool] = []
    written_to.probe(key, lambda: seen.append(looked_for_in.exists(key)))
    return any(seen)


def may_be_one(source: Bucket, target: Bucket, prefix: str) -> bool:
    """Return whether two buckets may be one, as far as reading tells; a copy of an object has a date of its own.

    Args:
        source: Whose first object is looked for in the other one.
        target: The other one.
        prefix: What the object's key begins with.
    """
    first = next(source.list(prefix), None)
    if first is None:
        return True
    try:
        left, right = source.head(first.key), target.head(first.key)
    except StorageSwitchError:  # keys limited to other parts of the bucket
        return True
    return left is None or left == right

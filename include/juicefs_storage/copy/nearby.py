"""An empty source: what lies near a prefix that holds nothing."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice

from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.model import below

#: Folders that are looked at, and that are named.
_LOOKED_AT, _NAMED = 100, 3


def refuse_empty(source: Bucket, whole: Bucket, prefix: str) -> None:
    """Refuse a prefix below which nothing lies: it is mistyped, and a copy of nothing is no proof.

    Args:
        source: The source, below the prefix.
        whole: The same bucket without a prefix.
        prefix: As it was given; with none, an empty bucket is taken as it is.

    Raises:
        PermanentError: Nothing lies there.
    """
    if not prefix or source.first_after("") is not None:
        return
    near = _folders_near(whole, prefix)
    meant = " or ".join(f"`{folder}`" for folder in near)
    raise PermanentError(
        f"Param `source_prefix`: expected objects below {prefix!r}, found none in {whole.name}.",
        state="nothing was changed",
        next_step=(f"did you mean {meant}? C" if near else "c") + "orrect `source_prefix`, or `source_bucket`",
    )


def _folders_near(whole: Bucket, prefix: str) -> list[str]:
    """Name folders beside the prefix, else beside a folder above it: the most alike first."""
    parent = prefix
    while parent:
        parent = parent[: parent[:-1].rfind("/") + 1]
        try:
            found = list(islice(_folders(whole, parent), _LOOKED_AT))
        except StorageSwitchError:  # the keys may not list there
            return []
        if found:
            wanted = prefix.removeprefix(parent).lower()
            alike = {folder.removeprefix(parent).lower(): folder for folder in found}
            return [alike[name] for name in get_close_matches(wanted, alike, _NAMED, cutoff=0.5)] or found[:_NAMED]
    return []


def _folders(whole: Bucket, parent: str) -> Iterator[str]:
    """Yield the folders right below a folder: a LIST each."""
    key = whole.first_after(parent)
    for _ in range(_LOOKED_AT):
        if key is None or not key.startswith(parent):
            return
        name, slash, _ = key[len(parent) :].partition("/")
        folder = f"{parent}{name}{slash}"
        if slash:
            yield folder
        key = whole.first_after(below(folder).until or "" if slash else key)

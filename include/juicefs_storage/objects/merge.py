"""Listings side by side, as streams: memory does not grow with the number of objects.

Pages are cut, not taken apart: where listings hold the same keys, whole pages are compared at once.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fnmatch import translate

from include.juicefs_storage.objects.model import Page

EMPTY = Page([], [], [])


def key_filter(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], object] | None:
    """Make the test whether a key is selected: by some `include` (all, where there is none) and by no `exclude`.

    Patterns are shell globs over the whole key below the prefix; `*` matches `/` too.

    Returns:
        The test; None where every key is selected.
    """
    if not include and not exclude:
        return None
    wanted = "|".join(map(translate, include)) or ".*"
    unwanted = f"(?!{'|'.join(map(translate, exclude))})" if exclude else ""
    return re.compile(f"(?s:{unwanted}(?:{wanted}))").match


def filtered(pages: Iterator[Page], taken: Callable[[str], object] | None) -> Iterator[Page]:
    """Drop the keys that a filter rejects, and the pages that end up empty."""
    for page in pages:
        if taken is None:
            if page.keys:
                yield page
            continue
        kept = [place for place, key in enumerate(page.keys) if taken(key)]
        if kept:
            yield Page([page.keys[at] for at in kept], [page.sizes[at] for at in kept], [page.etags[at] for at in kept])


def beside(*listings: Iterator[Page]) -> Iterator[tuple[Page, ...]]:
    """Merge listings into stretches: one page a listing, all of the same range of keys.

    Some pages of a stretch may be empty, never all of them. Memory is bounded by one page a listing.
    """
    pages = [next(listing, EMPTY) for listing in listings]
    while any(page.keys for page in pages):
        last = min(page.keys[-1] for page in pages if page.keys)
        stretch, rest = zip(*(cut_page(page, last) for page in pages), strict=True)
        yield stretch
        pages = [left if left.keys else next(listing, EMPTY) for left, listing in zip(rest, listings, strict=True)]


def cut_page(page: Page, last: str) -> tuple[Page, Page]:
    """Cut a page behind a key: what is up to the key, and the rest."""
    keys = page.keys
    if not keys or keys[-1] <= last:
        return page, EMPTY
    if keys[0] > last:
        return EMPTY, page
    at = bisect_right(keys, last)
    return slice_page(page, 0, at), slice_page(page, at, len(keys))


def slice_page(page: Page, first: int, end: int) -> Page:
    """Return the rows of a page from `first` up to, not including, `end`.

    Args:
        page: The page.
        first: The first row's index.
        end: The index behind the last row.
    """
    keys, sizes, etags = page
    return Page(keys[first:end], sizes[first:end], etags[first:end])

"""Answers to ListObjectsV2: how they are parsed, and how one page follows another."""

from __future__ import annotations

import operator
import re
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice, zip_longest
from typing import TYPE_CHECKING
from urllib.parse import unquote_plus

from include.juicefs_storage.adapters.s3.client import encoded
from include.juicefs_storage.errors import PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.objects.merge import slice_page
from include.juicefs_storage.objects.model import KeyRange, Page, plain_folder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from include.juicefs_storage.adapters.s3.client import S3Client

_ALL = KeyRange()
_PAGE_KEYS = 1000
#: So many consecutive pages without a key are a listing without an end.
_EMPTY_PAGES = 1000


class ListingError(Exception):
    """An answer is no listing, and why."""


@dataclass(frozen=True, slots=True)
class Listing:
    """One answer to ListObjectsV2. Keys are relative to the store's prefix; the last has no token.

    Attributes:
        modified: When each object of the page was written, as the store says it; only where it was asked for.
    """

    page: Page
    token: str | None
    modified: Sequence[str] = ()


_ELEMENT = re.compile(r"<(?:(Owner)>.*?</Owner|([A-Za-z0-9]+)>([^<]*)</\2)>")
_QUOTED = re.compile('(&quot;|&#34;|"|)')
_QUOTE = '(?:&quot;|&#34;|")?'
_WANTED = {"Key": "([^<&]*+)", "ETag": f'{_QUOTE}([^<"&]*+){_QUOTE}', "Size": "([0-9]{1,18}+)"}
_VARYING = {"Key", "Size", "Owner"}
#: Objects that one match takes: each match makes a tuple, which the garbage collector looks at.
_AT_ONCE = 4
_TRUNCATED = re.compile("<IsTruncated>(true|false)</IsTruncated>")
_MODIFIED = re.compile(r"<LastModified>(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)[^<]*</LastModified>")
_TOKEN = re.compile("<NextContinuationToken>([^<&]+)</NextContinuationToken>")


def parse_listing(body: bytes, prefix: str, cut: int | None = None) -> Listing:
    """Read an answer to ListObjectsV2.

    Args:
        body: The answer's.
        prefix: What was asked for: every key must begin with it.
        cut: How many characters of each key are left out; None: the whole prefix.

    Raises:
        ListingError: It is not a listing, is cut short, or has a key without the prefix.
    """
    cut = len(prefix) if cut is None else cut
    try:
        text = body.decode()
        return _parse_uniform(text, prefix, cut) or _parse_any(text, prefix, cut)
    except ValueError as error:
        raise ListingError(str(error)) from None


def _parse_uniform(text: str, prefix: str, cut: int) -> Listing | None:
    """Parse the usual form: all objects have the same elements in one order, keys are URL-encoded. Else return None.

    A regular expression made from the first object has to match all of them; this is 20 times as fast as a parser.
    """
    start, end = text.find("<Contents>"), text.rfind("</Contents>") + len("</Contents>")
    if start < 0 or end < start:
        return None
    first = text[start + len("<Contents>") : text.index("</Contents>")]
    elements = list(_ELEMENT.finditer(first))
    names = tuple(match[1] or match[2] for match in elements)
    around = text[:start] + text[end:]
    truncated = _TRUNCATED.findall(around)
    tokens = _TOKEN.findall(around)
    if (
        not names
        or len(truncated) != 1
        or "<EncodingType>url</EncodingType>" not in around
        or "<CommonPrefixes>" in around
        or "<!" in around
        or not around.rstrip().endswith("</ListBucketResult>")
        or len(tokens) != (truncated[0] == "true")
        or not {"Key", "ETag", "Size"} <= set(names)
        or len(set(names)) != len(names)
    ):
        return None
    number = text.count("<Contents>", start, end)
    adjacent = text.startswith("</Contents><Contents>", start + len("<Contents>") + len(first))
    at_once = _AT_ONCE if adjacent and number % _AT_ONCE == 0 else 1
    # Dates, ETags and storage classes are mostly of one length: they are passed over faster.
    for values in (tuple(match[3] or "" for match in elements), ()):
        rows = _objects_like(names, values, at_once).findall(text, start, end)
        if len(rows) * at_once == number:
            break
    else:
        return None
    fields, wanted = list(chain.from_iterable(rows)), [name for name in names if name in _WANTED]
    columns = {name: fields[place :: len(wanted)] for place, name in enumerate(wanted)}
    # A slash is the one encoded character of plain keys, and a literal "%2F" would be "%252F".
    text = "<".join(columns["Key"]).replace("%2F", "/")
    keys = text.split("<")
    if "%" in text or "+" in text:
        keys = [unquote_plus(key, errors="strict") if "%" in key or "+" in key else key for key in keys]
    return Listing(
        Page(_relative(keys, prefix, cut), list(map(int, columns["Size"])), columns["ETag"]),
        tokens[0] if tokens else None,
    )


def _objects_like(names: tuple[str, ...], values: tuple[str, ...], at_once: int) -> re.Pattern[str]:
    """Match so many objects with these elements; of those that may be of any length, as long as these values.

    Groups: those of `_WANTED`, in their order in the text, object after object.
    """
    named = zip(names, values, strict=False)
    forms = ((0, "") if name in _VARYING else (len(value), _QUOTED.findall(value)[0]) for name, value in named)
    return _pattern(names, tuple(forms), at_once)


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...], forms: tuple[tuple[int, str], ...], at_once: int) -> re.Pattern[str]:
    inner = ""
    for name, form in zip_longest(names, forms):
        value = _WANTED.get(name, "[^<]*+")
        if name == "Owner":
            value = "(?:<[A-Za-z]+>[^<]*+</[A-Za-z]+>)*+"
        elif form and name == "ETag":
            value = f"{form[1]}(.{{{form[0] - 2 * len(form[1])}}}){form[1]}"
        elif form and name not in _WANTED:
            value = f".{{{form[0]}}}"
        inner += f"<{name}>{value}</{name}>"
    return re.compile(f"<Contents>{inner}</Contents>" * at_once)


def _relative(keys: list[str], prefix: str, cut: int) -> list[str]:
    # Between two keys that begin with the prefix, in order (which the caller checks), there are only such keys.
    if keys and prefix:
        if not (keys[0].startswith(prefix) and keys[-1].startswith(prefix)):
            raise ValueError("a key without the prefix that was asked for")
        if cut:
            return [key[cut:] for key in keys]
    return keys


def _parse_any(text: str, prefix: str, cut: int) -> Listing:
    """Parse any well-formed answer. Entities and document types are refused."""
    found, objects = _elements(text)
    truncated, token = found.get("IsTruncated"), found.get("NextContinuationToken")
    if truncated not in ("true", "false"):
        raise ValueError("no IsTruncated")
    if truncated == "true" and not token:
        raise ValueError("more follows, but it does not say from where")

    def key_of(text: str) -> str:
        return unquote_plus(text, errors="strict") if found.get("EncodingType") == "url" else text

    try:
        page = Page(
            _relative([key_of(item["Key"]) for item in objects], prefix, cut),
            [int(item["Size"]) for item in objects],
            [item.get("ETag", "").strip('"') for item in objects],
        )
    except KeyError as error:
        raise ValueError(f"an object without {error}") from None
    if min(page.sizes, default=0) < 0:
        raise ValueError("an object of a negative size")
    return Listing(page, token if truncated == "true" else None)


def _elements(text: str) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return the texts of an answer's own elements, and of each object's."""
    from xml.parsers import expat

    path: list[str] = []
    found: dict[str, str] = {}
    current: dict[str, str] = {}
    objects: list[dict[str, str]] = []
    words: list[str] = []

    def refuse(*_: object) -> None:
        raise ValueError("a document type in a listing")

    def begin(name: str, _: object) -> None:
        path.append(name)
        words.clear()
        if path[1:] == ["Contents"]:
            current.clear()

    def finish(name: str) -> None:
        match path[1:]:
            case ["Contents"]:
                objects.append(dict(current))
            case ["Contents", _]:
                current[name] = "".join(words)
            case ["CommonPrefixes"]:
                raise ValueError("common prefixes, which hide keys and were not asked for")
            case [_]:
                found[name] = "".join(words)
        words.clear()
        path.pop()

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = begin, finish, words.append
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise ValueError(f"not XML: {error}") from None
    return found, objects


def list_pages(
    client: S3Client,
    below: str = "",
    keys: KeyRange = _ALL,
    *,
    max_keys: int | None = None,
    dates: bool = False,
) -> Iterator[Listing]:
    """List page by page. Each page must begin where the last one ended, and be in order.

    Args:
        client: Of the store. It is this generator's own until that is closed.
        below: What every key begins with, relative to the store's prefix.
        keys: Only these, relative to the store's prefix.
        max_keys: Of the first page, which is asked for again where a listing behind a key goes on; None: as of others.
        dates: Tell when each object was written; not together with `keys`.

    Raises:
        PermanentError: The store refuses, or does not list in order.
        TransientError: The store does not answer, or what it answers is no listing.
    """
    base, store = client.store.prefix, client.store
    start = _start(client, below, keys.after)
    order = _Order(store.name, start)
    token, empty = None, 0
    while True:
        query = f"encoding-type=url&list-type=2&max-keys={max_keys or _PAGE_KEYS}&prefix={encoded(base + below)}"
        # A token that follows a start key of our own leads past a key on some servers: a key that was listed does not.
        if start is not None:
            query += f"&start-after={encoded(base + start)}"
        elif token is not None:
            query = f"continuation-token={encoded(token)}&{query}"
        answer = _ask(client, query, base + below, len(base), dates=dates)
        listing = order.behind(answer, start)
        found = listing.page.keys
        if found and keys.until is not None and found[-1] >= keys.until:
            if listing.token is not None:
                _refuse_left_out(client, keys, found[-1])
            yield replace(_within(listing, keys), token=None)
            return
        yield _within(listing, keys)
        if listing.token is None:
            return
        empty = 0 if answer.page.keys else empty + 1
        same = listing.token == token if start is None else bool(answer.page.keys) and not found
        if (same and not max_keys) or empty >= _EMPTY_PAGES:
            found_instead = "the same page again" if same else f"{empty:,} empty pages"
            raise TransientError(
                f"LIST in {store.name}: expected more keys, found {found_instead}.", next_step="look at the store"
            )
        token = listing.token
        if start is not None and not max_keys:
            start = _next_start(answer.page.keys)
        max_keys = None


def _within(listing: Listing, keys: KeyRange) -> Listing:
    """Drop the keys outside of a range."""
    found = listing.page.keys
    first = bisect_right(found, keys.after) if keys.after is not None else 0
    end = bisect_right(found, keys.until) if keys.until is not None else len(found)
    return _cut(listing, first, end)


def _cut(listing: Listing, first: int, end: int) -> Listing:
    """Keep the rows of a page from `first` up to, not including, `end`."""
    if not first and end == len(listing.page.keys):
        return listing
    return replace(listing, page=slice_page(listing.page, first, end), modified=listing.modified[first:end])


def _start(client: S3Client, below: str, after: str | None) -> str | None:
    """Choose the start key of a listing: before all keys behind `after`, and on no server one that loses any of them.

    SeaweedFS leaves out a folder that is the start key, so that no folder which holds such a key may be one. It also
    lists a folder `a/` before `a.b`: where that could hide the folder, one LIST of one key tells whether it is there.
    It keeps `a//b` as `a/b`, and lists both after `a//a`: only a store that lists keys below `a//` starts there.

    Args:
        client: Of the store.
        below: What every key begins with, relative to the store's prefix.
        after: Where the range begins; None: nowhere.
    """
    if after is None or below.startswith(after):
        return None
    folder = plain_folder(after)
    odd, slash, _ = after.removeprefix(folder).partition("/")
    if slash and not _lists_below(client, f"{folder}{odd}/"):
        after = folder
    for at in range(len(below) + 1, len(after)):
        if after[at] < "/" != after[at - 1]:
            name = after[:at]
            if any(key.startswith(f"{name}/") for key in _first_key(client, name)):
                after = name
                break
    start = _just_before(after)
    return start if start > below else None


def _lists_below(client: S3Client, folder: str) -> bool:
    """Ask whether the store lists keys below a folder as it is named; one that takes it for another does not."""
    try:
        return bool(_first_key(client, folder))
    except StorageSwitchError:  # it answers with other keys, or refuses the name
        return False


def _first_key(client: S3Client, prefix: str) -> Sequence[str]:
    """List the first key that begins with a prefix, relative to the store's; empty: there is none."""
    base = client.store.prefix
    query = f"encoding-type=url&list-type=2&max-keys=1&prefix={encoded(base + prefix)}"
    return _ask(client, query, base + prefix, len(base)).page.keys[:1]


def _next_start(keys: Sequence[str]) -> str | None:
    """Choose where the next page begins: before the last key, which is then listed again and shows that none is lost.

    A key of which a folder may have the name is none that SeaweedFS lists all keys behind. What follows a key shows
    whether there is such a folder; what follows the last key is not known.

    Returns:
        A key of the page; None where it has none.
    """
    for key, following in zip(reversed(keys[:-1]), reversed(keys[1:]), strict=True):
        if not following.startswith(f"{key}/"):
            return key
    return keys[-1] if keys else None


def _refuse_left_out(client: S3Client, keys: KeyRange, last: str) -> None:
    """Refuse a store that lists a folder `a/` before `a.b`, which it left out where the range ends in that folder.

    Args:
        client: Of the store.
        keys: The range. It has an end, and more keys follow that were not listed.
        last: The last key that was listed: the end of the range, or behind it.

    Raises:
        PermanentError: The store does so, and has such a key.
    """
    base, until = client.store.prefix, keys.until or ""
    for at, (character, other) in enumerate(zip(last, until, strict=False)):
        if character == "/" and (keys.after is None or keys.after < last[: at + 1]):
            name = last[:at]
            query = f"encoding-type=url&list-type=2&max-keys={{}}&prefix={encoded(base + name)}"
            behind = _ask(client, f"{query.format(1)}&start-after={encoded(base + name)}", base + name, len(base))
            if any(key < f"{name}/" for key in behind.page.keys):
                first = [key for key in _ask(client, query.format(2), base + name, len(base)).page.keys if key != name]
                if first and first[0] > f"{name}/":
                    raise _out_of_order(client.store.name, first[0])
        if character != other:
            return


def _just_before(key: str) -> str:
    """Return a key of which no name is that of a folder with keys behind this one; nearly nothing is in between."""
    key = key.rstrip("/")
    if not key:
        return ""
    last = key[-1]
    if last <= " ":
        return _just_before(key[:-1])
    # "0" less one is "/"; below U+E000 are surrogates, which have no UTF-8.
    less = {"0": ".", "\ue000": "\ud7ff"}.get(last) or chr(ord(last) - 1)
    return f"{key[:-1]}{less}~"


def _ask(client: S3Client, query: str, prefix: str, cut: int, *, dates: bool = False) -> Listing:
    """Ask for one page. See `parse_listing`."""
    response = client.call("GET", client.bucket_path, query)
    if response.status != 200:
        raise client.refused("LIST", response)
    try:
        listing = parse_listing(response.body, prefix, cut)
    except ListingError as error:
        raise client.not_s3("LIST", response.headers, str(error)) from None
    if not dates:
        return listing
    modified = _MODIFIED.findall(response.body.decode())
    if len(modified) != len(listing.page.keys):
        raise client.not_s3("LIST", response.headers, "an object without LastModified")
    return replace(listing, modified=modified)


class _Order:
    """What was listed last, and whether what follows is behind it."""

    def __init__(self, name: str, after: str | None) -> None:
        self._name, self._last = name, after

    def behind(self, listing: Listing, start: str | None) -> Listing:
        """Return a page without the keys that were listed before.

        Args:
            listing: The page.
            start: The key behind which it was asked for; None: it was asked for by a token, and repeats no key.

        Raises:
            PermanentError: Its keys are out of order, or were listed before.
        """
        keys, after = listing.page.keys, self._last if start is None else start
        if keys and ((after is not None and keys[0] <= after) or not _ascending(keys)):
            raise _out_of_order(self._name, self._last)
        new = bisect_right(keys, self._last) if self._last is not None else 0
        self._last = keys[-1] if keys[new:] else self._last
        return _cut(listing, new, len(keys))


def _out_of_order(name: str, after: str | None) -> PermanentError:
    return PermanentError(
        f"LIST in {name}: expected keys in the order of their UTF-8 bytes, found a page out of order after {after!r}.",
        next_step="copy each folder by itself, by `source_prefix` and `target_prefix`; a copy of a key `a.b` together "
        "with a folder `a/` needs a store that lists in this order",
    )


def _ascending(keys: list[str]) -> bool:
    return all(map(operator.lt, keys, islice(keys, 1, None)))

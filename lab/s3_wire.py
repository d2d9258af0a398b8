"""What every S3 server of our own says and reads alike: the page of a listing, and bodies in signed chunks."""

import bisect
from collections.abc import Callable, Sequence
from urllib.parse import parse_qs, quote
from xml.sax.saxutils import escape

_PAGE_KEYS = 1000


def shown(key: str, *, encoded: bool) -> str:
    """Return a key as a listing writes it, URL-encoded where the client asked for that."""
    return quote(key) if encoded else escape(key)


def contents(key: str, size: int, etag: str, modified: str, *, encoded: bool) -> str:
    """Return an object's part of a listing.

    Args:
        key: Of the object.
        size: In bytes.
        etag: Without quotes.
        modified: ISO 8601.
        encoded: Whether the client asked for URL-encoded keys.
    """
    return (
        f"<Contents><Key>{shown(key, encoded=encoded)}</Key><LastModified>{modified}</LastModified>"
        f"<ETag>&#34;{etag}&#34;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def list_page(keys: Sequence[str], query: str, entry: Callable[[str, bool], str], most: int = _PAGE_KEYS) -> str:
    """Return the answer to ListObjectsV2; its continuation token is the last key.

    Args:
        keys: All keys of the bucket, sorted.
        query: The request's query string.
        entry: Returns an object's part by its key, and by whether keys are URL-encoded.
        most: Keys that a page may have, whatever is asked for.
    """
    given = {name: values[0] for name, values in parse_qs(query, keep_blank_values=True).items()}
    prefix, delimiter = given.get("prefix", ""), given.get("delimiter", "")
    after = given.get("continuation-token") or given.get("start-after", "")
    limit = min(most, int(given.get("max-keys") or most))
    encoded = given.get("encoding-type") == "url"
    at = max(bisect.bisect_right(keys, after), bisect.bisect_left(keys, prefix))
    stop = _end_of(keys, prefix)
    entries: list[str] = []
    last = ""
    if not delimiter:
        page = keys[at : min(stop, at + limit)]
        entries = [entry(key, encoded) for key in page]
        last = page[-1] if page else ""
        at += len(page)
    while delimiter and at < stop and len(entries) < limit:
        key = keys[at]
        cut = key.find(delimiter, len(prefix))
        if cut < 0:
            entries.append(entry(key, encoded))
            last, at = key, at + 1
            continue
        common = key[: cut + len(delimiter)]
        at = _end_of(keys, common)
        last = keys[at - 1]
        entries.append(f"<CommonPrefixes><Prefix>{shown(common, encoded=encoded)}</Prefix></CommonPrefixes>")
    more = at < stop
    token = f"<NextContinuationToken>{escape(last)}</NextContinuationToken>" if more else ""
    encoding = "<EncodingType>url</EncodingType>" if encoded else ""
    return (
        '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Prefix>{shown(prefix, encoded=encoded)}</Prefix><KeyCount>{len(entries)}</KeyCount>"
        f"<MaxKeys>{limit}</MaxKeys>{encoding}<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        f"{''.join(entries)}</ListBucketResult>"
    )


def unframed(body: bytes) -> bytes:
    """Return the content of an aws-chunked body: size in hex; signature, content, CRLF."""
    parts: list[bytes] = []
    at = 0
    while True:
        line_end = body.index(b"\r\n", at)
        size = int(body[at:line_end].split(b";")[0], 16)
        if not size:
            return b"".join(parts)
        parts.append(body[line_end + 2 : line_end + 2 + size])
        at = line_end + 2 + size + 2


def _end_of(keys: Sequence[str], prefix: str) -> int:
    """Return the index behind the last key with this prefix."""
    return bisect.bisect_left(keys, prefix[:-1] + chr(ord(prefix[-1]) + 1)) if prefix else len(keys)

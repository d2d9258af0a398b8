"""Listings against a parser."""

from __future__ import annotations

from urllib.parse import quote_plus
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.adapters.s3.listing import ListingError, _parse_any, _parse_uniform, parse_listing

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)


def listing(
    rows: list[tuple[str, int, str]], *, token: str = "", form: str = "aws", encoded: bool = True, extra: str = ""
) -> bytes:
    objects = []
    for key, size, etag in rows:
        match form:
            case "aws":
                shown = quote_plus(key, safe="/") if encoded else escape(key)
                objects.append(
                    f"<Contents><Key>{shown}</Key><LastModified>2026-01-01T00:00:00Z</LastModified>"
                    f"<ETag>&quot;{etag}&quot;</ETag><Size>{size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
                )
            case "go":
                shown = quote_plus(key, safe="") if encoded else escape(key)
                objects.append(
                    f"<Contents><ETag>&#34;{etag}&#34;</ETag><Key>{shown}</Key><Owner><ID>x</ID><DisplayName></DisplayName>"
                    f"</Owner><Size>{size}</Size></Contents>"
                )
            case _:  # no two alike
                shown = quote_plus(key, safe="") if encoded else escape(key)
                maybe = "<ChecksumAlgorithm>CRC32</ChecksumAlgorithm>" * (size % 3)
                objects.append(
                    f"<Contents>\n<Size>{size}</Size>{maybe}<Key>{shown}</Key><ETag>{etag}</ETag></Contents>"
                )
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        + ("<EncodingType>url</EncodingType>" if encoded else "")
        + f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>"
        + (f"<NextContinuationToken>{escape(token)}</NextContinuationToken>" if token else "")
        + "".join(objects)
        + f"{extra}</ListBucketResult>"
    ).encode()


ROWS = st.lists(
    st.tuples(KEYS, st.integers(0, 10**13), st.from_regex(r"\A[0-9a-f]{32}(-[1-9])?\Z")), unique_by=lambda row: row[0]
).map(sorted)


@settings(deadline=None)
@given(
    ROWS, st.sampled_from(["aws", "go", "mixed"]), st.sampled_from(["", "a&b", "tok+en=="]), st.sampled_from(["", "p/"])
)
def test_listings_of_any_form(rows: list[tuple[str, int, str]], form: str, token: str, prefix: str) -> None:
    found = parse_listing(
        listing([(prefix + key, size, etag) for key, size, etag in rows], token=token, form=form), prefix
    )
    assert list(zip(*found.page, strict=True)) == rows
    assert found.token == (token or None)


@settings(deadline=None)
@given(ROWS)
def test_the_fast_way_and_the_parser_agree(rows: list[tuple[str, int, str]]) -> None:
    text = listing(rows, form="aws").decode()
    fast = _parse_uniform(text, "", 0)
    assert fast == _parse_any(text, "", 0) or (fast is None and not rows)


def test_keys_that_are_not_encoded() -> None:
    rows = [("a&b <c>", 1, "e"), ("ü+", 2, "f")]
    found = parse_listing(listing(rows, encoded=False), "")
    assert list(zip(*found.page, strict=True)) == rows


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>503</html>",
        b"\xff",
        listing([("a", 1, "e")])[:-20],
        listing([("a", 1, "e")])[:-19],
        listing([("a", 1, "e")], token="x").replace(b"<NextContinuationToken>x</NextContinuationToken>", b""),
        listing([("a", 1, "e")]).replace(b"<IsTruncated>false</IsTruncated>", b""),
        listing([("a", 1, "e")]).replace(b"<Size>1</Size>", b""),
        listing([("a", 1, "e")]).replace(b"<Size>1</Size>", b"<Size>-1x</Size>"),
        listing([("%FF", 1, "e")]).replace(b"%25FF", b"%FF"),
        listing([("a", 1, "e")]).replace(b"<List", b'<!DOCTYPE l [<!ENTITY x "y">]><List', 1),
    ],
)
def test_what_is_no_listing_is_an_error(body: bytes) -> None:
    with pytest.raises(ListingError):
        parse_listing(body, "")


def test_keys_of_another_prefix_are_an_error() -> None:
    with pytest.raises(ListingError, match="prefix"):
        parse_listing(listing([("q/a", 1, "e")]), "p/")

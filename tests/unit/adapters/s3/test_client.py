"""Signatures against botocore's, listings against a parser."""

from __future__ import annotations

from unittest.mock import patch
from urllib.parse import quote, quote_plus
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.adapters.s3 import client as s3
from include.juicefs_storage.adapters.s3 import signing as sigv4
from include.juicefs_storage.adapters.s3.client import S3Client, S3Store, parse_listing
from include.juicefs_storage.adapters.s3.http import Host
from include.juicefs_storage.adapters.s3.signing import Signer
from include.juicefs_storage.errors import PermanentError, TransientError

KEYS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30)


@settings(deadline=None)
@given(
    KEYS,
    st.lists(st.tuples(st.from_regex(r"\Ax-amz-meta-[a-z]{1,4}\Z"), st.text("a b,é", max_size=9)), max_size=3),
    st.sampled_from(["", "to+k/en=="]),
)
def test_signatures_are_botocores(key: str, metadata: list[tuple[str, str]], token: str) -> None:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    path = f"/bucket/{quote(key, safe='/~')}"
    signer = Signer("s3.example:9000", "eu-west-1", "AKID", "se+cr/et", token)
    on_the_wire = tuple((name, value.encode().decode("latin-1")) for name, value in dict(metadata).items())
    with patch.object(sigv4.time, "time", return_value=1_700_000_000.5):
        text = signer.head("PUT", path, "partNumber=1&uploadId=a%2Bb", on_the_wire, 3).decode("latin-1")
    ours = dict(line.split(": ", 1) for line in text.split("\r\n")[1:] if line)
    request = AWSRequest(
        "PUT",
        f"http://s3.example:9000{path}?partNumber=1&uploadId=a%2Bb",
        headers={
            **dict(metadata),
            "x-amz-content-sha256": "UNSIGNED-PAYLOAD",
            "x-amz-date": ours["x-amz-date"],
            **({"x-amz-security-token": token} if token else {}),
        },
    )
    request.context.update(timestamp=ours["x-amz-date"], payload_signing_enabled=False)
    theirs = S3SigV4Auth(Credentials("AKID", "se+cr/et", token or None), "s3", "eu-west-1")
    canonical = theirs.canonical_request(request)
    signature = theirs.signature(theirs.string_to_sign(request, canonical), request)
    assert ours["x-amz-date"] == "20231114T221320Z"
    assert ours["content-length"] == "3"
    assert ours["authorization"].endswith(f"Signature={signature}")


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
    found = parse_listing(listing([(prefix + key, *rest) for key, *rest in rows], token=token, form=form), prefix)
    assert list(zip(*found.page, strict=True)) == rows
    assert found.token == (token or None)


@settings(deadline=None)
@given(ROWS)
def test_the_fast_way_and_the_parser_agree(rows: list[tuple[str, int, str]]) -> None:
    text = listing(rows, form="aws").decode()
    fast = s3._parse_uniform(text, "")
    assert fast == s3._parse_any(text, "") or (fast is None and not rows)


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
    with pytest.raises(TransientError):
        parse_listing(body, "")


def test_keys_of_another_prefix_are_an_error() -> None:
    with pytest.raises(TransientError, match="prefix"):
        parse_listing(listing([("q/a", 1, "e")]), "p/")


def test_secrets_are_not_shown() -> None:
    store = S3Store("http://h:1", "b", access_key="AKID-x", secret_key="SECRET-x", session_token="TOKEN-x")
    client = S3Client(store)
    for shown in (repr(store), str(store), repr(client), repr(client.signer), store.name):
        assert "-x" not in shown


@pytest.mark.parametrize("endpoint", ["h:1", "http://k:s@h", "http://h/bucket", "ftp://h"])
def test_endpoints_that_are_refused(endpoint: str) -> None:
    with pytest.raises(PermanentError, match="endpoint"):
        S3Store(endpoint, "b")


@pytest.mark.parametrize(
    ("url", "header", "port"),
    [
        ("http://h", "h", 80),
        ("https://h:443", "h", 443),
        ("http://h:443", "h:443", 443),
        ("http://[::1]:9", "[::1]:9", 9),
    ],
)
def test_the_host_header_is_what_s3_clients_sign(url: str, header: str, port: int) -> None:
    host = Host(url)
    assert (host.header, host.port) == (header, port)

"""Heads of answers: what is read from them, and what is refused."""

from __future__ import annotations

import pytest

from include.juicefs_storage.adapters.s3.wire import message
from include.juicefs_storage.adapters.s3.wire.message import HttpError, parse_head


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/2 200 OK",
        b"HTTP/1.1 20 OK",
        b"ICY 200 OK",
        b"HTTP/1.1 200 OK\r\n folded: header",
        b"HTTP/1.1 200 OK\r\nname : value",
        b"HTTP/1.1 200 OK\r\nETag",
        b"HTTP/1.1 200 OK\r\na: b\nc: d",
        b"HTTP/1.1 200 OK\r\na: b\rc: d",
        b"HTTP/1.1 200 OK\r\na: \0",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1",
        b"HTTP/1.1 200 OK\r\nContent-Length: +1",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1 1",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xb2",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 1",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
    ],
)
def test_heads_that_are_refused(head: bytes) -> None:
    parse_head(b"HTTP/1.1 200 OK\r\nETag: 1\r\nContent-Length: 1")  # names that were seen do not make it lenient
    with pytest.raises(HttpError):
        parse_head(head)


def test_headers_are_trimmed_joined_and_lower_case() -> None:
    head = parse_head(
        b"HTTP/1.1 200 OK\r\nETag:  a \r\nX-Amz-Meta-M:\xc3\xa9\r\nx-amz-meta-m: 2\r\nContent-Length: 3\t"
    )
    assert head.headers == {"etag": "a", "x-amz-meta-m": "Ã©, 2", "content-length": "3"}
    assert head.length == 3
    again = parse_head(b"HTTP/1.1 200 OK\r\nETag:  a \r\nContent-Length: 3\t")
    assert again.headers == {"etag": "a", "content-length": "3"}


def test_a_form_that_was_learnt_reads_as_carefully() -> None:
    head = b"HTTP/1.1 200 OK\r\nETag: a b\r\nContent-Length: 12\r\nServer: s"

    def outcome(data: bytes) -> object:
        try:
            found = parse_head(data)
        except HttpError as error:
            return str(error)
        return found.status, found.headers, found.length, found.reusable

    for at in range(len(head)):
        for byte in b"\r\n\0\t :1\xff":
            changed = head[:at] + bytes([byte]) + head[at + 1 :]
            parse_head(head)
            learnt = outcome(changed)
            message._latest.clear()
            assert outcome(changed) == learnt, changed


@pytest.mark.parametrize(
    ("head", "reusable"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: Close", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive", True),
    ],
)
def test_which_connections_are_kept(head: bytes, *, reusable: bool) -> None:
    assert parse_head(head).reusable is reusable

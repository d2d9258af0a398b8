"""Heads and bodies of HTTP/1.1 messages as bytes: no sockets (RFC 9110, RFC 9112).

Nothing is followed, decompressed or guessed: an answer that is not plain HTTP raises `HttpError`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

Buffer: TypeAlias = bytes | memoryview

HEAD_LIMIT_BYTES = 65536
_LINE_LIMIT_BYTES = 4096
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [^\r\n\0]*+)?")
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?")
#: Header names as they were seen together, with what matches such a head and the names in lower case.
_forms: dict[tuple[str, ...], tuple[Callable[[str], re.Match[str] | None], tuple[str, ...]]] = {}
#: By method, the form of the last answer.
_latest: dict[str, tuple[Callable[[str], re.Match[str] | None], tuple[str, ...]]] = {}

CHUNKED, UNTIL_CLOSE = -1, -2


class HttpError(Exception):
    """The connection is of no more use: it ended too early, or what came is not HTTP."""


class TooLongError(HttpError):
    """The answer's body is longer than was allowed for."""


class Head:
    """Status line and headers; names in lower case, values as Latin-1, repeated headers joined by commas."""

    __slots__ = ("headers", "length", "reusable", "status")

    def __init__(self, status: int, headers: dict[str, str], length: int, *, reusable: bool) -> None:
        self.status, self.headers, self.length, self.reusable = status, headers, length, reusable


class Response:
    """An answer whose body is in memory, in the pieces it came in."""

    __slots__ = ("headers", "parts", "size", "status", "tries")

    def __init__(self, head: Head, parts: list[Buffer], size: int) -> None:
        self.tries = 1
        self.status, self.headers, self.parts, self.size = head.status, head.headers, parts, size

    @property
    def body(self) -> bytes:
        """The body in one piece."""
        return b"".join(self.parts)


def parse_head(data: bytes, method: str = "GET") -> Head:
    """Read a status line and headers, without the empty line that ends them.

    Raises:
        HttpError: It is not HTTP/1.x, a header is malformed or folded, or the length of the body is in doubt.
    """
    text = data.decode("latin-1")
    latest = _latest.get(method)
    if latest and (match := latest[0](text)):
        minor, digits, *values = match.groups()
        headers = dict(zip(latest[1], values, strict=True))
    else:
        minor, digits, headers = _parse_any_head(text, method)
    status = int(digits)
    return Head(status, headers, _length(method, status, headers), reusable=_persists(minor, headers.get("connection")))


def _parse_any_head(text: str, method: str) -> tuple[str, str, dict[str, str]]:
    lines = text.split("\r\n")
    if text.count("\n") != len(lines) - 1 or text.count("\r") != len(lines) - 1 or "\0" in text:
        raise HttpError("a control character among the headers")
    first = _STATUS_LINE.fullmatch(lines[0])
    if first is None:
        raise HttpError("no HTTP/1.x status line")
    headers: dict[str, str] = {}
    names = []
    for line in lines[1:]:
        raw, colon, value = line.partition(":")
        if not colon or not _NAME.fullmatch(raw):
            raise HttpError("a malformed header")
        name = raw.lower()
        names.append(raw)
        value = value.strip(" \t")
        if name in headers:
            if name == "content-length" and headers[name] != value:
                raise HttpError("two values of Content-Length")
            value = value if name == "content-length" else f"{headers[name]}, {value}"
        headers[name] = value
    if len(headers) == len(names):
        _learn(tuple(names), method)
    return first[1], first[2], headers


def _learn(names: tuple[str, ...], method: str) -> None:
    """Expect the next answer to such a request to have the same headers in the same order: servers are like that."""
    form = _forms.get(names)
    if form is None and len(_forms) < 100:
        # As the careful way reads it, or no match: one space before a value, none behind, no control characters.
        lines = "".join(rf"\r\n{re.escape(name)}: ((?! )[^\r\n\0\t]*+(?<! ))" for name in names)
        form = re.compile(_STATUS_LINE.pattern + lines).fullmatch, tuple(name.lower() for name in names)
        _forms[names] = form
    if form is not None:
        _latest[method] = form


def _length(method: str, status: int, headers: dict[str, str]) -> int:
    """Return how long the body is: bytes, or CHUNKED, or UNTIL_CLOSE (RFC 9112, 6.3)."""
    if method == "HEAD" or status < 200 or status in (204, 304):
        return 0
    coding, length = headers.get("transfer-encoding"), headers.get("content-length")
    if coding is not None:
        if coding.lower() != "chunked" or length is not None:
            raise HttpError("a Transfer-Encoding other than chunked, or a Content-Length beside it")
        return CHUNKED
    if length is None:
        return UNTIL_CLOSE
    if not (length.isascii() and length.isdigit() and len(length) <= 18):
        raise HttpError("a Content-Length that is no number")
    return int(length)


def _persists(minor: str, connection: str | None) -> bool:
    if connection is None:
        return minor == "1"
    tokens = {token.strip() for token in connection.lower().split(",")}
    return "close" not in tokens and (minor == "1" or "keep-alive" in tokens)


class ChunkDecoder:
    """Takes chunked bytes in any pieces and gives the body's (RFC 9112, 7.1)."""

    def __init__(self) -> None:
        self.done = False
        self.excess = b""
        self._pending = b""  # a line that is not complete yet
        self._left = 0  # of the chunk
        self._state = "size"
        self._trailer_bytes = 0

    def feed(self, data: bytes) -> list[Buffer]:
        """Return the body's bytes in this piece.

        Raises:
            HttpError: It is not chunked.
        """
        parts: list[Buffer] = []
        data = self._pending + data
        at = 0
        while not self.done:
            if self._state == "data":
                part = data[at : at + self._left]
                if not part:
                    break
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                if self._left:
                    break
                self._state = "end"
            end = data.find(b"\r\n", at)
            if end < 0 or end - at > _LINE_LIMIT_BYTES:
                if len(data) - at > _LINE_LIMIT_BYTES:
                    raise HttpError("a chunk's line is too long")
                break
            self._line(data[at:end])
            at = end + 2
        self._pending = b"" if self.done else data[at:]
        self.excess = data[at:] if self.done else b""
        return parts

    def _line(self, line: bytes) -> None:
        if self._state == "end":
            if line:
                raise HttpError("a chunk is longer than it says")
            self._state = "size"
        elif self._state == "size":
            size = _CHUNK_SIZE.fullmatch(line)
            if size is None:
                raise HttpError("a malformed chunk size")
            self._left = int(size[1], 16)
            self._state = "data" if self._left else "trailer"
        else:
            self._trailer_bytes += len(line) + 2
            if self._trailer_bytes > HEAD_LIMIT_BYTES:
                raise HttpError("trailers are too long")
            self.done = not line

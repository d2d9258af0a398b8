"""Answers in any pieces, of any kind, against Python's own client."""

from __future__ import annotations

import contextlib
import http.client
import io
import itertools
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.adapters.s3.wire.connection import Connection
from include.juicefs_storage.adapters.s3.wire.drive import drive
from include.juicefs_storage.adapters.s3.wire.limits import Limits, Steps
from include.juicefs_storage.adapters.s3.wire.message import ChunkDecoder, HttpError, Response, TooLongError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LIMIT = 1 << 20
NAMES = st.sampled_from(["ETag", "x-amz-meta-a", "Date", "Content-Type", "X-Seldom-Seen", "Server"])
VALUES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters="\x7f\x85\xa0"), max_size=20)


def received(pieces: Sequence[bytes], method: str = "GET") -> Response:
    """The answer made of these pieces: each arrives when the client waits; then the server closes."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(ours)
    steps: Steps[Response] = connection.receive_all(method, LIMIT)
    queue = [piece for piece in pieces if piece]
    with ours, theirs:
        try:
            while True:
                assert next(steps) is connection
                if queue:
                    theirs.sendall(queue.pop(0))
                else:
                    theirs.shutdown(socket.SHUT_WR)
        except StopIteration as end:
            response: Response = end.value
            return response


class _Socket(io.BytesIO):
    def makefile(self, *_: object) -> io.BytesIO:
        return self


def expected(data: bytes, method: str = "GET") -> tuple[int, bytes]:
    answer = http.client.HTTPResponse(_Socket(data), method=method)  # type: ignore[arg-type]
    answer.begin()
    return answer.status, answer.read()


def chunked(body: bytes, sizes: Sequence[int], extension: bytes = b"", trailer: bytes = b"") -> bytes:
    out, at = b"", 0
    for size in [*sizes, len(body)]:
        if piece := body[at : at + size]:
            out += b"%x%s\r\n%s\r\n" % (len(piece), extension, piece)
            at += len(piece)
    return out + b"0\r\n" + trailer + b"\r\n"


@st.composite
def answers(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A valid answer and its body."""
    body = draw(st.binary(max_size=200))
    lines = [b"HTTP/1.1 %d %s" % (draw(st.sampled_from([200, 206, 404, 500])), draw(st.sampled_from([b"OK", b""])))]
    for name, value in draw(st.lists(st.tuples(NAMES, VALUES), max_size=5)):
        spaces = draw(st.sampled_from(["", " ", "  ", "\t"]))
        lines.append(f"{name}:{spaces}{value}{draw(st.sampled_from(['', ' ']))}".encode("latin-1"))
    match draw(st.sampled_from(["length", "chunked", "close"])):
        case "length":
            lines.append(b"Content-Length: %d" % len(body))
            wire = body
        case "chunked":
            lines.append(b"Transfer-Encoding: chunked")
            extension = draw(st.sampled_from([b"", b";a=b"]))
            sizes = draw(st.lists(st.integers(1, 50), max_size=5))
            wire = chunked(body, sizes, extension, draw(st.sampled_from([b"", b"x: y\r\n"])))
        case _:
            wire = body
    first = draw(st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n"]))
    return first + b"\r\n".join(lines) + b"\r\n\r\n" + wire, body


def cut(data: bytes, at: Sequence[int]) -> Iterator[bytes]:
    edges = sorted({min(edge, len(data)) for edge in at} | {0, len(data)})
    for start, end in itertools.pairwise(edges):
        yield data[start:end]


@settings(deadline=None)
@given(answers(), st.lists(st.integers(0, 600), max_size=8))
def test_valid_answers_in_any_pieces(answer: tuple[bytes, bytes], edges: list[int]) -> None:
    data, body = answer
    found = received(list(cut(data, edges)))
    assert (found.status, found.body) == expected(data)
    assert found.body == body


@pytest.mark.parametrize(
    "data",
    [
        b'HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 5\r\nETag: "a"\r\n\r\nhello',
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x\r\nhel\r\n2\r\nlo\r\n0\r\na: b\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n",
    ],
)
def test_every_single_cut(data: bytes) -> None:
    whole = received([data])
    for at in range(len(data)):
        found = received([data[:at], data[at:]])
        assert (found.status, found.headers, found.body) == (whole.status, whole.headers, whole.body)
    assert received([bytes([byte]) for byte in data]).body == whole.body


@settings(deadline=None)
@given(answers(), st.data())
def test_an_answer_cut_short_is_an_error(answer: tuple[bytes, bytes], data: st.DataObject) -> None:
    wire, body = answer
    end = data.draw(st.integers(0, len(wire) - 1))
    try:
        found = received([wire[:end]])
    except HttpError:
        return
    # Without a length, the end of the connection is the end of the body; whoever asked knows the object's size.
    assert "content-length" not in found.headers
    assert "transfer-encoding" not in found.headers
    assert body.startswith(found.body)


@settings(deadline=None)
@given(answers(), st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), min_size=1, max_size=3))
def test_a_garbled_answer_is_an_error_or_what_it_is_to_others(
    answer: tuple[bytes, bytes], changes: list[tuple[int, bytes]]
) -> None:
    data = answer[0]
    for at, piece in changes:
        data = data[:at] + piece + data[at + len(piece) :]
    agrees_with_http_client(data)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_anything_else_is_an_error(data: bytes) -> None:
    agrees_with_http_client(data)
    agrees_with_http_client(b"HTTP/1.1 200 OK\r\n" + data)


def agrees_with_http_client(data: bytes) -> None:
    try:
        found = received([data])
    except HttpError:
        return
    status, body = expected(data)
    if status >= 200:  # http.client takes a 103 for the answer
        assert (found.status, found.body) == (status, body)


@settings(deadline=None)
@given(st.binary(max_size=300), st.lists(st.integers(1, 100), max_size=5), st.lists(st.integers(0, 500), max_size=10))
def test_chunks_in_any_pieces(body: bytes, sizes: list[int], edges: list[int]) -> None:
    decoder = ChunkDecoder()
    parts = [part for piece in cut(chunked(body, sizes) + b"excess", edges) for part in decoder.feed(piece)]
    assert b"".join(parts) == body
    assert decoder.done


@pytest.mark.parametrize("name", [b"a: " + b"x" * 70000, b"a: b\r\n" * 12000])
def test_endless_headers_are_refused(name: bytes) -> None:
    with pytest.raises(HttpError, match="too long"):
        received([b"HTTP/1.1 200 OK\r\n" + name])


def test_endless_informational_answers_are_refused() -> None:
    with pytest.raises(HttpError, match="informational"):
        received([b"HTTP/1.1 103 Early Hints\r\n\r\n" * 50])


@pytest.mark.parametrize("framing", [b"Content-Length: 2000000", b"Transfer-Encoding: chunked", b"X: y"])
def test_a_body_longer_than_allowed_is_refused(framing: bytes) -> None:
    body = b"x" * 2_000_000
    wire = chunked(body, [100_000] * 20) if b"chunked" in framing else body
    head = b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n"
    pieces = [wire[at : at + 60_000] for at in range(0, len(wire), 60_000)]
    with pytest.raises(TooLongError):
        received([head, *pieces])


def test_silence_is_a_timeout() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    limits = Limits(idle_s=0.05)
    connection = Connection(ours)
    connection.start(limits, 0, time.monotonic() + 10)
    with ours, theirs, pytest.raises(TimeoutError):
        drive(connection.receive_all("GET", LIMIT), limits)


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"])
def test_an_answer_that_drips_ends_at_the_deadline(head: bytes) -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    limits, over = Limits(idle_s=30), threading.Event()
    connection = Connection(ours)

    def drip() -> None:
        theirs.sendall(head)
        while not over.wait(0.02):
            theirs.sendall(b"1\r\nx\r\n" if head else b"x")

    with ours, theirs:
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            connection.start(limits, 0, time.monotonic() + 0.5)
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                drive(connection.receive_all("GET", LIMIT), limits)
            assert time.monotonic() - started < 5
        finally:
            over.set()
            thread.join()


def test_a_refusal_is_read_while_the_body_is_still_being_sent() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    connection = Connection(ours)
    body = b"x" * 4_000_000
    with ours, theirs:
        steps = connection.send([b"head", body], 4 + len(body))
        next(steps)  # the socket's buffer is full
        theirs.sendall(b"HTTP/1.1 412 Precondition Failed\r\nContent-Length: 0\r\n\r\n")
        with contextlib.suppress(StopIteration):
            next(steps)
        response = drive(connection.receive_all("PUT", LIMIT), Limits())
    assert response.status == 412
    assert not connection.reusable

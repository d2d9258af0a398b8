"""HTTP/1.1 over plain or TLS sockets, no more of it than an object store needs (RFC 9110, RFC 9112).

An exchange is a generator: it yields what it waits for, a connection or a number of seconds, and whoever drives it
decides how. `drive` blocks the calling thread; the native engine's loop serves many exchanges from one thread.
Nothing is followed, decompressed or guessed: an answer that is not plain HTTP raises `HttpError`.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Generator, Iterator

T = TypeVar("T")
#: What an exchange yields: a connection whose `wants` it waits for, or seconds to sleep.
Steps: TypeAlias = "Generator[Connection | float, None, T]"
Buffer: TypeAlias = bytes | memoryview

IN, OUT = select.EPOLLIN, select.EPOLLOUT
#: Larger reads cost more than they save: each allocates fresh pages.
READ_BYTES = 65536
HEAD_LIMIT_BYTES = 65536
_LINE_LIMIT_BYTES = 4096
_INFORMATIONAL_LIMIT = 16
#: The slowest transfer that is waited for: a request may last `idle_s` plus its bytes at this rate.
_SLOWEST_BYTES_S = 65536
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


class StoppedError(BaseException):
    """Whoever drives the exchange wants no more of it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an exchange may last and how often it is tried.

    Attributes:
        connect_s: To open a connection, TLS included.
        idle_s: Without a byte moving.
        tries: Of one request, the first included.
        first_delay_s: Before the second try; doubled each time, with jitter.
        max_delay_s: Between two tries, also where the store asks for more by Retry-After.
    """

    connect_s: float = 10
    idle_s: float = 30
    tries: int = 8
    first_delay_s: float = 0.1
    max_delay_s: float = 20


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
    """How long the body is: bytes, or CHUNKED, or UNTIL_CLOSE (RFC 9112, 6.3)."""
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
        """The body's bytes in this piece.

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


class Connection:
    """One connection, used by one exchange at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.fd = sock, sock.fileno()
        self.wants = IN
        self.mask = 0  # what the loop has registered
        self.used = False  # an earlier exchange went well: the server may have closed it since
        self.answered = False  # a byte of the answer came
        self.deadline = self.since = 0.0
        self.head: Head
        self._rest = b""
        self._left = 0
        self._decoder: ChunkDecoder | None = None
        self.cut_short = False  # the server answered before it had read everything

    def close(self) -> None:
        """Close it. Idempotent."""
        self.sock.close()

    def _recv(self) -> bytes | None:
        """What is there, b"" at the end, None where nothing is there yet."""
        try:
            return self.sock.recv(READ_BYTES)
        except BlockingIOError:
            return None

    #: What was sent in part says nothing about whether there is room for more.
    whole_records = False
    #: While it sends it also listens.
    _wants_sending = IN | OUT

    def _recv_early(self) -> bytes | None:
        return self._recv()

    def send_some(self, parts: list[Buffer]) -> int:
        """Send what there is room for; returns how many bytes that was."""
        try:
            return self.sock.sendmsg(parts)
        except BlockingIOError:
            return 0

    def start(self, limits: Limits, transfer_bytes: int) -> None:
        """Begin an exchange that moves about so many bytes."""
        self.answered = False
        self.deadline = time.monotonic() + 2 * limits.idle_s + transfer_bytes / _SLOWEST_BYTES_S

    def send(self, parts: list[Buffer], size: int, sent: int | None = None) -> Steps[None]:
        """Send all of it, unless the server answers before: the connection is then of no use after the answer.

        Args:
            parts: What to send.
            size: Of all parts, in bytes.
            sent: How much of them `send_some` has sent already; None: it was not asked yet.
        """
        if sent is None:
            sent = self.send_some(parts)
        if sent == size:
            return
        parts = list(parts)
        while True:
            size -= sent
            if not size:
                break
            done = sent
            while done >= len(parts[0]):
                done -= len(parts.pop(0))
            if done:
                parts[0] = memoryview(parts[0])[done:]
            if not sent or not self.whole_records:
                self.wants = self._wants_sending
                yield self
            # A server that refuses may answer without reading on: its answer says why, if it is read before the reset.
            if early := self._recv_early():
                self._rest, self.answered, self.cut_short = early, True, True
                break
            sent = self.send_some(parts)
        self.wants = IN

    def receive_head(self, method: str) -> Steps[Head]:
        """Wait for the status line and headers; 1xx answers are skipped."""
        data, self._rest = self._rest, b""
        for _ in range(_INFORMATIONAL_LIMIT):
            while (end := data.find(b"\r\n\r\n")) < 0:
                if len(data) > HEAD_LIMIT_BYTES:
                    raise HttpError("headers are too long")
                if not self.answered:
                    yield self
                more = self._recv()
                while more is None:
                    yield self
                    more = self._recv()
                if not more:
                    raise HttpError(
                        "closed in the middle of an answer" if self.answered else "closed without an answer"
                    )
                self.answered = True
                data = data + more if data else more
            if end > HEAD_LIMIT_BYTES:
                raise HttpError("headers are too long")
            head = parse_head(data[:end], method)
            data = data[end + 4 :]
            if head.status == 101:
                raise HttpError("an answer that switches protocols")
            if head.status >= 200:
                break
        else:
            raise HttpError("too many informational answers")
        self.head, self._rest, self._left = head, data, head.length
        self._decoder = ChunkDecoder() if head.length == CHUNKED else None
        return head

    def receive(self) -> Steps[list[Buffer]]:  # noqa: PLR0912 - one case a line
        """The body's next bytes, in one or more pieces; nothing at its end.

        Raises:
            HttpError: It ended before its length was reached, or went on behind it.
        """
        while True:
            data: bytes | None = self._rest
            if self._left == 0:
                if data:
                    raise HttpError("bytes behind the end of an answer")
                return []
            if data:
                self._rest = b""
            else:
                data = self._recv()
                while data is None:
                    yield self
                    data = self._recv()
                if not data:
                    if self._left == UNTIL_CLOSE:
                        self._left = 0
                        return []
                    raise HttpError("closed in the middle of a body")
            if self._left > 0:
                if len(data) > self._left:
                    raise HttpError("bytes behind the end of an answer")
                self._left -= len(data)
            elif self._decoder is not None:
                parts = self._decoder.feed(data)
                if self._decoder.done:
                    self._left, self._rest = 0, self._decoder.excess
                if not parts:
                    continue
                return parts
            return [data]

    def receive_all(self, method: str, limit_bytes: int) -> Steps[Response]:
        """Wait for the whole answer.

        Raises:
            HttpError: It is longer than the limit, or not HTTP.
        """
        if not self._rest:
            yield self
            if data := self._recv():
                self.answered = True
                # The usual answer to a request about a small object: it is there at once.
                if (end := data.find(b"\r\n\r\n", 0, HEAD_LIMIT_BYTES)) >= 0:
                    head = parse_head(data[:end], method)
                    if head.length == len(data) - end - 4 and head.status >= 200:
                        self.head, self._left, self._decoder = head, 0, None
                        return Response(head, [data[end + 4 :]], head.length)
                self._rest = data
            elif data is not None:
                raise HttpError("closed without an answer")
        head = yield from self.receive_head(method)
        return (yield from self.receive_body(head, limit_bytes))

    def receive_body(self, head: Head, limit_bytes: int) -> Steps[Response]:
        """Wait for the rest of an answer whose head is there.

        Raises:
            HttpError: It is longer than the limit, or not HTTP.
        """
        left = head.length - len(self._rest)
        if left == 0:  # the usual end of a small object: it all came at once
            rest, self._rest, self._left = self._rest, b"", 0
            return Response(head, [rest], head.length)
        if head.length > limit_bytes:
            raise TooLongError(f"a body of {head.length} bytes where at most {limit_bytes} were expected")
        parts: list[Buffer] = []
        size = 0
        while more := (yield from self.receive()):
            parts += more
            size += sum(map(len, more))
            if size > limit_bytes:
                raise TooLongError(f"a body of more than {limit_bytes} bytes")
        if len(parts) > 64:  # a gathered write takes a limited number of pieces
            parts = [b"".join(parts)]
        return Response(head, parts, size)

    def take_rest(self) -> bytes:
        """What of the body came with the head. Whoever takes it reads what follows from the socket, to its end."""
        rest, self._rest, self._left = self._rest, b"", 0
        return rest

    def block(self, timeout_s: float | None) -> None:
        """Let system calls on the descriptor itself wait for so long; None: not at all, as all else here expects.

        A timeout of Python's would make the descriptor non-blocking, and splice(2) answer EAGAIN at once.
        """
        if timeout_s is not None:
            value = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                self.sock.setsockopt(socket.SOL_SOCKET, option, value)
        with contextlib.suppress(OSError):  # closed meanwhile
            os.set_blocking(self.fd, timeout_s is not None)

    def stale(self, error: Exception) -> bool:
        """Whether the server just closed it while it was idle, which is no failure."""
        return self.used and not self.answered and not isinstance(error, TimeoutError)

    @property
    def reusable(self) -> bool:
        """Whether another exchange may follow: the answer was read to its end, and neither side asked to close."""
        return self.head.reusable and self._left == 0 and self.head.length != UNTIL_CLOSE and not self.cut_short


class TlsConnection(Connection):
    """The same over TLS."""

    sock: ssl.SSLSocket
    whole_records = True
    _wants_sending = OUT  # what becomes readable may be a session ticket and no answer

    def __init__(self, sock: ssl.SSLSocket) -> None:
        super().__init__(sock)
        import ssl

        self._want_read, self._want_write = ssl.SSLWantReadError, ssl.SSLWantWriteError
        self._cut = ssl.SSLEOFError

    def shake_hands(self) -> Steps[None]:
        """Finish the handshake."""
        while True:
            try:
                self.sock.do_handshake()
            except self._want_read:
                self.wants = IN
            except self._want_write:
                self.wants = OUT
            else:
                self.wants = IN
                return
            yield self

    def _recv(self) -> bytes | None:
        try:
            return self.sock.recv(READ_BYTES)
        except (self._want_read, self._want_write):
            return None
        except self._cut:
            return b""

    def _recv_early(self) -> bytes | None:
        return None

    def send_some(self, parts: list[Buffer]) -> int:
        """Send what there is room for; returns how many bytes that was."""
        # OpenSSL wants the same bytes again after it could not write: the first piece stays as it is until it is sent.
        try:
            return self.sock.send(parts[0])
        except (self._want_read, self._want_write):
            return 0


class Host:
    """Where connections go: `http(s)://host[:port]`.

    Args:
        url: Without a path.
        verify: Whether a certificate is checked, or the file of the authorities to trust.
    """

    def __init__(self, url: str, *, verify: bool | str = True) -> None:
        from urllib.parse import urlsplit

        parts = urlsplit(url)
        self.tls = parts.scheme == "https"
        self.name = parts.hostname or ""
        self.port = parts.port or (443 if self.tls else 80)
        #: The Host header: without the port where that is the scheme's own, as S3 clients sign it.
        self.header = parts.netloc if parts.port != (443 if self.tls else 80) else parts.netloc.rpartition(":")[0]
        self._verify = verify
        self._context: ssl.SSLContext | None = None

    def context(self) -> ssl.SSLContext:
        """The TLS settings, made once: reading the trusted authorities takes a while."""
        if self._context is None:
            import ssl

            context = ssl.create_default_context(cafile=self._verify if isinstance(self._verify, str) else None)
            if self._verify is False:
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._context = context
        return self._context

    def connect(self, limits: Limits) -> Steps[Connection]:
        """Open a connection to the first address that takes one.

        Raises:
            OSError: None does; a certificate that is not trusted is an `ssl.SSLCertVerificationError`.
        """
        problem: Exception = OSError(f"{self.name} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(self.name, self.port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection = Connection(sock)
                connection.deadline = time.monotonic() + limits.connect_s
                if sock.connect_ex(address):
                    connection.wants = OUT
                    yield connection
                    connection.wants = IN
                    if number := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                        raise OSError(number, os.strerror(number))
                if self.tls:
                    secured = self.context().wrap_socket(sock, server_hostname=self.name, do_handshake_on_connect=False)
                    tls = TlsConnection(secured)
                    tls.deadline, tls.mask = connection.deadline, connection.mask
                    sock, connection = secured, tls
                    yield from tls.shake_hands()
            except (OSError, TimeoutError) as error:
                sock.close()
                problem = error
            except BaseException:
                sock.close()
                raise
            else:
                return connection
        raise problem


def drive(steps: Steps[T], limits: Limits, stopped: Callable[[], bool] = lambda: False) -> T:
    """Run an exchange in the calling thread, which sleeps where it waits.

    A connection that stays silent for `idle_s`, or passes its deadline, gets a TimeoutError.

    Raises:
        StoppedError: `stopped` says so; it is asked every half second.
    """

    def slices(seconds: float) -> Iterator[float]:
        until = time.monotonic() + seconds
        while (left_s := until - time.monotonic()) > 0:
            yield min(left_s, 0.5)
            if stopped():
                raise StoppedError

    problem: TimeoutError | None = None
    try:
        while True:
            waits = steps.throw(problem) if problem else steps.send(None)
            problem = None
            if isinstance(waits, Connection):
                poll = select.poll()
                poll.register(waits.fd, waits.wants)
                for slice_s in slices(min(limits.idle_s, waits.deadline - time.monotonic())):
                    if poll.poll(slice_s * 1000):
                        break
                else:
                    problem = TimeoutError("no answer in time")
            else:
                for slice_s in slices(waits):
                    time.sleep(slice_s)
    except StopIteration as end:
        result: T = end.value
        return result
    finally:
        steps.close()

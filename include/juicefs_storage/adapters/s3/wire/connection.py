"""One connection to a server, plain or TLS: requests go out, answers come in, piece by piece (HTTP/1.1).

Every method that may wait is a generator of `Steps`: it yields the connection until its socket is ready.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import time
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.wire.limits import SLOWEST_BYTES_S
from include.juicefs_storage.adapters.s3.wire.message import (
    CHUNKED,
    HEAD_LIMIT_BYTES,
    UNTIL_CLOSE,
    Buffer,
    ChunkDecoder,
    Head,
    HttpError,
    Response,
    TooLongError,
    parse_head,
)

if TYPE_CHECKING:
    import ssl

    from include.juicefs_storage.adapters.s3.wire.limits import Limits, Steps

IN, OUT = select.EPOLLIN, select.EPOLLOUT
#: Larger reads cost more than they save: each allocates fresh pages.
READ_BYTES = 65536
_INFORMATIONAL_LIMIT = 16


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
        """Receive what is there: b"" at the end, None where nothing is there yet."""
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

    def start(self, limits: Limits, transfer_bytes: int, until: float) -> None:
        """Begin an exchange.

        Args:
            limits: How long it may be silent.
            transfer_bytes: About how many bytes it moves.
            until: When it must have ended, by `time.monotonic`.
        """
        self.answered = False
        self.deadline = min(until, time.monotonic() + 2 * limits.idle_s + transfer_bytes / SLOWEST_BYTES_S)

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
        """Receive the body's next bytes, in one or more pieces; nothing at its end.

        Raises:
            HttpError: It ended before its length was reached, or continued behind it.
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
        """Take what of the body came with the head. The caller reads the rest from the socket, to its end."""
        rest, self._rest, self._left = self._rest, b"", 0
        return rest

    def receive_into(self, buffer: memoryview) -> int | None:
        """Receive until the buffer is full, on a socket that blocks; 0 at the end, None where nothing came in time."""
        try:
            return self.sock.recv_into(buffer, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            return None

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
        """Return whether the server just closed it while it was idle, which is no failure."""
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

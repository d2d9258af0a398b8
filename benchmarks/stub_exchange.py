"""What the stub store holds of each connection: what came in, what goes out, and the upload that is under way."""

from __future__ import annotations

import dataclasses
import socket
from collections import deque
from email.utils import formatdate

from benchmarks.stub_bucket import Bucket

DATE = formatdate(usegmt=True)

Sendable = bytes | memoryview | tuple[int, int]


class Connection:
    """A client's connection: what came in, what waits to go out, and the upload that is under way."""

    __slots__ = ("fd", "out", "received", "sock", "taken", "upload")

    def __init__(self, sock: socket.socket) -> None:
        self.taken = False  # its request counts as under way
        self.sock = sock
        self.fd = sock.fileno()
        self.received = b""
        self.upload: Upload | None = None
        self.out: deque[Sendable] = deque()


@dataclasses.dataclass(slots=True)
class Upload:
    """A PUT whose body is still coming."""

    bucket: Bucket
    key: str
    head: bytes  # the request's lines, lower case
    md5: str
    length: int  # of what is sent
    size: int  # of the object
    received: bytearray
    to_drop: int = 0
    end: bytearray | None = None  # of a large body that was recognised
    throttled: bool = False

    @property
    def framed(self) -> bool:
        """Whether the body is aws-chunked."""
        return self.size != self.length


def object_head(status: str, length: int, tag: str, extra: str) -> bytes:
    """What comes before an object."""
    return (
        f'HTTP/1.1 {status}\r\nContent-Length: {length}\r\nETag: "{tag}"\r\nLast-Modified: {DATE}\r\n{extra}'
        f"Content-Type: application/octet-stream\r\nAccept-Ranges: bytes\r\nServer: stub\r\nDate: {DATE}\r\n\r\n"
    ).encode()

"""A very cheap S3 server, so that it is the client that is measured: `python -m benchmarks.stub_store --port N`.

One process, one thread, epoll. What is stored is a size and an ETag: a body that is the pattern of `population` is
recognised and dropped (large ones inside the kernel), any other is kept. What is checked of a PUT:

- up to 128 KiB, every byte; the ETag answered is the MD5 of what came;
- above, the first 4 KiB and the last 32 bytes (which name the object) and the length; the ETag answered is the MD5 of
  what the body is if its middle is whole. That the middle is whole is shown on a real server (`benchmarks.sync` runs
  against SeaweedFS too), not here.

Not checked: signatures and access keys. Not there: multipart, versions, user metadata. What it does not know it answers
with 501 and counts as refused.

Beside S3 it answers `GET /-/populate/BUCKET?JSON` (of a `Population`) and `GET /-/state/BUCKET`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gc
import hashlib
import json
import os
import re
import select
import socket
import sys
import time
from collections import deque
from urllib.parse import unquote_to_bytes

from benchmarks.population import KIB, MAX_BYTES, TAIL_BYTES, Population, etag, pattern
from benchmarks.stub_bucket import MODIFIED, Bucket, Stored
from benchmarks.stub_exchange import DATE, Connection, Sendable, Upload, object_head
from benchmarks.stub_throttle import Throttle
from lab.s3_wire import unframed

#: Bodies up to here are received and compared in full.
_SMALL = 128 * KIB
#: How much of a large body is compared before the rest is dropped.
_HEAD = 4 * KIB
#: The end of a large body that is received again: the object's tail, and the last frame where it is aws-chunked.
_END = 512

_RANGE = re.compile(rb"\r\nrange: *bytes=(\d*)-(\d*)")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
_DECODED_LENGTH = re.compile(rb"\r\nx-amz-decoded-content-length: *(\d+)")
_MD5 = re.compile(rb"\r\ncontent-md5: *(\S+)", re.IGNORECASE)
_COPY_SOURCE = re.compile(rb"\r\nx-amz-copy-source: *(\S+)", re.IGNORECASE)
_IF_MATCH = re.compile(rb'\r\nif-match: *"?([^"\r]*)')

_EMPTY_OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nServer: stub\r\n\r\n"
_NO_CONTENT = b"HTTP/1.1 204 No Content\r\nServer: stub\r\n\r\n"


class StubStore:
    """The server."""

    def __init__(self, port: int, latency_s: float = 0, throttle: Throttle | None = None) -> None:
        self.latency_s, self._throttle = latency_s, throttle
        # One wait for all answers, so that the first to be made is the first to be due.
        self._late: deque[tuple[float, Connection, tuple[Sendable, ...]]] = deque()
        self.listener = socket.create_server(("127.0.0.1", port), backlog=512)
        self.listener.setblocking(False)
        self.epoll = select.epoll()
        self.epoll.register(self.listener.fileno(), select.EPOLLIN)
        self.connections: dict[int, Connection] = {}
        self.buckets: dict[str, Bucket] = {}
        self._pattern = memoryview(pattern())
        self._file = os.memfd_create("pattern")
        os.write(self._file, self._pattern)
        # Never written to: the kernel drops what is received with MSG_TRUNC.
        self._nowhere = bytearray(MAX_BYTES)

    def serve(self) -> None:
        """Answer until killed."""
        listener = self.listener.fileno()
        while True:
            while self._late and (due_s := self._late[0][0] - time.monotonic()) <= 0:
                _, connection, parts = self._late.popleft()
                with contextlib.suppress(OSError):  # its client may be gone
                    self._deliver(connection, *parts)
            for fd, _ in self.epoll.poll(due_s if self._late else None):
                if fd == listener:
                    self._accept()
                    continue
                connection = self.connections[fd]
                try:
                    alive = self._flush(connection) if connection.out else self._receive(connection)
                except (ConnectionError, TimeoutError):
                    alive = False
                if not alive:
                    self._close(connection)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self.listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.connections[sock.fileno()] = Connection(sock)
                self.epoll.register(sock.fileno(), select.EPOLLIN)

    def _throttled(self, connection: Connection, bucket: Bucket) -> bool:
        """Whether a request is refused for being one too many."""
        if self._throttle is None:
            return False
        if self._throttle.refuses():
            bucket.requests["throttled"] += 1
            return True
        connection.taken = True
        return False

    def _ended(self, connection: Connection) -> None:
        if connection.taken and self._throttle:
            connection.taken = False
            self._throttle.under_way -= 1

    def _close(self, connection: Connection) -> None:
        self._ended(connection)
        self.epoll.unregister(connection.fd)
        del self.connections[connection.fd]
        connection.sock.close()

    # --- bytes in, bytes out

    def _receive(self, connection: Connection) -> bool:
        upload = connection.upload
        if upload and upload.to_drop:
            try:
                dropped = connection.sock.recv_into(self._nowhere, upload.to_drop, socket.MSG_TRUNC)
            except BlockingIOError:
                return True
            upload.to_drop -= dropped
            return dropped > 0
        try:
            data = connection.sock.recv(65536)
        except BlockingIOError:
            return True
        if not data:
            return False
        if connection.received:
            data = connection.received + data
            connection.received = b""
        while data and not connection.out:
            if connection.upload:
                data = self._body(connection, connection.upload, data)
                if connection.upload:
                    return True
            else:
                end = data.find(b"\r\n\r\n")
                if end < 0:
                    break
                head, data = data[:end], data[end + 4 :]
                data = self._request(connection, head, data)
        connection.received = data
        return True

    def _answer(self, connection: Connection, *parts: Sendable) -> None:
        """Send, after the latency that is asked for."""
        if self.latency_s:
            self._late.append((time.monotonic() + self.latency_s, connection, parts))
        else:
            self._deliver(connection, *parts)

    def _deliver(self, connection: Connection, *parts: Sendable) -> None:
        """Send; what does not fit now goes out when the socket takes it."""
        self._ended(connection)
        if all(not isinstance(part, tuple) for part in parts):
            total = sum(len(part) for part in parts)
            try:
                sent = connection.sock.sendmsg(parts)  # type: ignore[arg-type]
            except BlockingIOError:
                sent = 0
            if sent == total:
                return
            for part in parts:
                if sent >= len(part):
                    sent -= len(part)
                else:
                    connection.out.append(memoryview(part)[sent:])  # type: ignore[arg-type]
                    sent = 0
        else:
            connection.out.extend(parts)
            if self._send(connection):
                return
        self.epoll.modify(connection.fd, select.EPOLLOUT)

    def _flush(self, connection: Connection) -> bool:
        if self._send(connection):
            self.epoll.modify(connection.fd, select.EPOLLIN)
        return True

    def _send(self, connection: Connection) -> bool:
        """Send what waits; whether nothing waits any more."""
        out, sock = connection.out, connection.sock
        try:
            while out:
                part = out.popleft()
                if isinstance(part, tuple):
                    start, stop = part
                    while start < stop:
                        out.appendleft((start, stop))
                        sent = os.sendfile(connection.fd, self._file, start, stop - start)
                        out.popleft()
                        start += sent
                else:
                    out.appendleft(part)
                    sent = sock.send(part, socket.MSG_MORE if len(out) > 1 else 0)
                    out.popleft()
                    if sent < len(part):
                        out.appendleft(memoryview(part)[sent:])
        except BlockingIOError:
            return False
        return True

    # --- requests

    def _request(self, connection: Connection, head: bytes, data: bytes) -> bytes:  # noqa: PLR0912 (a table of routes)
        """Answer a request, or begin an upload; returns what of `data` is not used up."""
        line_end = head.find(b"\r\n")
        method, target, _ = (head if line_end < 0 else head[:line_end]).split(b" ", 2)
        headers = head.lower()
        path, _, query = target.partition(b"?")
        if b"%" in path:
            path = unquote_to_bytes(path)
        name, _, key = path[1:].decode().partition("/")
        length = int(found[1]) if (found := _LENGTH.search(headers)) else 0
        if name == "-":
            self._control(connection, key, query)
            return data
        bucket = self.buckets.get(name)
        if bucket is None:
            if method == b"PUT" and not key:
                self.buckets[name] = Bucket()
                self._answer(connection, _EMPTY_OK)
            elif not name:
                self._answer(connection, self._xml("<ListAllMyBucketsResult><Buckets/></ListAllMyBucketsResult>"))
            else:
                self._error(connection, 404, "NoSuchBucket")
            return data
        # The AWS SDKs for Go name the operation in the query, too.
        plain = key and (not query or query.startswith(b"x-id="))
        throttled = self._throttled(connection, bucket)
        if method == b"PUT" and plain:
            return self._put(connection, bucket, key, head, headers, data, length, throttled=throttled)
        if throttled:
            bucket.requests[method.decode()] += 1
            self._error(connection, 503, "SlowDown")
        elif method == b"GET" and plain:
            bucket.requests["GET"] += 1
            self._get(connection, bucket, key, headers)
        elif method == b"HEAD":
            bucket.requests["HEAD"] += 1
            self._head(connection, bucket, key)
        elif method == b"GET" and not key:
            self._bucket(connection, bucket, query.decode())
        elif method == b"DELETE" and plain:
            bucket.requests["DELETE"] += 1
            bucket.delete(key)
            self._answer(connection, _NO_CONTENT)
        elif method == b"PUT" and not key:
            self._answer(connection, _EMPTY_OK)
        else:
            bucket.requests["refused"] += 1
            self._error(connection, 501, "NotImplemented")
            return data[length:]
        return data

    def _get(self, connection: Connection, bucket: Bucket, key: str, headers: bytes) -> None:
        stored = bucket.objects.get(key)
        if stored is None:
            self._error(connection, 404, "NoSuchKey")
            return
        size = stored.size
        if b"\r\nif-match:" in headers and (match := _IF_MATCH.search(headers)) and match[1].decode() != stored.etag:
            self._error(connection, 412, "PreconditionFailed")
            return
        if b"\r\nrange:" in headers and (match := _RANGE.search(headers)):
            first, last = match[1], match[2]
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= size:
                self._error(connection, 416, "InvalidRange")
                return
            status = "206 Partial Content"
            extra = f"Content-Range: bytes {start}-{stop - 1}/{size}\r\n"
        else:
            start, stop, status, extra = 0, size, "200 OK", ""
        head = object_head(status, stop - start, stored.etag, extra)
        if stored.body is not None:
            self._answer(connection, head, memoryview(stored.body)[start:stop])
            return
        middle = size - TAIL_BYTES
        end = stored.tail[max(0, start - middle) : max(0, stop - middle)]
        if stop - start <= _SMALL:
            self._answer(connection, head, self._pattern[start : max(start, min(stop, middle))], end)
        else:
            self._answer(connection, head, (start, min(stop, middle)), end)

    def _head(self, connection: Connection, bucket: Bucket, key: str) -> None:
        if not key:
            self._answer(connection, _EMPTY_OK)
        elif stored := bucket.objects.get(key):
            self._answer(connection, object_head("200 OK", stored.size, stored.etag, ""))
        else:
            self._answer(connection, b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nServer: stub\r\n\r\n")

    def _bucket(self, connection: Connection, bucket: Bucket, query: str) -> None:
        if "list-type=2" in query:
            bucket.requests["LIST"] += 1
            page = bucket.pages.get(query)
            if page is None:
                page = bucket.pages[query] = self._xml(bucket.page(query))
            self._answer(connection, page)
        elif query.startswith("location"):
            self._answer(connection, self._xml("<LocationConstraint></LocationConstraint>"))
        elif query.startswith("versioning"):
            self._answer(connection, self._xml("<VersioningConfiguration/>"))
        elif query.startswith("object-lock"):
            self._error(connection, 404, "ObjectLockConfigurationNotFoundError")
        else:
            bucket.requests["refused"] += 1
            self._error(connection, 501, "NotImplemented")

    def _put(
        self,
        connection: Connection,
        bucket: Bucket,
        key: str,
        head: bytes,
        headers: bytes,
        data: bytes,
        length: int,
        *,
        throttled: bool,
    ) -> bytes:
        bucket.requests["PUT"] += 1
        if b"\r\nx-amz-copy-source:" in headers and (match := _COPY_SOURCE.search(head)):
            self._copy(connection, bucket, key, unquote_to_bytes(match[1]).decode().lstrip("/"))
            return data
        decoded = _DECODED_LENGTH.search(headers)
        md5 = _MD5.search(head)
        size = int(decoded[1]) if decoded else length
        if b"\r\nexpect: 100-continue" in headers:
            self._answer(connection, b"HTTP/1.1 100 Continue\r\n\r\n")
        upload = Upload(bucket, key, headers, md5[1].decode() if md5 else "", length, size, bytearray())
        upload.throttled = throttled
        if not upload.framed and len(data) >= length:
            self._store(connection, upload, data[:length])
            return data[length:]
        connection.upload = upload
        return self._body(connection, upload, data)

    def _copy(self, connection: Connection, bucket: Bucket, key: str, source: str) -> None:
        name, _, source_key = source.partition("/")
        stored = self.buckets[name].objects.get(source_key) if name in self.buckets else None
        if stored is None:
            self._error(connection, 404, "NoSuchKey")
            return
        bucket.put(Stored(key, stored.size, stored.etag, stored.tail, stored.body))
        result = f"<CopyObjectResult><ETag>&#34;{stored.etag}&#34;</ETag><LastModified>{MODIFIED}</LastModified>"
        self._answer(connection, self._xml(result + "</CopyObjectResult>"))

    def _body(self, connection: Connection, upload: Upload, data: bytes) -> bytes:
        """Take in more of an upload; returns what of `data` is not used up."""
        received = upload.end if upload.end is not None else upload.received
        wanted = (_END if upload.end is not None else upload.length) - len(received)
        received += data[:wanted] if len(data) > wanted else data
        data = data[wanted:]
        if upload.end is not None:
            if len(received) == _END:
                connection.upload = None
                self._store_large(connection, upload, bytes(received))
        elif len(received) >= upload.length:
            connection.upload = None
            self._store(connection, upload, bytes(received))
        elif upload.length > _SMALL and upload.size <= MAX_BYTES and len(received) > 2 * _HEAD:
            begin = received.find(b"\r\n") + 2 if upload.framed else 0
            rest = upload.length - len(received)
            if rest > _END and pattern().startswith(bytes(received[begin : begin + _HEAD])):
                upload.end = bytearray()
                upload.to_drop = rest - _END
        return data

    def _store(self, connection: Connection, upload: Upload, body: bytes) -> None:
        if upload.framed:
            body = unframed(body)
            if len(body) != upload.size:
                self._error(connection, 400, "IncompleteBody")
                return
        middle = upload.size - TAIL_BYTES
        if 0 < middle < MAX_BYTES and pattern().startswith(body[:middle]):
            self._keep(
                connection, upload, Stored(upload.key, upload.size, etag(upload.size, body[middle:]), body[middle:])
            )
        else:
            digest = hashlib.md5(body, usedforsecurity=False).hexdigest()
            self._keep(connection, upload, Stored(upload.key, upload.size, digest, b"", body))

    def _store_large(self, connection: Connection, upload: Upload, end: bytes) -> None:
        """Store a body of which the middle was dropped. `end`: its last bytes as they were sent."""
        if upload.framed:
            last = re.search(rb"\r\n0(;[^\r]*)?\r\n", end)
            if not last or last.start() < TAIL_BYTES:
                self._error(connection, 400, "IncompleteBody")
                return
            end = end[: last.start()]
        tail = end[-TAIL_BYTES:]
        self._keep(connection, upload, Stored(upload.key, upload.size, etag(upload.size, tail), tail))

    def _keep(self, connection: Connection, upload: Upload, stored: Stored) -> None:
        if upload.md5 and base64.b64decode(upload.md5).hex() != stored.etag:
            self._error(connection, 400, "BadDigest")
            return
        if upload.throttled:
            self._error(connection, 503, "SlowDown")
            return
        if b"\r\nif-none-match:" in upload.head and stored.key in upload.bucket.objects:
            self._error(connection, 412, "PreconditionFailed")
            return
        upload.bucket.put(stored)
        head = f'HTTP/1.1 200 OK\r\nContent-Length: 0\r\nETag: "{stored.etag}"\r\nServer: stub\r\nDate: {DATE}\r\n\r\n'
        self._answer(connection, head.encode())

    def _error(self, connection: Connection, status: int, code: str) -> None:
        self._answer(connection, self._xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", status))

    @staticmethod
    def _xml(text: str, status: int = 200) -> bytes:
        body = b'<?xml version="1.0" encoding="UTF-8"?>\n' + text.encode()
        head = (
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'Error'}\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\nServer: stub\r\nDate: {DATE}\r\n\r\n"
        )
        return head.encode() + body

    # --- the benchmark's own

    def _control(self, connection: Connection, path: str, query: bytes) -> None:
        """populate/BUCKET: the bucket holds exactly this from now on; state/BUCKET: what is in it."""
        verb, _, name = path.partition("/")
        if verb == "populate":
            population = Population(**json.loads(unquote_to_bytes(query)))
            bucket = self.buckets[name] = Bucket(population.page_keys)
            for key, size, tail in population.objects():
                stored = Stored(key, size, etag(size, tail), tail)
                stored.entry(encoded=True)
                bucket.put(stored)
            gc.collect()
            gc.freeze()
        bucket = self.buckets[name]
        lines = (f"{key}\t{bucket.objects[key].size}\t{bucket.objects[key].etag}\n" for key in bucket.keys)
        state = {
            "objects": len(bucket.objects),
            "bytes": sum(stored.size for stored in bucket.objects.values()),
            "digest": hashlib.sha256("".join(lines).encode()).hexdigest(),
            "requests": bucket.requests,
        }
        body = json.dumps(state).encode()
        self._answer(connection, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def main() -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--latency-ms", type=float, default=0, help="before each answer")
    parser.add_argument("--at-once", type=int, default=0, help="requests, more get 503; 0: any number")
    parser.add_argument("--per-second", type=float, default=0, help="requests, more get 503; 0: any number")
    arguments = parser.parse_args()
    # Cycles are made only when a population is; a collection in the middle of a round would be noise.
    gc.disable()
    sys.setswitchinterval(1)
    limited = arguments.at_once or arguments.per_second
    throttle = Throttle(arguments.at_once, arguments.per_second) if limited else None
    StubStore(arguments.port, arguments.latency_ms / 1000, throttle).serve()


if __name__ == "__main__":
    main()

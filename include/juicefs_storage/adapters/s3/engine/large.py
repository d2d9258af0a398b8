"""Large objects: read and written at once, by the kernel (splice) unless TLS or a hash needs to see the bytes."""

from __future__ import annotations

import hashlib
import os
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple

from include.juicefs_storage.adapters.s3.client import Tries, await_resumed, is_md5
from include.juicefs_storage.adapters.s3.engine.answers import (
    REFUSAL_BYTES,
    EndedError,
    changed,
    kept,
    not_read,
)
from include.juicefs_storage.adapters.s3.engine.proof import not_written, proven, xxh3
from include.juicefs_storage.adapters.s3.engine.put import put_object
from include.juicefs_storage.adapters.s3.stream import stream
from include.juicefs_storage.adapters.s3.wire.connection import Connection
from include.juicefs_storage.adapters.s3.wire.drive import StoppedError
from include.juicefs_storage.adapters.s3.wire.limits import held_back
from include.juicefs_storage.adapters.s3.wire.message import CHUNKED, HttpError
from include.juicefs_storage.objects.model import Comparison, Copied, Listed, ObjectOutcome
from include.juicefs_storage.volume.checksum import Crc32c, checksum_problem, recorded_checksum

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from include.juicefs_storage.adapters.s3.client import S3Client
    from include.juicefs_storage.adapters.s3.engine.proof import Hash
    from include.juicefs_storage.adapters.s3.engine.worker import Worker
    from include.juicefs_storage.adapters.s3.signing import Headers
    from include.juicefs_storage.adapters.s3.wire.limits import Steps
    from include.juicefs_storage.adapters.s3.wire.message import Buffer, Head, Response

_STOP_CHECK_S = 1.0


class ReadError(Exception):
    """It was the source that failed, and how."""

    def __init__(self, error: Exception, retry_after: str | None = None) -> None:
        super().__init__(error)
        self.error, self.retry_after = error, retry_after


def send_large(worker: Worker, item: Listed, *, create_only: bool) -> Steps[Copied]:
    """Send an object as it comes in: GET and PUT at once.

    Args:
        worker: The worker of this thread.
        item: The object, as the source lists it.
        create_only: Write only where the target has no such object.
    """
    _, size, etag = item
    hashes = [] if is_md5(etag) and not worker.shared.foreign_target else [hashlib.md5, xxh3]
    sent: Sent

    def send(more: Headers) -> Steps[Response]:
        def request(head: Head) -> tuple[str, Headers]:
            return "", kept(head.headers) + worker.target.new_headers + more

        nonlocal sent
        sent = yield from relay(worker, item, (), request, size, hashes)
        return sent.answer

    def digest(*, read: bool) -> Steps[str]:
        if is_md5(etag) and not read:
            return etag
        found = yield from stream(worker.source, item[0], lambda _: hashlib.md5(usedforsecurity=False), size)
        if found is None:
            raise EndedError(ObjectOutcome.VANISHED)
        return found.hexdigest()

    put = yield from put_object(worker, send, digest, create_only=create_only)
    if put.status != 200:
        return (yield from not_written(worker, item, put))
    worker.target.granted += 1
    written = put.headers.get("etag", "").strip('"')
    if written == etag and is_md5(etag):
        return Copied(ObjectOutcome.COPIED, written, Comparison.ETAG, detail=sent.damage)
    # From now on what is sent is hashed on the way, which saves reading the source a second time.
    worker.shared.foreign_target = True
    copied = yield from proven(worker, item, written, *sent.sums)
    return copied._replace(detail=copied.detail or sent.damage)


class Sent(NamedTuple):
    """What a target answered to what was sent.

    Attributes:
        answer: It may be a refusal.
        sums: The digests of what was sent, in hex.
        damage: How it differs from the checksum that JuiceFS left with it; empty where it does not.
    """

    answer: Response
    sums: list[str]
    damage: str = ""


def relay(  # over 60 lines: every way out of an exchange of two connections closes both
    worker: Worker,
    item: Listed,
    get_headers: Headers,
    put_request: Callable[[Head], tuple[str, Headers]],
    size: int,
    hashes: Sequence[Callable[[], Hash]],
) -> Steps[Sent]:
    """Send a source object, or a part of it, as it comes in; from the start again where either side fails.

    Args:
        worker: Of this thread.
        item: The object.
        get_headers: Beside the usual ones; a range, or nothing.
        put_request: The query and the extra headers of the PUT, from the head of the GET's answer.
        size: How many bytes there are to move.
        hashes: What to compute of them on the way.

    Raises:
        ObjectError, StoreDownError: A side kept failing.
        EndedError: VANISHED, CHANGED; DAMAGED, before the last piece is sent.
    """
    key, source, target = item[0], worker.source, worker.target
    reading, writing, moved_before = Tries(source, size), Tries(target, size), worker.moving.bytes
    damage = Damage(worker)
    while True:
        get = put = retry_after = None
        worker.moving.bytes = moved_before
        tries, action = writing, "PUT"
        try:
            get, answer = yield from _ask(worker, source, item, get_headers, size, reading.until)
            put = yield from target.connection()
            put.start(worker.shared.limits, size, writing.until)
            query, headers = put_request(answer)
            head = target.signer.head("PUT", target.path(key), query, headers, size)
            yield from put.send([head], len(head))
            sums = [make() for make in hashes]
            damage.begin({} if get_headers else answer.headers)
            plain = type(get) is type(put) is Connection
            if sums or damage.expected or not plain or answer.length == CHUNKED:
                yield from _pump(worker, get, put, size, sums, damage)
            else:
                yield from _splice(worker, get, put, size)
            if not put.cut_short:
                source.release(get)
                get = None
            response = yield from put.receive_all("PUT", REFUSAL_BYTES)
            target.release(put)
            put = None
            if not target.again(response):
                target.answers += 1
                response.tries = writing.made + 1
                return Sent(response, [made.hexdigest() for made in sums], damage.problem)
            problem, retry_after = f"status {response.status}", response.headers.get("retry-after")
        except ReadError as failed:
            tries, action = reading, "GET"
            problem, retry_after = source.problem(failed.error), failed.retry_after
        except (OSError, HttpError) as error:
            if put is not None and put.stale(error):
                continue
            problem = target.problem(error)
        finally:
            for connection in (get, put):
                if connection is not None:
                    connection.close()
        yield tries.delay(action, problem, retry_after)
        yield from await_resumed(worker.shared.flow, reading, writing)


def _ask(
    worker: Worker, source: S3Client, item: Listed, headers: Headers, size: int, until: float
) -> Steps[tuple[Connection, Head]]:
    """GET an object, or a part of it, up to where its body begins.

    Raises:
        ReadError: Try again.
        ObjectError, EndedError: Do not.
    """
    while True:
        get = None
        try:
            get = yield from source.connection()
            get.start(worker.shared.limits, size, until)
            head = source.signer.head("GET", source.path(item[0]), headers=headers)
            yield from get.send([head], len(head))
            answer = yield from get.receive_head("GET")
            if answer.status not in (200, 206):
                refused = yield from get.receive_body(answer, REFUSAL_BYTES)
                if source.again(refused):
                    raise ReadError(HttpError(f"status {answer.status}"), refused.headers.get("retry-after"))
                source.answers += 1
                raise not_read(source, refused)
            source.answers += 1
            source.granted += 1
            if answer.length not in (size, CHUNKED) or changed(answer.headers, item[2]):
                raise EndedError(ObjectOutcome.CHANGED)
        except (OSError, HttpError) as error:
            if get is not None:
                get.close()
                if get.stale(error):
                    continue
            raise ReadError(error) from None
        except BaseException:
            if get is not None:
                get.close()
            raise
        return get, answer


class Damage:
    """Whether what is read from the source matches the checksum that JuiceFS left with it.

    Attributes:
        expected: Whether there is such a checksum.
        problem: How the content differs, each time that it was read; empty where it does not.
    """

    def __init__(self, worker: Worker) -> None:
        self._copies, self._headers, self._found = worker.shared.copy_damaged, dict[str, str](), Crc32c()
        self.expected, self.problem = False, ""

    def begin(self, headers: dict[str, str]) -> None:
        """Begin to read an object with these headers."""
        self._headers, self._found, self.expected = headers, Crc32c(), recorded_checksum(headers) is not None

    def update(self, parts: Sequence[Buffer], left: int) -> None:
        """Take the next pieces.

        Args:
            parts: The pieces.
            left: How many bytes are still to come.

        Raises:
            ReadError: All of it was read, for the first time with this content, which may be the network's fault.
            EndedError: DAMAGED, and such objects are not copied.
        """
        for part in parts:
            self._found.update(part)
        if left:
            return
        before, self.problem = self.problem, checksum_problem(self._headers, self._found)
        if self.problem and self.problem != before:
            raise ReadError(HttpError(self.problem))
        if self.problem and not self._copies:
            raise EndedError(ObjectOutcome.DAMAGED, self.problem)


def _pump(
    worker: Worker, get: Connection, put: Connection, size: int, sums: Sequence[Hash], damage: Damage
) -> Steps[None]:
    """Move a body through this process."""
    left = size
    while True:
        try:
            parts = yield from get.receive()
            if not parts and left:
                raise HttpError("a body shorter than listed")
        except (OSError, HttpError) as error:
            raise ReadError(error) from None
        if not parts:
            return
        moved = sum(map(len, parts))
        left -= moved
        if left < 0:
            raise EndedError(ObjectOutcome.CHANGED)
        for made in sums:
            for part in parts:
                made.update(part)
        if damage.expected:
            damage.update(parts, left)
        worker.moving.bytes += moved
        yield from held_back(worker.shared.flow, moved, get, put)
        yield from put.send(parts, moved)
        if put.cut_short:
            return


def _splice(worker: Worker, get: Connection, put: Connection, size: int) -> Steps[None]:
    """Let the kernel move a body, through a pipe: no byte of it is seen here."""
    rest = get.take_rest()
    left = size - len(rest)
    if left < 0:
        raise EndedError(ObjectOutcome.CHANGED)
    bandwidth, moving = worker.shared.flow.bandwidth, worker.moving
    yield from held_back(worker.shared.flow, len(rest), get, put)
    yield from put.send([rest], len(rest))
    moving.bytes += len(rest)
    read_fd, write_fd = worker.pipe()
    done = False
    for connection in (get, put):
        connection.block(_STOP_CHECK_S)
    try:
        while left and not put.cut_short:
            try:
                waiting = _moved(worker, get, write_fd, get.fd, min(left, bandwidth.step_bytes), os.SPLICE_F_MOVE)
                if not waiting:
                    raise HttpError("closed in the middle of a body")
            except (OSError, HttpError) as error:
                raise ReadError(error) from None
            left -= waiting
            # A sender that drips never lets the system call time out.
            if monotonic() > get.deadline:
                raise ReadError(TimeoutError("no answer in time"))
            moving.bytes += waiting
            if bandwidth.bytes_s:
                yield from held_back(worker.shared.flow, waiting, get, put)
            more = os.SPLICE_F_MORE if left else 0
            try:
                while waiting:
                    waiting -= _moved(worker, put, put.fd, read_fd, waiting, os.SPLICE_F_MOVE | more)
            except (BrokenPipeError, ConnectionResetError):
                put.cut_short = True
        done = not left and not put.cut_short
    finally:
        for connection in (get, put):
            connection.block(None)
        if not done:
            worker.drop_pipe()


def _moved(worker: Worker, connection: Connection, to_fd: int, from_fd: int, size: int, flags: int) -> int:
    """Call splice(2), for as long as the connection may take."""
    idle_until = monotonic() + worker.shared.limits.idle_s
    while True:
        try:
            return os.splice(from_fd, to_fd, size, flags=flags)
        except BlockingIOError:  # the receive or send timeout of the socket
            if worker.shared.stop.is_set():
                raise StoppedError from None
            if monotonic() > min(idle_until, connection.deadline):
                raise TimeoutError("no byte moved") from None

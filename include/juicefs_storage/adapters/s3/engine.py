"""The default engine: objects through this process on plain sockets, as few CPU cycles each as Python allows.

Small objects: one thread, many exchanges at once (`_Loop`). Large ones: a thread each, where the kernel moves the bytes
from socket to socket (splice) unless TLS or a hash needs them. What this engine cannot treat, obstore gets to try.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import heapq
import os
import re
import select
import threading
from collections import deque
from functools import lru_cache, partial
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Protocol, TypeVar

from include.juicefs_storage.adapters.s3.client import (
    PUT_LIMIT_BYTES,
    ObjectError,
    S3Client,
    Tries,
    encoded,
    error_code,
    is_md5,
    stream,
)
from include.juicefs_storage.adapters.s3.obstore_engine import ObstoreEngine
from include.juicefs_storage.adapters.s3.wire.connection import Connection
from include.juicefs_storage.adapters.s3.wire.drive import StoppedError, drive
from include.juicefs_storage.adapters.s3.wire.limits import Limits
from include.juicefs_storage.adapters.s3.wire.message import CHUNKED, HttpError, Response, TooLongError
from include.juicefs_storage.objects.model import Compared, Comparison, Copied, Engine, Listed, ObjectOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from include.juicefs_storage.adapters.s3.signing import Headers
    from include.juicefs_storage.adapters.s3.store import S3Store
    from include.juicefs_storage.adapters.s3.wire.limits import Steps
    from include.juicefs_storage.adapters.s3.wire.message import Buffer, Head

SMALL_BYTES = 2**20
#: A store copies larger objects for so long before it answers that they are better sent.
_SERVER_COPY_BYTES = 2**30
_PART_BYTES = 64 * 2**20
_MOST_PARTS = 9000
_LARGE_LANES = 8
_PIPE_BYTES = 2**20
_F_SETPIPE_SZ = 1031  # linux/fcntl.h
_STOP_CHECK_S = 1.0
_JOIN_S = 5.0
_REFUSAL_BYTES = 2**20
_ABORT_LIMITS = Limits(connect_s=5, idle_s=5, tries=3)
_KEPT = frozenset(
    {"content-type", "cache-control", "content-disposition", "content-encoding", "content-language", "expires"}
)
_ETAG = re.compile(rb"<ETag>(?:&quot;|&#34;|\")?([^<\"&]*)")
_UPLOAD_ID = re.compile(rb"<UploadId>([^<&]+)</UploadId>")
_CREATE_ONLY: Headers = (("if-none-match", "*"),)


class _EndedError(Exception):
    """The object needs no copy any more: VANISHED or CHANGED."""

    def __init__(self, outcome: ObjectOutcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class _ReadError(Exception):
    """It was the source that failed, and how."""

    def __init__(self, error: Exception, retry_after: str | None = None) -> None:
        super().__init__(error)
        self.error, self.retry_after = error, retry_after


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> None: ...
    def hexdigest(self) -> str: ...
    def copy(self) -> _Hash: ...


R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")


class _Treat(Protocol[R_co]):
    def __call__(self, worker: _Worker, item: Listed, *, in_memory: bool) -> Steps[R_co]: ...


class _Bandwidth:
    """Spreads bytes over time, for all threads together."""

    def __init__(self, bytes_s: float | None) -> None:
        self.limited = bool(bytes_s)
        self._bytes_s, self._free_at, self._lock = bytes_s, 0.0, threading.Lock()

    def delay(self, size: int) -> float:
        """Seconds to wait before so many bytes may move."""
        if not self._bytes_s:
            return 0.0
        with self._lock:
            now = monotonic()
            start = max(self._free_at, now)
            self._free_at = start + size / self._bytes_s
            return start - now


class _Worker:
    """What one thread owns: a client for each side, and a pipe."""

    def __init__(self, source: S3Store, target: S3Store, limits: Limits) -> None:
        self.source, self.target = S3Client(source, limits), S3Client(target, limits)
        self._pipe: tuple[int, int] | None = None

    def pipe(self) -> tuple[int, int]:
        """Where bytes pass through on their way from socket to socket; empty."""
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a smaller one is slower, no more
                fcntl.fcntl(self._pipe[1], _F_SETPIPE_SZ, _PIPE_BYTES)
        return self._pipe

    def drop_pipe(self) -> None:
        """Forget a pipe that may hold bytes of an object that was given up."""
        if self._pipe is not None:
            os.close(self._pipe[0])
            os.close(self._pipe[1])
            self._pipe = None

    def close(self) -> None:
        """Close everything."""
        self.source.close()
        self.target.close()
        self.drop_pipe()


class NativeEngine(Engine):
    """`model.Engine` on plain sockets. Not for several threads at once.

    Args:
        source: Read only.
        target: Written.
        concurrency: How many objects are on their way at once.
        bandwidth_bytes_s: Upper limit for what is read from the source; None: none.
        limits: Of each request.
        put_limit_bytes: Larger objects go in parts.
    """

    def __init__(
        self,
        source: S3Store,
        target: S3Store,
        concurrency: int = 32,
        bandwidth_bytes_s: float | None = None,
        *,
        limits: Limits | None = None,
        put_limit_bytes: int = PUT_LIMIT_BYTES,
        part_bytes: int = _PART_BYTES,
    ) -> None:
        self._stores, self._concurrency, self._limits = (source, target), concurrency, limits or target.limits
        self._put_limit_bytes, self._part_bytes = put_limit_bytes, part_bytes
        self._bandwidth = _Bandwidth(bandwidth_bytes_s)
        self._loop = _Loop(self._limits)
        self._workers = [_Worker(source, target, self._limits)]
        self._stop = threading.Event()
        # Learned from the target's first answers.
        self._create_only = True
        self._foreign_target = False
        self._server_copy = source.endpoint == target.endpoint

    def close(self) -> None:
        """Close all connections. Idempotent; the engine may be used again."""
        for worker in self._workers:
            worker.close()

    def copy(self, objects: Sequence[Listed], *, overwrite: bool = False) -> list[Copied]:
        """Copy the source's objects with their metadata, each proven at once.

        An object that appeared on the target meanwhile is compared instead: SAME, or DIFFERENT and left alone.
        """

        def treat(worker: _Worker, item: Listed, *, in_memory: bool) -> Steps[Copied]:
            return self._copy(worker, item, overwrite=overwrite, in_memory=in_memory)

        results, problems = self._run(objects, treat)
        if problems:
            items = [objects[index] for index in problems]
            others = self._obstore().copy(items, overwrite=overwrite)
            for (index, problem), other in zip(problems.items(), others, strict=True):
                failed = other.outcome is ObjectOutcome.FAILED
                results[index] = other._replace(detail=f"{problem}; {other.detail}") if failed else other
        return [result or Copied(ObjectOutcome.FAILED) for result in results]

    def compare(self, objects: Sequence[Listed]) -> list[Compared]:
        """Read both sides in full and compare."""
        results, problems = self._run(objects, self._compare)
        if problems:
            items = [objects[index] for index in problems]
            for (index, problem), other in zip(problems.items(), self._obstore().compare(items), strict=True):
                failed = other.outcome is ObjectOutcome.FAILED
                results[index] = other._replace(detail=f"{problem}; {other.detail}") if failed else other
        return [result or Compared(ObjectOutcome.FAILED) for result in results]

    def _obstore(self) -> ObstoreEngine:
        return ObstoreEngine(*self._stores, min(self._concurrency, _LARGE_LANES))

    # -- who does what, on which thread

    def _run(self, objects: Sequence[Listed], treat: _Treat[R]) -> tuple[list[R | None], dict[int, str]]:
        """Treat all objects: what became of each, and why some need another engine."""
        results: list[R | None] = [None] * len(objects)
        problems: dict[int, str] = {}
        small_bytes = SMALL_BYTES
        small = deque(index for index, item in enumerate(objects) if item[1] <= small_bytes)
        large = deque(index for index, item in enumerate(objects) if item[1] > small_bytes)
        errors: list[BaseException] = []
        self._stop.clear()

        def lane(worker: _Worker, jobs: deque[int], *, in_memory: bool) -> Steps[None]:
            while jobs:
                try:
                    index = jobs.popleft()
                except IndexError:  # another thread took it
                    return
                try:
                    results[index] = yield from treat(worker, objects[index], in_memory=in_memory)
                except ObjectError as problem:
                    problems[index] = str(problem)

        def thread(worker: _Worker) -> None:
            try:
                drive(lane(worker, large, in_memory=False), self._limits, self._stop.is_set)
            except BaseException as error:  # noqa: BLE001 - raised again by the calling thread
                errors.append(error)
                self._stop.set()

        lanes = min(len(large), self._concurrency, _LARGE_LANES)
        while len(self._workers) <= lanes:
            self._workers.append(_Worker(*self._stores, self._limits))
        threads = [
            threading.Thread(target=thread, args=(worker,), name="copy large objects", daemon=True)
            for worker in self._workers[1 : lanes + 1]
        ]
        try:
            for item in threads:
                item.start()
            worker = self._workers[0]
            lanes = min(len(small), self._concurrency)
            self._loop.run([lane(worker, small, in_memory=True) for _ in range(lanes)], worker, self._stop.is_set)
            for item in threads:
                item.join()
        finally:
            self._stop.set()
            large.clear()
            for item in threads:
                item.join(_JOIN_S)
        if errors:
            raise next((error for error in errors if not isinstance(error, StoppedError)), errors[0])
        self._explain_denials()
        return results, problems

    def _explain_denials(self) -> None:
        """Where a side refused everything, that is what is wrong, and no matter of single objects."""
        for client in (client for worker in self._workers for client in (worker.source, worker.target)):
            if client.denied is not None and not client.granted:
                raise client.denied

    # -- one object

    def _copy(self, worker: _Worker, item: Listed, *, overwrite: bool, in_memory: bool) -> Steps[Copied]:
        try:
            if self._server_copy and item[1] <= _SERVER_COPY_BYTES:
                copied = yield from self._copy_on_server(worker, item, overwrite=overwrite)
                if copied is not None:
                    return copied
            if delay_s := self._bandwidth.delay(item[1]) if in_memory else 0:
                yield delay_s
            send = self._send_small if in_memory else self._send_large
            if item[1] > self._put_limit_bytes:
                send = self._send_parts
            create_only = self._create_only and not overwrite
            copied = yield from send(worker, item, create_only=create_only)
            if copied.outcome is ObjectOutcome.FAILED:  # it was not stored as it was sent: once more, over our own
                copied = yield from send(worker, item, create_only=False)
        except _EndedError as ended:
            return Copied(ended.outcome)
        return (
            copied._replace(outcome=ObjectOutcome.OVERWRITTEN)
            if overwrite and copied.outcome is ObjectOutcome.COPIED
            else copied
        )

    def _send_small(self, worker: _Worker, item: Listed, *, create_only: bool) -> Steps[Copied]:
        """GET into memory, then PUT."""
        key, size, etag = item
        source, target = worker.source, worker.target
        try:
            got = yield from source.request("GET", source.path(key), limit_bytes=size)
        except TooLongError:
            raise _EndedError(ObjectOutcome.CHANGED) from None
        if got.status != 200:
            raise _not_read(source, got)
        source.granted += 1
        if got.size != size or _changed(got.headers, etag):
            raise _EndedError(ObjectOutcome.CHANGED)
        headers = _kept(got.headers)
        conditions = _CREATE_ONLY if create_only else ()
        path = target.path(key)
        put = yield from target.request("PUT", path, "", headers + conditions, got.parts, size)
        if create_only and put.status in (400, 501):
            put = yield from self._put_without_condition(put, target.request("PUT", path, "", headers, got.parts, size))
        if put.status != 200:
            return (yield from self._not_written(worker, item, put))
        target.granted += 1
        written = put.headers.get("etag", "").strip('"')
        if written == etag and is_md5(etag):
            return Copied(ObjectOutcome.COPIED, written, Comparison.ETAG)
        md5 = hashlib.md5(usedforsecurity=False)
        content = _xxh3()
        for part in got.parts:
            md5.update(part)
            content.update(part)
        return (yield from self._proven(worker, item, written, md5.hexdigest(), content.hexdigest()))

    def _put_without_condition(self, refused: Response, again: Steps[Response]) -> Steps[Response]:
        """Whether it was the condition that the store did not take: then it is not sent any more."""
        response = yield from again
        if response.status == 200:
            self._create_only = False
            return response
        return refused

    def _not_written(self, worker: _Worker, item: Listed, put: Response) -> Steps[Copied]:
        """A PUT that was refused: because the object is there by now, or for good.

        Raises:
            ObjectError: For good.
        """
        if put.status != 412:
            raise worker.target.refuse("PUT", put)
        compared = yield from self._compare(worker, item, in_memory=False)
        # An earlier try may have written it, and its answer got lost.
        outcome = ObjectOutcome.COPIED if put.tries > 1 and compared.outcome is ObjectOutcome.SAME else compared.outcome
        return Copied(outcome, comparison=Comparison.CONTENT, checksum=compared.checksum)

    def _proven(self, worker: _Worker, item: Listed, written: str, md5: str = "", content: str = "") -> Steps[Copied]:
        """Whether the target stored what it was sent: its ETag is the MD5 of that, or it is read back.

        Args:
            worker: Of this thread.
            item: What was copied.
            written: The target's ETag.
            md5: Of what was sent, if it was hashed.
            content: xxh3-64 of what was sent, if it was hashed.
        """
        if md5 and md5 == written:
            return Copied(ObjectOutcome.COPIED, written, Comparison.CONTENT, content)
        if not content:
            read = yield from _digest(worker.source, item)
            if read is None:
                raise _EndedError(ObjectOutcome.VANISHED)
            content = read
        if (yield from _digest(worker.target, item)) == content:
            return Copied(ObjectOutcome.COPIED, written, Comparison.CONTENT, content)
        return Copied(ObjectOutcome.FAILED, written, Comparison.CONTENT, detail="read back, it is not what was sent")

    def _copy_on_server(self, worker: _Worker, item: Listed, *, overwrite: bool) -> Steps[Copied | None]:
        """CopyObject, which moves no byte through this process. None: the store does not do it, or not this one."""
        key, _, etag = item
        source, target = worker.source, worker.target
        headers: Headers = (("x-amz-copy-source", source.copy_source(key)),)
        if etag:
            headers += (("x-amz-copy-source-if-match", f'"{etag}"'),)
        if self._create_only and not overwrite:
            headers += _CREATE_ONLY
        answer = yield from target.request("PUT", target.path(key), "", headers, None, 0, transfer_bytes=16 * 2**20)
        code = error_code(answer)
        if answer.status == 404 and code == "NoSuchKey":
            raise _EndedError(ObjectOutcome.VANISHED)
        if answer.status != 200 or code:
            # 412: changed at the source or appeared on the target; an error after 200: the store was too slow. Both are
            # for the long way to find out. Anything else: the store does not copy, or these keys may not read there.
            if answer.status not in (200, 412):
                self._server_copy = False
            return None
        source.granted += 1
        target.granted += 1
        found = _ETAG.search(answer.body)
        written = found[1].decode() if found else ""
        done = ObjectOutcome.OVERWRITTEN if overwrite else ObjectOutcome.COPIED
        if written == etag and is_md5(etag):
            return Copied(done, written, Comparison.ETAG)
        now = yield from source.request("HEAD", source.path(key))
        if now.status == 404 or _changed(now.headers, etag):  # a store that does not heed the condition
            raise _EndedError(ObjectOutcome.CHANGED)
        copied = yield from self._proven(worker, item, written)
        return copied._replace(outcome=done) if copied.outcome is ObjectOutcome.COPIED else copied

    def _send_large(self, worker: _Worker, item: Listed, *, create_only: bool) -> Steps[Copied]:
        """GET and PUT at once."""
        _, size, etag = item
        hashes = [] if is_md5(etag) and not self._foreign_target else [hashlib.md5, _xxh3]
        conditions = _CREATE_ONLY if create_only else ()
        put, sums = yield from self._relay(
            worker, item, (), lambda head: ("", _kept(head.headers) + conditions), size, hashes
        )
        if create_only and put.status in (400, 501):
            again = self._relay(worker, item, (), lambda head: ("", _kept(head.headers)), size, hashes)
            without, sums = yield from again
            if without.status == 200:
                self._create_only, put = False, without
        if put.status != 200:
            return (yield from self._not_written(worker, item, put))
        worker.target.granted += 1
        written = put.headers.get("etag", "").strip('"')
        if written == etag and is_md5(etag):
            return Copied(ObjectOutcome.COPIED, written, Comparison.ETAG)
        # From now on what is sent is hashed on the way, which saves reading the source a second time.
        self._foreign_target = True
        return (yield from self._proven(worker, item, written, *sums))

    def _relay(
        self,
        worker: _Worker,
        item: Listed,
        get_headers: Headers,
        put_request: Callable[[Head], tuple[str, Headers]],
        size: int,
        hashes: Sequence[Callable[[], _Hash]],
    ) -> Steps[tuple[Response, list[str]]]:
        """Send a source object, or a part of it, as it comes in; from the start again where either side fails.

        Args:
            worker: Of this thread.
            item: The object.
            get_headers: Beside the usual ones; a range, or nothing.
            put_request: The query and the extra headers of the PUT, from the head of the GET's answer.
            size: How many bytes there are to move.
            hashes: What to compute of them on the way.

        Returns:
            The target's answer, which may be a refusal, and the digests in hex.

        Raises:
            ObjectError, StoreDownError: A side went on failing.
            _EndedError: VANISHED, CHANGED.
        """
        key, source, target = item[0], worker.source, worker.target
        reading, writing = Tries(source, size), Tries(target, size)
        while True:
            get = put = retry_after = None
            tries, action = writing, "PUT"
            try:
                get, answer = yield from self._ask(source, item, get_headers, size, reading.until)
                put = yield from target.connection()
                put.start(self._limits, size, writing.until)
                query, headers = put_request(answer)
                head = target.signer.head("PUT", target.path(key), query, headers, size)
                yield from put.send([head], len(head))
                sums = [make() for make in hashes]
                if sums or type(get) is not Connection or type(put) is not Connection or answer.length == CHUNKED:
                    yield from self._pump(get, put, size, sums)
                else:
                    yield from self._splice(worker, get, put, size)
                if not put.cut_short:
                    source.release(get)
                    get = None
                response = yield from put.receive_all("PUT", _REFUSAL_BYTES)
                target.release(put)
                put = None
                if not target.again(response):
                    target.answers += 1
                    response.tries = writing.made + 1
                    return response, [made.hexdigest() for made in sums]
                problem, retry_after = f"status {response.status}", response.headers.get("retry-after")
            except _ReadError as failed:
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

    def _ask(
        self, source: S3Client, item: Listed, headers: Headers, size: int, until: float
    ) -> Steps[tuple[Connection, Head]]:
        """GET an object, or a part of it, up to where its body begins.

        Raises:
            _ReadError: Try again.
            ObjectError, _EndedError: Do not.
        """
        while True:
            get = None
            try:
                get = yield from source.connection()
                get.start(self._limits, size, until)
                head = source.signer.head("GET", source.path(item[0]), headers=headers)
                yield from get.send([head], len(head))
                answer = yield from get.receive_head("GET")
                if answer.status not in (200, 206):
                    refused = yield from get.receive_body(answer, _REFUSAL_BYTES)
                    if source.again(refused):
                        raise _ReadError(HttpError(f"status {answer.status}"), refused.headers.get("retry-after"))
                    source.answers += 1
                    raise _not_read(source, refused)
                source.answers += 1
                source.granted += 1
                if answer.length not in (size, CHUNKED) or _changed(answer.headers, item[2]):
                    raise _EndedError(ObjectOutcome.CHANGED)
            except (OSError, HttpError) as error:
                if get is not None:
                    get.close()
                    if get.stale(error):
                        continue
                raise _ReadError(error) from None
            except BaseException:
                if get is not None:
                    get.close()
                raise
            return get, answer

    def _pump(self, get: Connection, put: Connection, size: int, sums: Sequence[_Hash]) -> Steps[None]:
        """Move a body through this process."""
        left = size
        while True:
            try:
                parts = yield from get.receive()
                if not parts and left:
                    raise HttpError("a body shorter than listed")
            except (OSError, HttpError) as error:
                raise _ReadError(error) from None
            if not parts:
                return
            moved = sum(map(len, parts))
            left -= moved
            if left < 0:
                raise _EndedError(ObjectOutcome.CHANGED)
            for made in sums:
                for part in parts:
                    made.update(part)
            yield from self._held_back(moved, get, put)
            yield from put.send(parts, moved)
            if put.cut_short:
                return

    def _held_back(self, size: int, *connections: Connection) -> Steps[None]:
        if delay_s := self._bandwidth.delay(size):
            for connection in connections:
                connection.deadline += delay_s
            yield delay_s

    def _splice(self, worker: _Worker, get: Connection, put: Connection, size: int) -> Steps[None]:
        """Let the kernel move a body, through a pipe: no byte of it is seen here."""
        rest = get.take_rest()
        left = size - len(rest)
        if left < 0:
            raise _EndedError(ObjectOutcome.CHANGED)
        yield from self._held_back(len(rest), get, put)
        yield from put.send([rest], len(rest))
        read_fd, write_fd = worker.pipe()
        done = False
        for connection in (get, put):
            connection.block(_STOP_CHECK_S)
        try:
            while left and not put.cut_short:
                try:
                    waiting = self._moved(get, write_fd, get.fd, min(left, _PIPE_BYTES), os.SPLICE_F_MOVE)
                    if not waiting:
                        raise HttpError("closed in the middle of a body")
                except (OSError, HttpError) as error:
                    raise _ReadError(error) from None
                left -= waiting
                # A sender that drips never lets the system call time out.
                if monotonic() > get.deadline:
                    raise _ReadError(TimeoutError("no answer in time"))
                if self._bandwidth.limited:
                    yield from self._held_back(waiting, get, put)
                more = os.SPLICE_F_MORE if left else 0
                try:
                    while waiting:
                        waiting -= self._moved(put, put.fd, read_fd, waiting, os.SPLICE_F_MOVE | more)
                except (BrokenPipeError, ConnectionResetError):
                    put.cut_short = True
            done = not left and not put.cut_short
        finally:
            for connection in (get, put):
                connection.block(None)
            if not done:
                worker.drop_pipe()

    def _moved(self, connection: Connection, to_fd: int, from_fd: int, size: int, flags: int) -> int:
        """splice(2), for as long as the connection may take."""
        idle_until = monotonic() + self._limits.idle_s
        while True:
            try:
                return os.splice(from_fd, to_fd, size, flags=flags)
            except BlockingIOError:  # the receive or send timeout of the socket
                if self._stop.is_set():
                    raise StoppedError from None
                if monotonic() > min(idle_until, connection.deadline):
                    raise TimeoutError("no byte moved") from None

    def _send_parts(self, worker: _Worker, item: Listed, *, create_only: bool) -> Steps[Copied]:
        """A multipart upload, part after part; aborted where it does not come to its end."""
        key, size, etag = item
        source, target = worker.source, worker.target
        found = yield from source.request("HEAD", source.path(key))
        if found.status == 404:
            raise _EndedError(ObjectOutcome.VANISHED)
        if found.status != 200:
            raise source.refuse("HEAD", found)
        if found.headers.get("content-length") != str(size) or _changed(found.headers, etag):
            raise _EndedError(ObjectOutcome.CHANGED)
        path = target.path(key)
        if create_only and (yield from target.request("HEAD", path)).status == 200:
            compared = yield from self._compare(worker, item, in_memory=False)
            return Copied(compared.outcome, comparison=Comparison.CONTENT, checksum=compared.checksum)
        begun = yield from target.request("POST", path, "uploads=", _kept(found.headers), None, 0)
        upload_id = _UPLOAD_ID.search(begun.body)
        if begun.status != 200 or upload_id is None:
            raise target.refuse("POST", begun)
        upload = f"uploadId={encoded(upload_id[1].decode())}"
        try:
            parts, content = yield from self._upload_parts(worker, item, upload)
            body = "".join(
                f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{part}&quot;</ETag></Part>"
                for number, part in enumerate(parts, start=1)
            )
            data = f"<CompleteMultipartUpload>{body}</CompleteMultipartUpload>".encode()
            conditions = _CREATE_ONLY if create_only else ()
            ended = yield from target.request("POST", path, upload, conditions, [data], len(data))
            # Tried again after an answer that got lost, it finds no upload any more: what is there decides.
            lost = ended.tries > 1 and ended.status == 404
            if not lost and (ended.status != 200 or error_code(ended)):
                self._abort(target.store, path, upload)
                return (yield from self._not_written(worker, item, ended))
        except BaseException:
            self._abort(target.store, path, upload)
            raise
        target.granted += 1
        written = _ETAG.search(ended.body)
        etag = written[1].decode() if written else ""
        digests = b"".join(bytes.fromhex(part) for part in parts if is_md5(part))
        composite = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
        return (yield from self._proven(worker, item, etag, composite, content))

    def _upload_parts(self, worker: _Worker, item: Listed, upload: str) -> Steps[tuple[list[str], str]]:
        """The ETags of all parts, each of which is the MD5 of what was sent, and xxh3-64 of the whole."""
        _, size, etag = item
        part_bytes = max(self._part_bytes, -(-size // _MOST_PARTS))
        content = _xxh3()
        parts: list[str] = []
        for first in range(0, size, part_bytes):
            last = min(first + part_bytes, size) - 1
            number = len(parts) + 1
            query = f"partNumber={number}&{upload}"
            headers: Headers = (("range", f"bytes={first}-{last}"),)
            if etag:
                headers = (("if-match", f'"{etag}"'), *headers)
            so_far = content
            made: list[_Hash] = []

            def whole(so_far: _Hash = so_far, made: list[_Hash] = made) -> _Hash:
                made[:] = [so_far.copy()]  # a part that is sent again is hashed again
                return made[0]

            sent, sums = yield from self._relay(
                worker, item, headers, partial(_part, query), last + 1 - first, [hashlib.md5, whole]
            )
            if sent.status != 200:
                raise worker.target.refuse("PUT", sent)
            stored = sent.headers.get("etag", "").strip('"')
            if is_md5(stored) and stored != sums[0]:
                raise ObjectError(f"part {number} was not stored as it was sent")
            if not stored.isalnum():
                raise ObjectError(f"part {number} got an ETag that is none")
            parts.append(stored)
            content = made[0]
        return parts, content.hexdigest()

    def _abort(self, store: S3Store, path: str, upload: str) -> None:
        """Remove the parts of an upload of our own, as well as can be."""
        client = S3Client(store, _ABORT_LIMITS)
        with contextlib.suppress(Exception):
            drive(client.request("DELETE", path, upload), _ABORT_LIMITS)
        client.close()

    def _compare(self, worker: _Worker, item: Listed, *, in_memory: bool) -> Steps[Compared]:
        if in_memory and (delay_s := self._bandwidth.delay(item[1])):
            yield delay_s
        source = yield from _digest(worker.source, item)
        if source is None:
            return Compared(ObjectOutcome.VANISHED)
        target = yield from _digest(worker.target, item)
        if target is None:
            return Compared(ObjectOutcome.MISSING, source)
        return Compared(ObjectOutcome.SAME if source == target else ObjectOutcome.DIFFERENT, source)


def _digest(client: S3Client, item: Listed) -> Steps[str | None]:
    """xxh3-64 of one object; of one that is longer than listed, no more than that it differs."""
    try:
        hashed = yield from stream(client, item[0], _xxh3, item[1])
    except TooLongError:
        return f"longer than {item[1]} bytes"
    return None if hashed is None else hashed.hexdigest()


class _Loop:
    """Drives many exchanges from one thread (epoll, level-triggered)."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._epoll = select.epoll()
        self._known: dict[int, Connection] = {}

    def run(self, lanes: list[Steps[None]], worker: _Worker, stopped: Callable[[], bool]) -> None:
        """Until all lanes are at their end. An exception in one ends all."""
        waiting: dict[int, tuple[Steps[None], Connection]] = {}
        sleeping: list[tuple[float, int, Steps[None]]] = []
        order = count()
        now = next_sweep = monotonic()
        running = len(lanes)
        register, modify, poll, known = self._epoll.register, self._epoll.modify, self._epoll.poll, self._known

        def step(lane: Steps[None], problem: Exception | None = None) -> None:
            nonlocal running
            try:
                waits = lane.send(None) if problem is None else lane.throw(problem)
            except StopIteration:
                running -= 1
                return
            if isinstance(waits, Connection):
                fd = waits.fd
                if waits.mask != waits.wants:
                    (modify if waits.mask else register)(fd, waits.wants)
                    waits.mask = waits.wants
                    known[fd] = waits
                waits.since = now
                waiting[fd] = lane, waits
            else:
                heapq.heappush(sleeping, (now + waits, next(order), lane))

        try:
            for lane in lanes:
                step(lane)
            while running:
                for fd, _ in poll(min(0.5, max(0.0, sleeping[0][0] - now)) if sleeping else 0.5):
                    entry = waiting.pop(fd, None)
                    if entry is None:
                        self._hang_up(fd, worker)
                    else:
                        step(entry[0])
                now = monotonic()
                while sleeping and sleeping[0][0] <= now:
                    step(heapq.heappop(sleeping)[2])
                if now >= next_sweep:
                    next_sweep = now + 0.5
                    if stopped():
                        raise StoppedError
                    quiet = now - self._limits.idle_s
                    for fd, (lane, connection) in list(waiting.items()):
                        if connection.since < quiet or connection.deadline < now:
                            del waiting[fd]
                            step(lane, TimeoutError("no answer in time"))
        finally:
            for lane in lanes:
                lane.close()

    def _hang_up(self, fd: int, worker: _Worker) -> None:
        """Forget a connection that its server closed, or spoke on, while nobody waited for it."""
        self._epoll.unregister(fd)
        connection = self._known.pop(fd)
        connection.mask = 0
        for client in (worker.source, worker.target):
            if connection in client.idle:
                client.idle.remove(connection)
                connection.close()


def _xxh3() -> _Hash:
    from xxhash import xxh3_64

    return xxh3_64()


def _part(query: str, _: Head) -> tuple[str, Headers]:
    return query, ()


@lru_cache(maxsize=256)
def _kept_of(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in _KEPT or name.startswith("x-amz-meta-"))


def _kept(headers: dict[str, str]) -> Headers:
    """The metadata that goes along: what S3 keeps with an object, but for tags, ACL and storage class."""
    kept = tuple([(name, headers[name]) for name in _kept_of(tuple(headers))])
    if "aws-chunked" in headers.get("content-encoding", ""):  # how it was once sent, which S3 itself does not keep
        codings = [coding.strip() for coding in headers["content-encoding"].split(",")]
        rest = ", ".join(coding for coding in codings if coding != "aws-chunked")
        kept = tuple((name, rest if name == "content-encoding" else value) for name, value in kept)
        kept = tuple(item for item in kept if item[1])
    return kept


def _changed(headers: dict[str, str], etag: str) -> bool:
    """Whether the object is another one than was listed."""
    return bool(etag) and headers.get("etag", "").removeprefix("W/").strip('"') != etag


def _not_read(source: S3Client, response: Response) -> Exception:
    code = error_code(response)
    if response.status == 404 and code in {"NoSuchKey", "NoSuchVersion", ""}:
        return _EndedError(ObjectOutcome.VANISHED)
    if response.status in (412, 416):
        return _EndedError(ObjectOutcome.CHANGED)
    return source.refuse("GET", response)

"""One object's content, piece by piece."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.client import (
    ANSWER_LIMIT_BYTES,
    OBJECT_LIMIT_BYTES,
    PUT_LIMIT_BYTES,
    S3Client,
    Tries,
    await_resumed,
    error_code,
)
from include.juicefs_storage.adapters.s3.wire.connection import Connection
from include.juicefs_storage.adapters.s3.wire.limits import SLOWEST_BYTES_S, held_back
from include.juicefs_storage.adapters.s3.wire.message import HttpError, TooLongError

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.wire.limits import Steps
    from include.juicefs_storage.adapters.s3.wire.message import Head
    from include.juicefs_storage.objects.bucket import Sink, SomeSink

#: A system call that waits for a body returns after so long, to be asked whether to go on.
_BLOCK_S = 1.0


def stream(
    client: S3Client,
    key: str,
    make: Callable[[Mapping[str, str]], SomeSink],
    limit_bytes: int = OBJECT_LIMIT_BYTES,
) -> Steps[SomeSink | None]:
    """Read an object piece by piece; None where there is none.

    Args:
        client: Of the store.
        key: Relative to the store's prefix.
        make: Makes what takes the bytes, of the answer's headers; each try begins with a new one.
        limit_bytes: Of a longer object nothing is read.

    Raises:
        ObjectError, StoreDownError: It cannot be read.
        TooLongError: It is longer than `limit_bytes`.
        PermanentError: The keys, the bucket or the certificate are wrong.
    """
    tries = Tries(client)
    while True:
        connection = None
        retry_after = None
        try:
            connection = yield from client.connection()
            connection.start(client.limits, 0, tries.until)
            head = client.signer.head("GET", client.path(key))
            yield from connection.send([head], len(head))
            answer = yield from connection.receive_head("GET")
            if answer.status == 200:
                sink = yield from _received(client, connection, answer, make(answer.headers), limit_bytes, tries)
                client.release(connection)
                connection = None
                client.answers += 1
                client.granted += 1
                return sink
            refused = yield from connection.receive_body(answer, ANSWER_LIMIT_BYTES)
            if not client.again(refused):
                client.answers += 1
                if answer.status == 404 and error_code(refused) != "NoSuchBucket":
                    return None
                raise client.refuse("GET", refused)
            problem, retry_after = f"status {answer.status}", answer.headers.get("retry-after")
        except TooLongError:
            raise
        except (OSError, HttpError) as error:
            if connection is not None and connection.stale(error):
                continue
            problem = client.problem(error)
        finally:
            if connection is not None:
                connection.close()
        yield tries.delay("GET", problem, retry_after)
        yield from await_resumed(client.flow, tries)


def _received(
    client: S3Client, connection: Connection, answer: Head, sink: SomeSink, limit_bytes: int, tries: Tries
) -> Steps[SomeSink]:
    """Hand an object's body over as it comes in."""
    client.expect_s3("GET", answer.headers)
    if answer.length > limit_bytes:
        raise TooLongError(f"an object of {answer.length} bytes where at most {limit_bytes} were expected")
    # A body that does not say how long it is may have no end.
    if client.buffer is not None and answer.length >= 0 and type(connection) is Connection:
        yield from _received_in_large_pieces(client, client.buffer, connection, answer, sink, tries)
        return sink
    left = limit_bytes if answer.length >= 0 else min(limit_bytes, PUT_LIMIT_BYTES)
    while parts := (yield from connection.receive()):
        for part in parts:
            sink.update(part)
        moved = sum(map(len, parts))
        left -= moved
        if left < 0:
            raise TooLongError(f"an object of more than {limit_bytes} bytes")
        # Time for what is still to come: whatever moves fast enough is never cut off.
        connection.deadline += moved / SLOWEST_BYTES_S
        tries.until += moved / SLOWEST_BYTES_S
        if client.flow is not None and client.flow.bandwidth.bytes_s:
            yield from held_back(client.flow, moved, connection)
    return sink


def _received_in_large_pieces(
    client: S3Client, buffer: memoryview, connection: Connection, answer: Head, sink: Sink, tries: Tries
) -> Steps[None]:
    """Hand a body over as it comes in, while system calls wait: a quarter of the calls, and no poll between two."""
    rest = connection.take_rest()
    left = answer.length - len(rest)
    if left < 0:
        raise HttpError("bytes behind the end of an answer")
    sink.update(rest)
    connection.block(_BLOCK_S)
    try:
        while left:
            most = client.flow.bandwidth.step_bytes if client.flow is not None else left
            moved = connection.receive_into(buffer[: min(left, most)])
            if moved is None:
                yield connection
                continue
            if not moved:
                raise HttpError("closed in the middle of a body")
            sink.update(buffer[:moved])
            left -= moved
            if time.monotonic() > connection.deadline:  # a sender that drips never lets the system call time out
                raise TimeoutError
            connection.deadline += moved / SLOWEST_BYTES_S
            tries.until += moved / SLOWEST_BYTES_S
            if client.flow is not None and client.flow.bandwidth.bytes_s:
                yield from held_back(client.flow, moved, connection)
    finally:
        connection.block(None)

"""What the threads of an engine share, and what each of them owns."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from dataclasses import dataclass
from time import monotonic
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.client import S3Client

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.engine.concurrency import Concurrency
    from include.juicefs_storage.adapters.s3.store import S3Store
    from include.juicefs_storage.adapters.s3.wire.limits import Limits
    from include.juicefs_storage.objects.flow import Flow

PIPE_BYTES = 2**20
#: More at once leaves the cache before it is hashed.
_BUFFER_BYTES = 2**18
_F_SETPIPE_SZ = 1031  # linux/fcntl.h


@dataclass
class Shared:
    """What all threads of an engine share: its limits, and what it learned of the target from the first answers.

    Attributes:
        limits: Of each request.
        flow: Counts, limits and pauses what moves.
        stop: Set where one thread failed: the others end.
        part_bytes: Of a multipart upload.
        create_only: The target takes the condition that an object must not exist yet.
        foreign_target: The target's ETags are not the MD5 of what was sent.
        server_copy: Both sides are one store, and it copies objects itself.
        copy_damaged: Copy an object all the same whose content does not match the checksum that JuiceFS left with it.
        wants_md5: The target takes no PUT without Content-MD5, as a bucket with an object lock does.
    """

    limits: Limits
    flow: Flow
    stop: threading.Event
    part_bytes: int
    server_copy: bool
    create_only: bool = True
    foreign_target: bool = False
    copy_damaged: bool = False
    wants_md5: bool = False


class Worker:
    """What one thread owns: a client for each side, and a pipe.

    Args:
        shared: What all threads share.
        source: Read only.
        target: Written.
        concurrency: Is told of each failed try.
    """

    def __init__(self, shared: Shared, source: S3Store, target: S3Store, concurrency: Concurrency) -> None:
        self.shared = shared
        self.source = S3Client(source, shared.limits, shared.flow)
        self.target = S3Client(target, shared.limits, shared.flow)
        for client in (self.source, self.target):
            client.on_failure = lambda wait_s: concurrency.refused(monotonic(), wait_s)
        #: Of the large object that this thread moves.
        self.moving = shared.flow.moving()
        self._pipe: tuple[int, int] | None = None

    def may_block(self) -> Worker:
        """Let system calls wait: the thread has nothing else to do meanwhile."""
        self.source.buffer = self.target.buffer = memoryview(bytearray(_BUFFER_BYTES))
        return self

    def pipe(self) -> tuple[int, int]:
        """Return the empty pipe through which bytes pass from socket to socket."""
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # a smaller one is slower, no more
                fcntl.fcntl(self._pipe[1], _F_SETPIPE_SZ, PIPE_BYTES)
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

"""An exchange with a server as a generator, and how to drive it.

An exchange yields what it waits for: a connection or a number of seconds. Its driver decides how to wait.
`drive` blocks the calling thread; the engine's loop serves many exchanges from one thread.
"""

from __future__ import annotations

import select
import time
from typing import TYPE_CHECKING, TypeVar

from include.juicefs_storage.adapters.s3.wire.connection import Connection

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from include.juicefs_storage.adapters.s3.wire.limits import Limits, Steps

T = TypeVar("T")


class StoppedError(BaseException):
    """The driver cancels the exchange."""


def drive(steps: Steps[T], limits: Limits, stopped: Callable[[], bool] = lambda: False) -> T:
    """Run an exchange in the calling thread, which sleeps where it waits.

    A connection that stays silent for `idle_s`, or passes its deadline, gets a TimeoutError.

    Args:
        steps: The exchange.
        limits: How long it may wait.
        stopped: Whether to give up.

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

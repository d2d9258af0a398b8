"""What an exchange yields, how long it may last, and how it is held back."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.wire.connection import Connection
    from include.juicefs_storage.objects.flow import Flow

T = TypeVar("T")
#: What an exchange yields: a connection whose `wants` it waits for, or seconds to sleep.
Steps: TypeAlias = "Generator[Connection | float, None, T]"
#: The slowest transfer that is accepted: an exchange may last `2 * idle_s` plus its bytes at this rate.
SLOWEST_BYTES_S = 65536


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an exchange may last and how often it is tried.

    Attributes:
        connect_s: To open a connection, TLS included.
        idle_s: Without a byte moving.
        tries: Of one request, the first included.
        first_delay_s: Before the second try; doubled each time, with jitter.
        max_delay_s: Between two tries, also where the store asks for more by Retry-After.
        total_s: From the first try to the end of the last, beside the time that the bytes take at SLOWEST_BYTES_S.
    """

    connect_s: float = 10
    idle_s: float = 30
    tries: int = 8
    first_delay_s: float = 0.1
    max_delay_s: float = 20
    total_s: float = 300


def held_back(flow: Flow, size: int, *connections: Connection) -> Steps[None]:
    """Wait until so many bytes may move. The connections get the time that this takes.

    Args:
        flow: Its bandwidth is kept.
        size: In bytes.
        connections: Those that wait with it.
    """
    if flow.bandwidth.bytes_s is None:
        return
    place = flow.bandwidth.reserve(size)
    while wait_s := flow.bandwidth.wait_s(place):
        for connection in connections:
            connection.deadline += wait_s
        yield wait_s

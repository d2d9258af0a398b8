"""Wait until no client uploads: the less is under way at the cut-over, the less goes to the old store after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.records import Record
from include.juicefs_storage.volume.mount_pods import VolumePods

_POLL_S = 1.0
#: Between two blocks of a large file a client uploads nothing for a moment.
_LOOKS_ON_END = 2


class Quiet(Record):
    """Whether the clients became quiet.

    Attributes:
        quiet: No client had an upload under way or a staged block, in two looks on end.
        waited_s: How long that took, or was waited for, in seconds.
        busy: What the last look found instead: mount pod -> what it uploads. Who could not be asked is under its error.
    """

    quiet: bool
    waited_s: float
    busy: Mapping[str, str] = {}


def wait_for_quiet(
    pods: VolumePods, *, timeout_s: float, clock: Callable[[], float], sleep: Callable[[float], None]
) -> Quiet:
    """Wait until no client of the volume uploads, for so long at most. Whoever calls goes ahead in either case.

    Args:
        pods: The volume's mount pods, as they are at each look.
        timeout_s: How long to wait, in seconds.
        clock: A monotonic clock.
        sleep: Waits the given seconds.
    """
    started, quiet_looks = clock(), 0
    while True:
        busy = _busy(pods)
        quiet_looks = 0 if busy else quiet_looks + 1
        waited_s = round(clock() - started, 1)
        if quiet_looks == _LOOKS_ON_END or waited_s >= timeout_s:
            return Quiet(quiet=quiet_looks == _LOOKS_ON_END, waited_s=waited_s, busy=busy)
        sleep(_POLL_S)


def _busy(pods: VolumePods) -> dict[str, str]:
    try:
        mounts = pods.mounts()
    except StorageSwitchError as error:
        return {"unknown": error.problem}
    return {mount.name: mount.load for mount in mounts if mount.uploading or mount.staged_blocks}

"""The fence on the clients' writes to the old store, during a run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.switch.write_fence import FenceWatch
from include.juicefs_storage.tasks.context import log, pull, push
from include.juicefs_storage.tasks.switch.run import SwitchRun

_FENCED_AT = "fenced_at"


def put_up(run: SwitchRun) -> bool:
    """Have the old store refuse the clients' writes from now on; False where that is not wanted.

    Call it only while a follower is at work: nobody else takes the fence down in time.
    """
    if not run.write_fence:
        return False
    run.confirm_lease()
    push(_FENCED_AT, datetime.now(UTC).isoformat())
    run.write_fence.up()
    return True


def watch(run: SwitchRun) -> Callable[[], None]:
    """Make the call that takes the fence down in time, while clients that have not moved still try to write.

    Calling it raises NeedsHumanError where they have not moved in time, or where that cannot be seen.
    """
    if not (fence := run.write_fence):
        return lambda: None

    def behind() -> list[str]:
        # Another volume's pod that does not answer would be waited for, longer than the fence may stay up.
        mounts = run.runtime.volume_pods(run.before).mounts({mount.uid for mount in run.carried_out.mount_pods})
        return [mount.name for mount in mounts if mount.bucket != run.new.config.bucket]

    watched = FenceWatch(fence, behind)

    def check() -> None:
        if at := pull("write_setting", _FENCED_AT):
            watched.check((datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds())

    return check


def take_down(run: SwitchRun) -> None:
    """Let the clients write to the old store again; a fence that cannot be reached stops nothing."""
    try:
        if run.write_fence:
            run.write_fence.down()
    except StorageSwitchError as error:
        log.warning("The write fence on the old store may still be up: %s", error.problem)

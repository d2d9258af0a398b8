"""Whether the old store is idle: nothing new has come to it for some time, by its own dates."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import islice

from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.switch.findings import Finding, ok, warning
from include.juicefs_storage.volume.setting import Setting

CHECK = "old store"
_EXAMPLES = 5


def check_idle(left: Bucket, setting: Setting, moved_at: datetime, idle_s: int) -> Finding:
    """Look for blocks on the store that a volume has left which are newer than some time ago.

    Args:
        left: The store.
        setting: The volume's setting.
        moved_at: When the run that moved the volume had ended (UTC).
        idle_s: For how long nothing may have come, in seconds.

    Raises:
        StorageSwitchError: The store cannot be listed.
    """
    now = left.now()
    since = now - timedelta(seconds=idle_s)
    if moved_at > since:
        waits = (moved_at + timedelta(seconds=idle_s)).strftime("%Y-%m-%d %H:%M")
        message = f"The volume left {left.name} at {moved_at:%Y-%m-%d %H:%M} UTC, not yet {idle_s} s ago."
        return warning(CHECK, message, f"run this again after {waits} UTC, or give a smaller idle_s")
    if newer := list(islice(left.newer(f"{setting.name}/chunks/", since), _EXAMPLES)):
        named = ", ".join(item.key for item in newer)
        return warning(
            CHECK,
            f"Blocks came to {left.name} in the last {idle_s} s, such as {named}: somebody still writes there.",
            "copy them (juicefs_storage_sync), find the writer, then wait once more",
        )
    return ok(CHECK, f"no block on {left.name} is newer than {since:%Y-%m-%d %H:%M:%S} UTC by its dates")

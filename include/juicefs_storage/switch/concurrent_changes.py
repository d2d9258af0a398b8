"""What others change in the setting while `juicefs config` runs.

`juicefs config` reads the whole setting, tests the store and writes the whole setting back, without comparing (Init in
pkg/meta/sql.go of JuiceFS 1.4). A change that another administrator makes in between is lost with no error.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.volume.setting import Setting

_POLL_S = 0.1
#: How long the last poll may take to end, in seconds.
_END_S = 5.0

log = logging.getLogger(__name__)


@contextmanager
def watch_setting(read: Callable[[], Setting], first: Setting) -> Iterator[list[Setting]]:
    """Poll the setting from a thread of its own until the block ends. A change shorter than a poll is missed.

    Args:
        read: Reads the setting. An error is ignored, and ends the watch.
        first: The setting as it was before.

    Yields:
        The different settings that were seen, oldest first; it grows.
    """
    seen, done = [first], threading.Event()

    def poll() -> None:
        while not done.is_set():
            try:
                now = read()
            except StorageSwitchError as error:
                log.warning("Changes by others are no longer watched for: %s", error.problem)
                return
            if now != seen[-1]:
                seen.append(now)
            done.wait(_POLL_S)

    thread = threading.Thread(target=poll, name="setting", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join(_END_S)


def lost_fields(earlier: Sequence[Setting], now: Setting) -> tuple[str, ...]:
    """Return the fields, storage aside, that another administrator changed and our write took back to an older value.

    Args:
        earlier: What was seen before our write, oldest first; at least one.
        now: The setting since. A field that has a new value there was changed once more, and is not lost.
    """
    versions = [setting.other_fields for setting in earlier]
    latest, found = versions[-1], now.other_fields
    return tuple(
        name
        for name in sorted(set[str]().union(*versions))
        if found.get(name) != latest.get(name) and found.get(name) in [version.get(name) for version in versions]
    )

"""Whether the way back to the old store is open: what a restart of a pod, or a value that somebody kept, would do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.volume.carriers import Carrier, name_some, restarts_that_write
from include.juicefs_storage.volume.setting import StorageConfig

CHECK, OLD_KEY = "door", "old key"
#: Tries a storage with its keys; what does not work, empty where all does, None where it cannot be tried.
Try = Callable[[StorageConfig], str | None]
_CURE = (
    "after the switch run juicefs_storage_finish, which replaces these pods without a pause; or withdraw the old key "
    "on the old store at once; or give `fence_conn_id`, which refuses what such a pod writes"
)


def check_door(
    carriers: Sequence[Carrier],
    old: StorageConfig,
    try_storage: Try,
    *,
    fenced: bool = False,
    required: bool = False,
) -> list[Finding]:
    """Check what the pods from before the switch would do after it.

    Args:
        carriers: What will carry other values, see `find_carriers`.
        old: The storage that the volume leaves.
        try_storage: Opens a storage with its keys, from where the clients are.
        fenced: The old store refuses the old key's writes, for as long as a mount pod carries its values.
        required: An open way back is refused, not warned of.
    """
    if not carriers:
        return [ok(CHECK, "nothing carries the values of the old store")]
    if fenced:
        return [ok(CHECK, f"the old store refuses what {name_some(carriers)} would bring back")]
    found = refusal if required else warning
    writing = restarts_that_write(carriers)
    # Hundreds of pods may have the same values.
    taken = {config for config in {carrier.writes for carrier in writing} if _takes(try_storage, config)}
    open_for = [carrier for carrier in writing if carrier.writes in taken]
    if open_for:
        message = (
            f"Restarted, {counted(len(open_for), 'pod')} made with the old values would write {old.bucket} back into "
            f"the setting within seconds: {name_some(open_for)}. That store takes the keys that they would have, or "
            "could not be asked. All clients would follow, and what is on the new store alone would be EIO."
        )
        return [found(CHECK, message, _CURE)]
    if _takes(try_storage, old):
        message = (
            f"The old store takes the old key, or could not be asked. A restart of {name_some(carriers)} writes "
            "nothing back, since the Secret's new secret key does not fit there; but who has kept the old values "
            "whole can, such as a Secret that somebody restores."
        )
        return [found(CHECK, message, "withdraw the old key when the run is green; see docs/finish.md")]
    return [ok(CHECK, f"the old store takes neither the old key nor what {name_some(carriers)} would write")]


def check_old_key(old: StorageConfig, try_storage: Try, *, closed: bool = False) -> Finding:
    """Check that the store that a volume has left takes its old key no more.

    Args:
        old: The storage that the volume has left.
        try_storage: See `check_door`.
        closed: The store was seen to refuse that key's writes.
    """
    if closed:
        return ok(OLD_KEY, f"the store behind {old.bucket} refuses its writes")
    if _takes(try_storage, old):
        return warning(
            OLD_KEY,
            f"The store behind {old.bucket} takes the key that the volume had there, or could not be asked.",
            "withdraw that key there: who has kept it can still write the old values back, or blocks to that store",
        )
    return ok(OLD_KEY, f"the store behind {old.bucket} does not take it any more")


def _takes(try_storage: Try, config: StorageConfig | None) -> bool:
    """Return whether a store takes a storage's keys; one that cannot be asked is taken to do so."""
    if config is None:
        return False
    try:
        return not try_storage(config)
    except StorageSwitchError:
        return True

"""What lies in the folder of backups."""

from __future__ import annotations

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.ports import Vault
from include.juicefs_storage.switch.findings import Finding, warning

_NAMED = 5


def check_readable(vault: Vault, volume: str) -> list[Finding]:
    """Name the files of volumes of this name that cannot be read. They stop no run, and cannot be gone back to.

    Args:
        vault: The folder.
        volume: The volume's name.
    """
    unreadable = []
    for name in vault.ids():
        if name.startswith(f"{volume}."):
            try:
                vault.load(name)
            except StorageSwitchError:
                unreadable.append(name)
    if not unreadable:
        return []
    named = ", ".join(unreadable[-_NAMED:])
    more = f" and {len(unreadable) - _NAMED} more" if len(unreadable) > _NAMED else ""
    return [
        warning(
            "vault",
            f"{len(unreadable)} of the files of {volume} in the folder of backups cannot be read: {named}{more}.",
            "add the key that was current then to `old_keys` of connection juicefs_backup (docs/backups.md), or move "
            "them away",
        )
    ]

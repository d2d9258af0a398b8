"""Prove that a new mount with an empty cache works."""

from __future__ import annotations

from collections.abc import Sequence

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import JuiceFS
from include.juicefs_storage.volume.setting import Setting, StorageConfig


def prove_status(juicefs: JuiceFS, setting: Setting, config: StorageConfig) -> None:
    """Prove that `juicefs status` names this volume on this storage.

    Args:
        juicefs: Runs the command.
        setting: The volume's setting.
        config: The storage.

    Raises:
        TransientError: It names something else.
    """
    form = juicefs.status().get("Setting") or {}
    if form.get("UUID") != setting.uuid or form.get("Bucket") != config.bucket:
        raise TransientError(
            f"`juicefs status` shows bucket {form.get('Bucket')!r}, expected {config.bucket!r}.",
            next_step="the task tries again; if that does not help, another process writes the setting",
        )


def use_fresh_mount(
    juicefs: JuiceFS, store: Bucket, config: StorageConfig, canary: str, lost_files: Sequence[str] = ()
) -> int:
    """Read and write through a new mount with an empty cache; what it writes must land on the storage.

    Args:
        juicefs: Makes the mount.
        store: Where the written objects are looked for.
        config: The storage, for messages.
        canary: The name of the file that is written.
        lost_files: Files that are not read: their blocks were lost before the run.

    Returns:
        The number of objects found on the storage.

    Raises:
        TransientError: An object that was written is not there.
    """
    try:
        keys = juicefs.mount_fresh(canary, lost_files)
        if missing := [key for key in keys if not store.exists(key)]:
            raise TransientError(
                f"A fresh mount wrote {missing[0]}, which is not in {config.bucket}.", next_step="the task tries again"
            )
        return len(keys)
    finally:
        juicefs.unmount_fresh(canary)

"""Whether the setting is still what the last run made it: something that was left behind may have written it back."""

from __future__ import annotations

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.ports import Vault
from include.juicefs_storage.switch.backup import Backup, read_backup
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.switch.marks import Mark, moved_by, read_mark
from include.juicefs_storage.volume.setting import Setting

CHECK = "setting"


def last_move(vault: Vault, setting: Setting) -> tuple[Mark, str] | None:
    """Find the last run that is marked as having moved a volume; None where there is none. See `moves`."""
    return next(iter(moves(vault, setting)), None)


def moves(vault: Vault, setting: Setting) -> list[tuple[Mark, str]]:
    """List the runs that are marked as having moved a volume, with the ids of their backups, the latest first.

    A mark that cannot be read is passed over: it may be another volume's of the same name.

    Args:
        vault: The folder of backups.
        setting: The volume's setting.

    Raises:
        StorageSwitchError: The folder cannot be listed.
    """
    found = []
    for backup_id in moved_by(vault, setting.name):
        try:
            mark = read_mark(vault, backup_id, "switched")
        except StorageSwitchError:
            continue
        if mark and mark.uuid == setting.uuid:
            found.append((mark.at, backup_id, mark))
    return [(mark, backup_id) for _, backup_id, mark in sorted(found, key=lambda row: row[:2], reverse=True)]


def check_setting(vault: Vault, setting: Setting) -> list[Finding]:
    """Compare the setting with what the last run left, by bucket and access key.

    Args:
        vault: The folder of backups, where runs are marked.
        setting: The setting as it is now.
    """
    try:
        found = last_move(vault, setting)
        if found is None:
            return [ok(CHECK, "no run has moved this volume")]
        mark, backup_id = found
        backup = read_backup(vault, backup_id)
        left = backup.new
    except StorageSwitchError as error:
        return [warning(CHECK, f"Where the last run left the setting is not known: {error.problem}", error.next_step)]
    if setting.config.place == left.place and setting.config.access_key == left.access_key:
        return [ok(CHECK, f"as {backup_id} left it on {mark.at:%Y-%m-%d %H:%M} UTC")]
    return [
        refusal(
            CHECK,
            f"The setting moved since the last switch{_back_to(backup, setting)}: it names {setting.bucket} now. "
            f"{backup_id} had left it at {left.bucket} on {mark.at:%Y-%m-%d %H:%M} UTC. What was written since then "
            "and is on that store alone cannot be read.",
            "look for a mount pod that restarted, or a Secret that was restored, with the old values; then run "
            "juicefs_storage_switch to where the volume belongs. Where it was moved on purpose, move "
            f"{backup_id}.switched out of the folder of backups",
        )
    ]


def _back_to(backup: Backup, setting: Setting) -> str:
    """Say whether it is where it was before that run."""
    before = backup.setting
    same = before.config.place == setting.config.place and before.config.access_key == setting.config.access_key
    return f", back to {before.bucket}" if same else ""

"""What the tasks of a run share."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.finish.door import Door
from include.juicefs_storage.finish.params import FinishParams
from include.juicefs_storage.finish.plan import FinishPlan
from include.juicefs_storage.finish.refresh import Refresh
from include.juicefs_storage.finish.watch import Watch
from include.juicefs_storage.ports import WriteFence
from include.juicefs_storage.switch.backup import Backup, read_backup
from include.juicefs_storage.switch.checks import check_door, check_old_key, ok
from include.juicefs_storage.switch.findings import Finding, warning
from include.juicefs_storage.switch.lease import VolumeLeases
from include.juicefs_storage.switch.marks import Mark
from include.juicefs_storage.switch.moved_back import check_setting, moves
from include.juicefs_storage.tasks.context import log, pull, run_id, validated_params
from include.juicefs_storage.tasks.runtime import VolumeRuntime
from include.juicefs_storage.tasks.switch.run import volume_leases
from include.juicefs_storage.volume.canary import canary_name
from include.juicefs_storage.volume.carriers import Carrier, find_carriers
from include.juicefs_storage.volume.setting import Setting


class FinishRun:
    """What the tasks of a run share."""

    def __init__(self) -> None:
        self.params = FinishParams.model_validate(validated_params())
        self.runtime = VolumeRuntime(self.params)

    def lease(self, setting: Setting) -> VolumeLeases:
        """Return the volume's Leases, as this run sees them."""
        return volume_leases(self.runtime, setting.uuid, needs_all=True)

    def planned_setting(self) -> Setting:
        """Read the setting, which must be as it was planned and as the last run left it.

        Raises:
            NeedsHumanError: It is not.
        """
        setting, planned = self.runtime.setting(), FinishPlan.model_validate(pull("plan"))
        if (setting.uuid, setting.bucket) != (planned.uuid, planned.bucket):
            problem = f"The setting names {setting.bucket}, the plan was made for {planned.bucket}."
        else:
            moved = [row.message for row in check_setting(self.runtime.vault, setting) if row.level == "refusal"]
            problem = " ".join(moved)
        if problem:
            raise NeedsHumanError(
                problem,
                state="this task changed nothing",
                next_step="trigger the DAG again, and look at its finding `setting`",
            )
        return setting

    @property
    def last_move(self) -> tuple[Mark, Backup]:
        """The last run that moved the volume, which must be known.

        Raises:
            PermanentError: It is not.
        """
        if self.moved is None:
            raise PermanentError(
                "No run has moved this volume, or its backup cannot be read: there is no move to finish.",
                next_step="see the log; put the key of the backups back (docs/backups.md)",
            )
        return self.moved

    def watch(self, setting: Setting, backup: Backup) -> Watch:
        """Return what looks at the store that the volume has left, and at its clients.

        Args:
            setting: The volume's.
            backup: Of the run that moved the volume.
        """
        from include.juicefs_storage.adapters.s3.engine import NativeEngine

        left = self.runtime.store_of(self.runtime.source(backup.setting), self.params.old_conn_id)
        target = self.runtime.store_of(self.runtime.source(setting), self.params.store_conn_id)
        # As the clients write them. A damaged block is as it was: nothing more is lost by copying it.
        to_store = replace(target.store, storage_class=setting.storage_class)
        return Watch(
            self.runtime.metadata,
            self.runtime.volume_pods(setting),
            setting,
            left if two_stores(backup) else None,
            target,
            NativeEngine(left.store, to_store, copy_damaged=True),
            self.lease(setting).refuse_if_held,
            lambda: datetime.now(UTC),
            time.sleep,
        )

    def refresh(self, setting: Setting) -> Refresh:
        """Return the step that replaces a mount pod."""
        config = self.runtime.source(setting)
        return Refresh(
            self.runtime.volume_pods(setting),
            config,
            self.runtime.store_of(config, self.params.store_conn_id),
            canary_name(run_id()),
            time.monotonic,
            time.sleep,
            self.lease(setting).confirm,
        )

    @cached_property
    def moved(self) -> tuple[Mark, Backup] | None:
        """The last run that moved the volume from one store to another: how it is marked, and its backup.

        Where none did, the last one that changed its keys or its address; None where no run is known.
        """
        found: tuple[Mark, Backup] | None = None
        try:
            vault = self.runtime.vault
            for mark, backup_id in moves(vault, self.runtime.setting()):
                here = mark, read_backup(vault, backup_id)
                if two_stores(here[1]):
                    return here
                found = found or here
        except StorageSwitchError as error:
            log.warning("Which store the volume has left is not known: %s", error.problem)
        return found

    def door(self, setting: Setting, backup: Backup) -> Door:
        """Return what closes the store that the volume has left, and asks it with the old key.

        Args:
            setting: The volume's.
            backup: Of the run that moved the volume.
        """
        left, own = self.runtime.source(backup.setting), self.runtime.source(setting)
        key = f"{setting.name}/{canary_name(run_id())}-door"
        return Door(self.runtime.store_of(left), self.runtime.store_of(own), key, time.monotonic, time.sleep)

    def fence(self, backup: Backup, off_until: datetime | None = None) -> WriteFence | None:
        """Return what refuses the old key on the store that the volume has left; None where nobody administers it.

        Args:
            backup: Of the run that moved the volume.
            off_until: Refuse the reads as well, until then (UTC).
        """
        conn_id = self.params.fence_conn_id
        return self.runtime.fence_on(backup.setting, conn_id, off_until) if conn_id else None

    def look(self, setting: Setting, *, ask_door: bool = False) -> tuple[list[Carrier], list[Finding]]:
        """Find what carries other values than the setting, and what that means.

        Args:
            setting: The volume's.
            ask_door: Ask whether the old store refuses the old key's writes, where `close_door` is on.
        """
        pods, now = self.runtime.volume_pods(setting), self.runtime.source(setting)
        left = self.runtime.source(self.moved[1].setting) if self.moved else None
        carriers = find_carriers(pods, self.params.secret_name, now, left=[left.bucket] if left else [])
        if left is None:
            unknown = "no backup says which store the volume has left"
            found = (
                ok("door", "nothing carries other values") if not carriers else warning("door", unknown, "ask there")
            )
            return carriers, [found]
        try_storage = self.runtime.try_storage
        closed = ask_door and self.params.close_door and self.door(setting, self.last_move[1]).is_closed()
        door = check_door(carriers, left, try_storage, fenced=closed)
        return carriers, [*door, check_old_key(left, try_storage, closed=closed)]


def two_stores(backup: Backup) -> bool:
    """Return whether a run moved its volume from one store to another, so that the old one can be looked at."""
    return backup.plan is None or backup.plan.change.copies

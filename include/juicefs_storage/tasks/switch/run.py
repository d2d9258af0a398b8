"""The run that is running: its plan, its backup, its two locations and its hold on the volume."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

from airflow.sdk import get_current_context

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.ports import WriteFence
from include.juicefs_storage.switch.backup import Backup
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.lease import VolumeLease, VolumeLeases, lease_name
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.plan import Plan
from include.juicefs_storage.switch.restart_csi import RestartCsi
from include.juicefs_storage.switch.run_record import RunRecord, backup_of_run
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.tasks.context import mask_keys, pull, run_id, triggered_at
from include.juicefs_storage.tasks.runtime import Runtime, VolumeRuntime, open_vault
from include.juicefs_storage.volume.canary import canary_name
from include.juicefs_storage.volume.clusters import FIRST, Clusters
from include.juicefs_storage.volume.secret import written_by_format
from include.juicefs_storage.volume.setting import Setting

#: How long to wait for a `juicefs config` whose caller was killed, in seconds. It ends by itself within 85 s.
CONFIG_TIMEOUT_S = 120

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.engine import NativeEngine
    from include.juicefs_storage.objects.flow import Flow


def volume_leases(runtime: VolumeRuntime, uuid: str, *, needs_all: bool) -> VolumeLeases:
    """Return the Leases of a volume, for the run that is running: `<dag id>/<run id>`.

    Args:
        runtime: Its clusters hold one each.
        uuid: Of the volume.
        needs_all: Whether a cluster that does not answer stops the run.
    """
    holder = f"{get_current_context()['dag'].dag_id}/{run_id()}"
    leases = {
        name: VolumeLease(cluster, lease_name(uuid), holder, now=lambda: datetime.now(UTC), cluster=name)
        for name, cluster in {FIRST: runtime.cluster, **runtime.clusters.more}.items()
    }
    return VolumeLeases(leases, needs_all=needs_all)


class SwitchRun:
    """What the tasks of a run share. `old` is where the volume was, `new` where it goes.

    `admission` makes one for a task that changes something.

    Args:
        runtime: The run's adapters.
        forward: On the way to the new location; a rollback that has begun stops such a run before its next write.
    """

    def __init__(self, runtime: Runtime, *, forward: bool = False) -> None:
        self.runtime = runtime
        self.forward = forward

    @classmethod
    def recorded(cls) -> SwitchRun | None:
        """Find the run that is running; None where it ended before its backup was made, so before it changed anything.

        Its backup knows it even where the XComs of its plan and its params have gone, as after a clear.

        Raises:
            StorageSwitchError: There is a backup and it cannot be read.
        """
        if pull("resolve_params") and pull("plan"):
            run = cls.current()
            return run if run.record.find() else None
        backup = backup_of_run(open_vault(), run_id(), triggered_at())
        if backup is None or backup.plan is None:
            return None
        run = cls(Runtime.of_params(pull("resolve_params") or backup.params))
        run.plan = backup.plan
        return run

    @classmethod
    def current(cls, *, forward: bool = False) -> SwitchRun:
        """Return the run of the task that is running."""
        return cls(Runtime.of_run(), forward=forward)

    @cached_property
    def plan(self) -> Plan:
        """What was planned, and approved where approval is required."""
        planned = pull("plan")
        if not planned:
            raise PermanentError("This run has no plan.", next_step="clear plan with Downstream")
        return Plan.model_validate(planned)

    @cached_property
    def record(self) -> RunRecord:
        """What this run keeps in the folder of backups."""
        vault = self.runtime.vault
        return RunRecord(vault, vault.keys, self.plan, run_id(), triggered_at())

    @property
    def backup_id(self) -> str:
        """The id of this run's backup, whether it is written yet or not."""
        return self.record.backup_id

    @cached_property
    def backup(self) -> Backup:
        """The backup of this run, read back from the vault."""
        return self.record.backup()

    @property
    def carried_out(self) -> Plan:
        """The plan that is carried out. One that was made since would not know the pods that were there before."""
        return self.backup.plan or self.plan

    @cached_property
    def change(self) -> Change:
        """How the storage changes, as it was found out for the plan that is carried out."""
        return self.carried_out.change

    @property
    def catches_up(self) -> bool:
        """Whether blocks are copied from the old store to the new one."""
        return self.runtime.params.catch_up and self.change.copies

    @property
    def lost_before(self) -> frozenset[str]:
        """The blocks that were lost before this run, which a person accepted: not lost by the move."""
        return frozenset(self.carried_out.lost_blocks)

    @property
    def before(self) -> Setting:
        """The setting as it was backed up."""
        return self.backup.setting

    @cached_property
    def old(self) -> Location:
        """The location in the backup."""
        config = self.runtime.source(self.before)
        # Where only the keys change, the old one may be revoked: looks are taken with the new one, as long as it works.
        by_new_keys = self.change.kind == "keys" and self._new_keys_work()
        return Location(config, self.runtime.target_store if by_new_keys else self.runtime.source_store(config))

    def _new_keys_work(self) -> bool:
        """Whether the store knows the new keys; one that does not answer is asked again by whoever needs it."""
        try:
            return self.runtime.target_store.knows_keys()
        except StorageSwitchError:
            return True

    @cached_property
    def new(self) -> Location:
        """The location that was planned and approved, as the backup recorded it."""
        config = self.backup.new
        mask_keys(config)
        return Location(config, self.runtime.target_store)

    def engine(
        self, source: Location, target: Location, flow: Flow | None = None, *, fail_fast: bool = False
    ) -> NativeEngine:
        """Make the copying engine between the two locations.

        Args:
            source: Only read.
            target: Written to.
            flow: Counts what is copied; None: nobody asks.
            fail_fast: Give up on a store within seconds, for a caller that tries again.
        """
        from include.juicefs_storage.adapters.s3.engine import NativeEngine
        from include.juicefs_storage.adapters.s3.wire.limits import Limits

        from_store, to_store = (
            (self.runtime.source_store(location.config) if location is self.old else self.runtime.target_store).store
            for location in (source, target)
        )
        limits = Limits(connect_s=5, idle_s=10, tries=3, max_delay_s=1, total_s=60) if fail_fast else Limits()
        # As the clients write them. A block that was damaged before is as it was: nothing more is lost by the move.
        to_store = replace(to_store, storage_class=self.before.storage_class)
        return NativeEngine(from_store, to_store, flow=flow, limits=limits, copy_damaged=True)

    @cached_property
    def lease(self) -> VolumeLeases:
        """The volume's Leases. On the way back no other cluster than the first is needed."""
        return volume_leases(self.runtime, self.plan.uuid, needs_all=self.forward)

    def confirm_lease(self) -> None:
        """Confirm right before a write that this run may still make it.

        Raises:
            NeedsHumanError: The run does not hold the Lease, or is forward and its rollback has begun.
        """
        self.lease.confirm()
        if self.forward:
            self.refuse_after_rollback()

    def refuse_after_rollback(self) -> None:
        """Refuse a step forward where the run has been rolled back, or its rollback has begun.

        Raises:
            NeedsHumanError: It has.
        """
        if since := self.record.ended("rolled-back"):
            raise NeedsHumanError(
                f"This run is being, or was, rolled back since {since}: its steps forward do not run again.",
                state="this task changed nothing",
                next_step="clear failed tasks of the rollback, if any; to switch, start a new run",
            )

    @property
    def write_setting(self) -> WriteSetting:
        """The step that writes the setting: to the new location with `apply`, to the old one with `undo`."""
        recorded = self.runtime.recorded
        return WriteSetting(
            self.runtime.metadata,
            self.runtime.juicefs,
            self.before,
            self.new.config,
            confirm_lease=self.confirm_lease,
            recorded=recorded.setting if recorded else None,
            stale=[
                stale
                for secrets in self.backup.storage_values.values()
                for values in secrets.values()
                if (stale := written_by_format(values))
            ],
        )

    @property
    def patch_secret(self) -> PatchSecrets:
        """The step that puts the new location's values into the Secrets."""
        recorded = self.runtime.recorded
        return PatchSecrets(
            self.runtime.clusters,
            self.runtime.params.secret_name,
            self.before.name,
            self.new.config,
            exact=recorded.storage_values if recorded else {},
            confirm_lease=self.confirm_lease,
        )

    @property
    def restore_secret(self) -> PatchSecrets:
        """The step that puts the backed-up values into the Secrets."""
        return PatchSecrets(
            self.runtime.clusters,
            self.runtime.params.secret_name,
            self.before.name,
            self.old.config,
            exact=self.backup.storage_values,
            confirm_lease=self.confirm_lease,
        )

    def restart_csi(self, stamp: str) -> RestartCsi | None:
        """Return the step that restarts the CSI components; None where `restart_csi` is off."""
        wanted = self.runtime.params.restart_csi
        return RestartCsi(self.runtime.clusters, stamp, self.confirm_lease) if wanted else None

    @property
    def restarted(self) -> list[Clusters]:
        """The installations of the driver that the run restarts."""
        return [self.runtime.clusters] if self.runtime.params.restart_csi else []

    @cached_property
    def write_fence(self) -> WriteFence | None:
        """The fence on the clients' writes to the old store; None where none is wanted."""
        return self.runtime.fence(self.before)

    @property
    def canary(self) -> str:
        """How the names of this run's files begin that prove mounts."""
        return canary_name(run_id())

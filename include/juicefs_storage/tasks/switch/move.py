"""A volume between two storages: what moving it forward, and moving it back, are made of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from airflow.sdk import PokeReturnValue, get_current_context
from airflow.sdk.exceptions import AirflowRescheduleException

from include.juicefs_storage.adapters.s3.boto_bucket import S3Bucket
from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.ports import LeaseStore, Session, WriteFence
from include.juicefs_storage.switch.backup import Backup, backup_id
from include.juicefs_storage.switch.catch_up import catch_up
from include.juicefs_storage.switch.follow_writes import Follower
from include.juicefs_storage.switch.lease import VolumeLock, lease_name
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.plan import Plan, fingerprint
from include.juicefs_storage.switch.prove_blocks import require_all_blocks
from include.juicefs_storage.switch.prove_clients import prove_clients
from include.juicefs_storage.switch.restart_csi import RestartCsi
from include.juicefs_storage.switch.settle import settle as guard_setting
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.tasks.context import ENDED, FOLLOWING, log, mask_keys, pull, push, run_id, task_states
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.volume.canary import canary_name
from include.juicefs_storage.volume.difference import Difference, missing_blocks
from include.juicefs_storage.volume.mount_pods import find_mount_pods, request_errors, stale_mount_pods
from include.juicefs_storage.volume.secret import written_by_format
from include.juicefs_storage.volume.setting import Setting, StorageConfig

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.client import S3Store

#: Clients wait for these copies: what they wrote elsewhere in some seconds is copied in minutes, or something is wrong.
CATCH_UP_TIMEOUT_S = 600
#: A `juicefs config` whose caller was killed is waited for; by itself it runs no longer than 85 s.
CONFIG_TIMEOUT_S = 120
#: How long the run may stand still before what follows it gives its worker slot away: the next task may wait for it.
_GIVE_WAY_S = 300
_FAILED_BEFORE = "failed_before"
#: How long the old store may refuse the writes of a client that has not moved, in seconds: after 300 it gives up.
_FENCED_FOR_S, _FENCED_BLINDLY_S = 200, 250
_FENCED_AT = "fenced_at"


def rollouts_done(restarted: Sequence[Runtime], started: str) -> PokeReturnValue:
    """Look at the rollouts of some installations of the driver once.

    A task that is cleared has the whole time again: what held the rollout up may just have been put right.

    Args:
        restarted: Each installation by one of its runtimes; they have the same `rollout_timeout_s`.
        started: The task that told them to restart.

    Raises:
        PermanentError: They take too long.
    """
    waiting = [line for runtime in restarted for line in RestartCsi(runtime.cluster, "").verify()]
    timing = pull(started, "timing")
    context, now = get_current_context(), datetime.now(UTC)
    looking_since = context["ti"].get_first_reschedule_date(context) or now
    since = max(datetime.fromisoformat(timing["applied_at"]), looking_since) if timing else now
    waited_s = (now - since).total_seconds()
    if waiting and waited_s > restarted[0].params.rollout_timeout_s:
        namespaces = ", ".join(sorted({runtime.params.namespace for runtime in restarted}))
        raise PermanentError(
            f"Rollouts not done after {waited_s:.0f} s: {'; '.join(waiting)}.",
            state="the existing mounts go on",
            next_step=f"kubectl -n {namespaces} get pods; then clear this task with Downstream",
        )
    return PokeReturnValue(is_done=not waiting, xcom_value=None if waiting else {"waited_s": round(waited_s, 1)})


def volume_lock(leases: LeaseStore, uuid: str) -> VolumeLock:
    """The lock of a volume, for the run that is running: `<dag id>/<run id>`."""
    holder = f"{get_current_context()['dag'].dag_id}/{run_id()}"
    return VolumeLock(leases, lease_name(uuid), holder, now=lambda: datetime.now(UTC))


@dataclass(frozen=True)
class Side:
    """One of the two storages: what the clients are told, and its bucket as Airflow and its engine reach it."""

    config: StorageConfig
    store: S3Bucket
    s3: Callable[[], S3Store]


class Move:
    """The move of this run, from its plan and its backup. `old` is where the volume was, `new` where it goes."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._forward = False
        self._all_moved = False

    @classmethod
    def of_run(cls) -> Move:
        """The move of the run that is running."""
        return cls(Runtime.of_run())

    @cached_property
    def plan(self) -> Plan:
        """What was planned, and approved where approval is required."""
        planned = pull("plan")
        if not planned:
            raise PermanentError("This run has no plan.", next_step="clear plan with Downstream")
        return Plan.model_validate(planned)

    @cached_property
    def backup_id(self) -> str:
        """The id of this run's backup, whether it is written yet or not."""
        # Runs of two DAGs may have the same id.
        return backup_id(self.plan.volume, f"revert-{run_id()}" if self.plan.backup_id else run_id())

    @cached_property
    def backup(self) -> Backup:
        """The backup of this run, read back from the vault."""
        content = self.runtime.vault.load(self.backup_id)
        if content is None:
            raise PermanentError(f"There is no backup {self.backup_id}.", next_step="clear backup with Downstream")
        return Backup.from_bytes(content)

    def mark(self, ended: Literal["switched", "rolled-back"]) -> None:
        """Record beside the backup, for good, how this run ended; XComs go when their task is cleared."""
        name = f"{self.backup_id}.{ended}"
        if not self.runtime.vault.load(name):
            self.runtime.vault.save(name, datetime.now(UTC).isoformat().encode())

    def ended(self, how: Literal["switched", "rolled-back"]) -> str:
        """When this run ended so; the empty string where it did not."""
        return (self.runtime.vault.load(f"{self.backup_id}.{how}") or b"").decode()

    @classmethod
    def forward(cls, *, take_lock: bool = True) -> Move:
        """The move of this run, for a step that changes something on the way to the new storage.

        Args:
            take_lock: Take the volume's Lease. Without, only refuse where another run holds it: for what adds blocks
                and changes none, and may be cleared alone, long after the run gave the Lease back.

        Raises:
            NeedsHumanError: This run was rolled back, or began to be; another run holds the volume, or has moved it
                since; or nobody would judge what the step does.
        """
        move = cls.of_run()
        move._forward = True
        move._refuse_after_rollback()
        move._refuse_if_superseded()
        if take_lock:
            if task_states("decide")["decide"] == "success":
                raise NeedsHumanError(
                    "Task decide has judged this run already, and would not see what this step does.",
                    state="this task changed nothing",
                    next_step="clear this task with Downstream",
                )
            move.lock.acquire()
        else:
            move.lock.refuse_if_held()
        return move

    @classmethod
    def back(cls) -> Move:
        """The move of this run, for a step on the way back to the old storage.

        Raises:
            NeedsHumanError: Another run holds the volume, or has moved it since.
        """
        move = cls.of_run()
        move._refuse_if_superseded()
        move.lock.acquire()
        return move

    def _refuse_after_rollback(self) -> None:
        if since := self.ended("rolled-back"):
            raise NeedsHumanError(
                f"This run is being, or was, rolled back since {since}: its steps forward do not run again.",
                state="this task changed nothing",
                next_step="clear failed tasks of the rollback, if any; to switch, start a new run",
            )

    def superseded_by(self) -> str:
        """The backup of a run that moved this volume after this run had made its own; empty where there is none."""
        vault = self.runtime.vault
        if vault.load(self.backup_id) is None:
            return ""
        for name in vault.ids():
            other = name.removesuffix(".switched")
            if other in {name, self.backup_id} or not name.startswith(f"{self.plan.volume}."):
                continue
            if datetime.fromisoformat((vault.load(name) or b"").decode()) > self.backup.created_at:
                return other
        return ""

    def _refuse_if_superseded(self) -> None:
        if other := self.superseded_by():
            raise NeedsHumanError(
                f"Another run moved volume {self.plan.volume} after this one had begun; its backup is {other}.",
                state="this task changed nothing",
                next_step="start a new run: this one knows nothing of where the volume is now",
            )

    @cached_property
    def lock(self) -> VolumeLock:
        """The volume's Lease."""
        return volume_lock(self.runtime.cluster, self.plan.uuid)

    def fence(self) -> None:
        """Right before a write: this run still holds the volume, and has not begun to go back meanwhile.

        Raises:
            NeedsHumanError: It does not, or has.
        """
        self.lock.fence()
        if self._forward:
            self._refuse_after_rollback()

    def kept(self) -> AbstractContextManager[None]:
        """Renew the Lease, where this run has it, while a long task works."""
        return self.lock.kept()

    @property
    def before(self) -> Setting:
        """The setting as it was backed up."""
        return self.backup.setting

    @cached_property
    def old(self) -> Side:
        """The storage in the backup."""
        config = self.runtime.source(self.before)
        return Side(config, self.runtime.source_store(config), lambda: self.runtime.source_side(config))

    @cached_property
    def new(self) -> Side:
        """The storage that was planned and approved, as the backup recorded it."""
        config = self.backup.new
        mask_keys(config)
        return Side(config, self.runtime.target_store, self.runtime.target_side)

    def approved_target(self) -> StorageConfig:
        """The storage that the connection describes, for the backup to record.

        Raises:
            PermanentError: The connection is no longer what the plan showed and a human approved.
        """
        config = self.runtime.target(self.runtime.setting())
        if fingerprint(config, self.runtime.vault.key) != self.plan.target_fingerprint:
            raise PermanentError(
                f"Connection {self.runtime.params.target_conn_id!r} changed since the plan was made for "
                f"{self.plan.after.bucket}.",
                state="nothing was changed",
                next_step="start a new run, so that the plan shows what will be done",
            )
        return config

    @property
    def setting_step(self) -> WriteSetting:
        """Old to new with `apply`, back with `undo`."""
        recorded = self.runtime.recorded
        return WriteSetting(
            self.runtime.metadata,
            self.runtime.juicefs,
            self.before,
            self.new.config,
            fence=self.fence,
            recorded=recorded.setting if recorded else None,
            stale=[stale for values in self.backup.secrets.values() if (stale := written_by_format(values))],
        )

    @property
    def secrets_forward(self) -> PatchSecrets:
        """The new storage's values into the Secrets."""
        params, recorded = self.runtime.params, self.runtime.recorded
        return PatchSecrets(
            self.runtime.cluster,
            params.secret_name,
            self.before.name,
            self.new.config,
            exact=recorded.secrets if recorded else {},
            fence=self.fence,
        )

    @property
    def secrets_back(self) -> PatchSecrets:
        """The backed-up values into the Secrets."""
        params = self.runtime.params
        return PatchSecrets(
            self.runtime.cluster,
            params.secret_name,
            self.before.name,
            self.old.config,
            exact=self.backup.secrets,
            fence=self.fence,
        )

    def copy(self, source: Side, target: Side, *, timeout_s: float) -> dict[str, Any]:
        """Copy the blocks that only the source has, until the metadata misses none on the target."""
        with self.kept():
            copied, difference = catch_up(
                self.runtime.juicefs,
                self.runtime.metadata,
                self.before,
                source.config,
                target.config,
                target.store,
                timeout_s=timeout_s,
            )
        return {"copied": copied, "still_missing": difference.missing}

    def follow(self, source: Side, target: Side, *, beside: Sequence[str]) -> dict[str, Any]:
        """Copy what clients still write to the store that they leave, within two seconds, while other tasks move them.

        A store or a database that fails is no failure here: the next look tries again, and the copy after the clients
        have moved must succeed.

        Args:
            source: The store that the clients leave.
            target: Where they go.
            beside: The tasks that move them; it ends with the last of these.

        Raises:
            NeedsHumanError: The run must not write any more.
        """
        from include.juicefs_storage.adapters.s3.engine import NativeEngine
        from include.juicefs_storage.adapters.s3.http import Limits

        states: dict[str, str] = {}
        moved_at = time.monotonic()

        def over() -> bool:
            nonlocal states, moved_at
            if self._forward:
                self._mind_fence()
            before, states = states, task_states(*beside)
            if states != before or "running" in states.values():
                moved_at = time.monotonic()
            if stuck := time.monotonic() - moved_at > _GIVE_WAY_S:
                log.warning("Nothing else of this run has moved for %d s: no worker slot is free?", _GIVE_WAY_S)
            return stuck or states[beside[-1]] in ENDED

        def failed() -> bool:
            return states[beside[-1]] != "success"

        limits = Limits(connect_s=5, idle_s=10, tries=3, max_delay_s=1)
        with self.kept(), closing(NativeEngine(source.s3(), target.s3(), limits=limits)) as engine:
            follower = Follower(
                self.runtime.metadata, self.before, source.store, target.store, engine.copy, self.fence, time.monotonic
            )
            follower.follow(over, lambda: push(FOLLOWING, True), time.sleep, called_off=failed)
        if self._forward and failed():
            # Some client may not have moved, and nobody minds the fence from here on, least of all a run that holds.
            self.lower_fence()
        return {
            "copied": follower.copied,
            "copied_bytes": follower.copied_bytes,
            "slowest_s": round(follower.slowest_s, 1),
            "waiting": follower.waiting,
            "problem": follower.problem,
        }

    def catch_up_late(
        self, source: Side, target: Side, *, moved_by: Sequence[str], copies: bool = True
    ) -> PokeReturnValue:
        """When slices may no longer be committed late: copy what is missing, and prove that no block is.

        Args:
            source: The store that the clients left.
            target: Where they are.
            moved_by: The tasks that proved the clients there; the time runs from the last of them. Where none did, as
                on a way back without the metadata, there is nothing to wait for: it looks at once.
            copies: Whether what is missing is copied, or only seen.

        Raises:
            AirflowRescheduleException: It is too early; the worker slot is free until then.
        """
        params = self.runtime.params
        if not params.late_commit_s:
            return PokeReturnValue(is_done=True, xcom_value={"copied": 0, "waited_s": 0})
        times = [datetime.fromisoformat(timing["applied_at"]) for task in moved_by if (timing := pull(task, "timing"))]
        due = max(times) + timedelta(seconds=params.late_commit_s) if times else None
        if due and datetime.now(UTC) < due:
            self.lock.renew()
            raise AirflowRescheduleException(due)  # type: ignore[no-untyped-call]
        # Only where something is missing: clients delete on the target alone by now, and a copy would bring that back.
        copied, difference = {"copied": 0}, self._missing(target)
        if copies and difference.missing:
            copied = self.copy(source, target, timeout_s=CATCH_UP_TIMEOUT_S)
            difference = self._missing(target)
        result = {"waited_s": params.late_commit_s, **copied, **self._whole(target, difference)}
        return PokeReturnValue(is_done=True, xcom_value=result)

    def settle(self, step: WriteSetting, secrets: PatchSecrets, *, source: Side, target: Side) -> dict[str, Any]:
        """Guard the setting and the Secrets for `settle_s`; where something was put right, prove and copy once more.

        Args:
            step: What wrote the setting.
            secrets: What wrote the Secrets.
            source: Where clients may have gone for a moment.
            target: Where they belong.
        """
        params, cluster, mounts = self.runtime.params, self.runtime.cluster, self.plan.mount_pods
        with self.kept():
            settled = guard_setting(
                step,
                secrets,
                lambda: stale_mount_pods(cluster, mounts, target.config),
                for_s=params.settle_s,
                clock=time.monotonic,
                sleep=time.sleep,
            )
        result = {key: list(lines) for key, lines in asdict(settled).items()}
        if not settled.repaired:
            return result
        log.warning("Put right: %s. Mount pods that may have written it: %s", settled.repaired, settled.wrote or "none")
        self.prove_clients(target)
        copied = self.copy(source, target, timeout_s=CATCH_UP_TIMEOUT_S) if params.catch_up else {"copied": 0}
        return {**result, **copied, **self.prove_blocks(target)}

    def restart(self, stamp: str) -> dict[str, Any]:
        """Tell the CSI components to restart, unless `restart_csi` is off."""
        if not self.runtime.params.restart_csi:
            return {"restarted": []}
        return {"restarted": RestartCsi(self.runtime.cluster, stamp, self.fence).apply()}

    def rollouts_done(self, started: str) -> PokeReturnValue:
        """Look at both rollouts once; the worker slot is free between two looks.

        Args:
            started: The task that told them to restart.
        """
        self.lock.renew()
        return rollouts_done([self.runtime] if self.runtime.params.restart_csi else [], started)

    @property
    def canary(self) -> str:
        """How the names of this run's files begin that prove mounts."""
        return canary_name(run_id())

    def prove_clients(self, side: Side) -> dict[str, Any]:
        """Prove every mount pod on a storage. Where some are stuck the setting is written once more, in other bytes."""
        step = self.setting_step if side is self.new else self.setting_step.back
        with self.kept():
            proofs = prove_clients(
                self.runtime.cluster,
                self.before,
                side.config,
                side.store,
                self.canary,
                timeout_s=self.runtime.params.client_timeout_s,
                clock=time.monotonic,
                sleep=time.sleep,
                unstick=step.rewrite,
                # On the way back a stranger is in nobody's way: it has been on the old store all along.
                sessions=self.sessions if self._forward else tuple,
            )
        return {"clients": [proof.model_dump() for proof in proofs]}

    def sessions(self) -> Sequence[Session]:
        """The volume's clients, without the fresh mount that a killed task of this run may have left."""
        return [session for session in self.runtime.metadata.sessions() if self.canary not in session.mount_point]

    @cached_property
    def write_fence(self) -> WriteFence | None:
        """What can refuse the clients' writes on the old store; None where none is wanted."""
        return self.runtime.fence(self.before)

    def raise_fence(self) -> bool:
        """Have the old store refuse the clients' writes from now on; False where that is not wanted.

        Where no follower is at work it stays down: nobody would take it down in time.
        """
        if not self.write_fence:
            return False
        self.fence()
        push(_FENCED_AT, datetime.now(UTC).isoformat())
        self.write_fence.up()
        return True

    def _mind_fence(self) -> None:
        """Take the fence down while clients that have not moved still try to write.

        Raises:
            NeedsHumanError: They have not moved in time, or that cannot be seen.
        """
        at = pull("write_setting", _FENCED_AT) if self.write_fence and not self._all_moved else None
        if not (self.write_fence and at):
            return
        fenced_s = (datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds()
        if fenced_s < _FENCED_FOR_S:
            return
        try:
            mounts = find_mount_pods(self.runtime.cluster, self.before)
            behind = [mount.name for mount in mounts if mount.bucket != self.new.config.bucket]
        except StorageSwitchError as error:
            if fenced_s < _FENCED_BLINDLY_S:
                return
            behind = [error.problem]
        self._all_moved = not behind
        if behind:
            self.write_fence.down()
            raise NeedsHumanError(
                f"Clients have not moved {fenced_s:.0f} s after the old store began to refuse their writes: "
                f"{', '.join(behind)}.",
                state="the write fence is down again",
                next_step="the run rolls back; look at the logs of these mount pods",
            )

    def lower_fence(self) -> None:
        """Let the clients write to the old store again, before they are sent back there."""
        try:
            if self.write_fence:
                self.write_fence.down()
        except StorageSwitchError as error:
            log.warning("The write fence on the old store may still be up: %s", error.problem)

    def count_failed(self) -> None:
        """Remember how many object requests have failed in each client, right before the clients begin to move."""
        try:
            push(_FAILED_BEFORE, request_errors(self.runtime.cluster, self.backup.plan.mount_pods))
        except StorageSwitchError as error:
            log.warning("Failed requests are counted from the plan on: %s", error.problem)

    def failed_since(self, task_id: str) -> dict[str, Any]:
        """The object requests that failed in the clients since a task counted them; else since the plan was made."""
        mounts = self.backup.plan.mount_pods
        before = pull(task_id, _FAILED_BEFORE) or {mount.name: int(mount.request_errors) for mount in mounts}
        failed = {
            name: errors - before.get(name, 0) for name, errors in request_errors(self.runtime.cluster, mounts).items()
        }
        return {
            "failed_requests": sum(failed.values()),
            "failed_in": {name: errors for name, errors in sorted(failed.items()) if errors},
        }

    def prove_blocks(self, side: Side) -> dict[str, Any]:
        """Prove by the metadata that no block is missing on a storage."""
        return self._whole(side, self._missing(side))

    def _whole(self, side: Side, difference: Difference) -> dict[str, Any]:
        require_all_blocks(difference, side.config.bucket, self.runtime.metadata)
        return {"blocks": difference.expected}

    def _missing(self, side: Side) -> Difference:
        with self.kept():
            return missing_blocks(self.runtime.metadata, self.before, side.store)

"""Decide, and go back: the volume on the old store again, every client proven there."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, overload

from airflow.sdk import BaseHook, PokeReturnValue, TriggerRule

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.ports import Cluster
from include.juicefs_storage.switch.collect_diagnostics import Masker, collect, secret_values
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.probe_location import find_problem
from include.juicefs_storage.tasks.context import log, pull, push, run_id, task_states
from include.juicefs_storage.tasks.metrics import gauge
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.switch import admission, copies, guard, proofs, write_fence
from include.juicefs_storage.tasks.switch.apply import APPLY
from include.juicefs_storage.tasks.switch.judgement import DIAGNOSTICS, HELD_BECAUSE, missing_proofs, touched
from include.juicefs_storage.tasks.switch.rollouts import rollouts_done
from include.juicefs_storage.tasks.switch.run import CONFIG_TIMEOUT_S, SwitchRun
from include.juicefs_storage.volume.clusters import FIRST, Clusters
from include.juicefs_storage.volume.secret import metaurl_secrets

#: Tasks during which clients may be on either store.
_MOVING = (
    "restore_secret", "restore_setting", "settle_again", "restart_csi_again", "wait_for_rollouts_again",
    "prove_clients_on_old",
)  # fmt: skip
_DIAGNOSTICS_TIMEOUT_S = 120


@runbook_task(kind="branch", trigger_rule=TriggerRule.ALL_DONE)
def decide() -> str:
    """Roll back when a step is not proven after the setting was touched, or when a rollback had begun before.

    A step is proven by the evidence that it left, never by its state alone: a state can be set by hand.
    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    run = SwitchRun.recorded()
    chosen = DIAGNOSTICS if run and _goes_back(run, failed=bool(missing_proofs(run, APPLY))) else "finalize"
    push("chosen", chosen)
    return chosen


def _goes_back(run: SwitchRun, *, failed: bool) -> bool:
    if other := run.record.superseded().backup_id:
        log.warning("Another run moved the volume after this one; its backup is %s. This run leaves it there.", other)
        return False
    if run.record.ended("rolled-back"):
        log.info("This run began to roll back before: it does so to the end, and proves it again.")
        return True
    if failed and run.record.ended("switched"):
        log.warning("This run had switched the volume before. It is not rolled back by itself any more.")
        return False
    if not failed or run.runtime.params.on_failure != "rollback":
        return False
    _await_juicefs_config(run)
    return touched(run) and not _held(run)


def _held(run: SwitchRun) -> bool:
    """Return whether the clients stay on the new store, since the old one would not serve them."""
    try:
        if not _on_new(run):
            return False
        # Where the fence is up the old store refuses writes for now.
        fenced = bool(run.write_fence and run.write_fence.is_up())
        problem = _problem_of(run, run.old, write=not fenced)
    except StorageSwitchError:
        log.exception("Whether the old store serves is not known; the rollback asks again before it moves a client.")
        return False
    if problem:
        reason = f"The old store {run.old.config.bucket} does not serve the clients: {problem}"
        log.warning("No rollback: %s", reason)
        push(HELD_BECAUSE, reason)
    return bool(problem)


def _on_new(run: SwitchRun) -> bool:
    """Return whether the setting sends the clients to another store than the backed-up one."""
    return not run.runtime.setting().uses(run.before.config)


def _problem_of(run: SwitchRun, location: Location, *, write: bool) -> str:
    """Return why a location would not serve the clients; empty where it would."""
    runtime = run.runtime
    if run.change.one_store:
        # Its keys are what is asked for: the store answers the other side's all the same.
        location = replace(location, store=runtime.clients_store(location.config))
    pods = [mount.name for mount in run.carried_out.mount_pods]
    return find_problem(
        runtime.clusters,
        runtime.juicefs,
        runtime.metadata,
        run.before,
        location,
        pods,
        write=write,
        lost_before=run.lost_before,
    )


def _require_way_back(run: SwitchRun) -> None:
    """Refuse to send clients from a store that serves them to one that does not, or where blocks would be missing.

    Raises:
        NeedsHumanError: The old store does not serve; or copy_back failed though the new store serves.
    """
    if not _on_new(run):
        return
    state = f"the clients are on the new store {run.new.config.bucket}; this task changed nothing"
    if problem := _problem_of(run, run.old, write=True):
        raise NeedsHumanError(
            f"The old store {run.old.config.bucket} does not serve the clients: {problem}",
            state=state,
            next_step="to go back, repair it, then clear copy_back with Downstream; to stay, see "
            "docs/rollback.md#a-run-that-was-left-where-it-is",
        )
    if task_states("copy_back")["copy_back"] != "success" and not _problem_of(run, run.new, write=False):
        raise NeedsHumanError(
            "copy_back failed, and the new store serves: blocks that only it has would be missing on the old one.",
            state=state,
            next_step="repair what copy_back names, then clear copy_back with Downstream; see "
            "docs/rollback.md#a-run-that-was-left-where-it-is",
        )


def _await_juicefs_config(run: SwitchRun) -> None:
    """Wait for a `juicefs config` whose caller was killed: it keeps running in its pod, and may still write.

    Where that cannot be read the rollback starts all the same; settle_again, which ends it, insists.
    """
    try:
        run.runtime.juicefs.await_config(timeout_s=CONFIG_TIMEOUT_S)
    except StorageSwitchError as error:
        log.warning("Whether a juicefs config still runs is not known: %s", error.problem)


@overload
def undo_task(function: Callable[[SwitchRun], Any], /) -> Any: ...
@overload
def undo_task(**options: Any) -> Callable[[Callable[[SwitchRun], Any]], Any]: ...
def undo_task(function: Callable[[SwitchRun], Any] | None = None, /, **options: Any) -> Any:
    """Make a task of the rollback. It runs after a failed undo too, is skipped with its group, runs by decision only.

    Once it has started, the run's steps forward refuse to run.
    """
    if function is None:
        return functools.partial(undo_task, **options)

    @functools.wraps(function)
    def wrapped() -> Any:
        if pull("decide", "chosen") != DIAGNOSTICS:
            raise NeedsHumanError(
                "decide did not choose a rollback.",
                state="this task changed nothing",
                next_step="clear decide with Downstream",
            )
        run = admission.back()
        run.record.mark("rolled-back")
        write_fence.take_down(run)
        return function(run)

    # The signature that Airflow sees: no argument is left to be filled in.
    del wrapped.__wrapped__
    return runbook_task(trigger_rule=TriggerRule.NONE_SKIPPED, **options)(wrapped)


@undo_task(retries=0, execution_timeout=timedelta(seconds=3 * _DIAGNOSTICS_TIMEOUT_S))
def collect_diagnostics(run: SwitchRun) -> dict[str, Any]:
    """Keep what tells why the switch failed, as it is before anything is undone; secrets are masked.

    `juicefs status`, events, pods, workloads, claims, volumes, CSIDrivers, CSINodes, logs of the CSI and mount pods.
    They lie encrypted beside the backup; `docs/rollback.md` says how to read them. The rollback continues without them.
    **Changes** nothing in the volume. **Safe to clear**: yes; what was kept of the first failure stays.
    """
    runtime, name = run.runtime, f"{run.backup_id}.diagnostics"
    if runtime.vault.load(name):
        return {"diagnostics_id": name, "sections": 0, "problems": []}
    clusters, secrets = _readable(run)
    found = collect(
        clusters,
        runtime.juicefs,
        Masker([*secrets, *_secrets(run)]),
        clock=time.monotonic,
        timeout_s=_DIAGNOSTICS_TIMEOUT_S,
    )
    runtime.vault.save(name, found.text.encode())
    return {"diagnostics_id": name, "sections": found.sections, "problems": list(found.problems)}


def _readable(run: SwitchRun) -> tuple[Clusters, list[str]]:
    """Return the clusters whose Secrets can be read, and the values in these: in no other could they be masked.

    Raises:
        StorageSwitchError: Those of the first cluster cannot be read.
    """
    clusters = run.runtime.clusters

    def read(_: str, cluster: Cluster) -> Iterator[str]:
        for secret in cluster.secrets():
            yield from secret_values(secret.data)
            yield from metaurl_secrets(secret)

    values, silent = clusters.ask_each(read)
    if error := silent.get(FIRST):
        raise error
    more = {name: cluster for name, cluster in clusters.more.items() if name not in silent}
    return Clusters(clusters.first, more), values


def _secrets(run: SwitchRun) -> Iterator[str]:
    """Yield every other secret value that this run can know of."""
    for config in (run.old.config, run.new.config):
        yield from config.secrets
    for secrets in run.backup.secrets_by_cluster.values():
        for data in secrets.values():
            yield from secret_values(data)
    if conn_id := run.runtime.params.meta_conn_id:
        yield BaseHook.get_connection(conn_id).password or ""


@undo_task
def copy_back(run: SwitchRun) -> dict[str, Any]:
    """Copy blocks that clients wrote only to the new store back to the old one, before the setting goes back.

    **Changes** the old store: adds blocks, overwrites and deletes none. **Safe to clear**: yes, with Downstream.
    """
    return copies.copy(run, run.new, run.old, timeout_s=copies.CATCH_UP_TIMEOUT_S, before_follower=True)


@undo_task
def follow_writes_back(run: SwitchRun) -> dict[str, Any]:
    """Copy back what clients still write to the new store, within two seconds, until every one is proven on the old.

    **Changes** the old store: adds blocks, overwrites and deletes none. **Safe to clear**: yes; it ends with
    prove_clients_on_old.
    """
    return copies.follow(run, run.new, run.old, moving=_MOVING, compared_by="copy_back")


@undo_task
def restore_secret(run: SwitchRun) -> dict[str, Any]:
    """Put the values of the backup back into the Secrets: before the setting, so that no pod starts with new ones.

    **Changes** the Secrets that the run had patched. **Safe to clear**: yes, with Downstream.
    """
    _require_way_back(run)
    if _on_new(run):
        _require_downstream()
    return {"patched": run.restore_secret.apply()}


def _require_downstream() -> None:
    """Refuse to move clients, or to say that they moved, after the last blocks were copied back.

    What they wrote to the new store in between would be missing on the old one, and no task would look again.
    """
    if task_states("copy_back_again")["copy_back_again"] == "success":
        raise NeedsHumanError(
            "Task copy_back_again is done already, and would not see what clients wrote since.",
            state="this task changed nothing",
            next_step="clear this task with Downstream",
        )


def _require_restored(run: SwitchRun) -> None:
    """Refuse to prove or finish what has not begun: clients cannot have followed a setting that did not go back.

    Raises:
        PermanentError: The setting still names the new store.
    """
    if (now := run.runtime.setting()).uses(run.new.config):
        raise PermanentError(
            f"The setting still names {now.bucket}.",
            state="the clients are on the new store",
            next_step="clear restore_setting with Downstream",
        )


@undo_task
def restore_setting(run: SwitchRun) -> dict[str, Any]:
    """Put the old storage back into the setting by compare-and-set: one UPDATE; the row is never absent.

    **Changes** the storage fields of the row `format`; nothing else in it. **Safe to clear**: yes, with Downstream.
    """
    _await_juicefs_config(run)
    _require_way_back(run)
    if _on_new(run):
        _require_downstream()
        proofs.count_failed_requests(run)
    followed = not run.change.one_store and copies.await_follower("follow_writes_back")
    gauge("between_stores", 1, run.before.name)
    restored = run.write_setting.undo()
    return {"restored": restored, "followed": followed, **(proofs.written_now() if restored else {})}


@undo_task
def settle_again(run: SwitchRun) -> dict[str, Any]:
    """Guard setting and Secrets for `settle_s` seconds: a pod that started with the new values may write them back.

    First of all no `juicefs config` of a killed task may be left that could do the same.
    **Changes** the setting and the Secrets only where they moved. **Safe to clear**: yes, with Downstream.
    """
    run.runtime.juicefs.await_config(timeout_s=CONFIG_TIMEOUT_S)
    _require_way_back(run)
    return guard.settle(run, run.write_setting.back, run.restore_secret, source=run.new, target=run.old)


@undo_task
def restart_csi_again(run: SwitchRun) -> dict[str, Any]:
    """Restart the CSI controller and node components, so that they read the old values.

    **Changes** the pod templates' annotation. **Safe to clear**: yes, with Downstream.
    """
    step = run.restart_csi(f"{run_id()} rollback")
    return {"restarted": step.apply() if step else []}


@undo_task(kind="sensor", mode="reschedule", poke_interval=3, timeout=7300)
def wait_for_rollouts_again(run: SwitchRun) -> PokeReturnValue:
    """Wait until both rollouts are done; holds no worker slot.

    **Changes** nothing. **Safe to clear**: yes.
    """
    run.lease.renew()
    return rollouts_done(run.restarted, "restart_csi_again", run.runtime.params.rollout_timeout_s)


@undo_task
def prove_clients_on_old(run: SwitchRun) -> dict[str, Any]:
    """Prove every mount pod on the old store, as prove_clients does on the new one.

    **Changes** nothing; a small file is written through each mount and removed.
    **Safe to clear**: yes, with Downstream.
    """
    _require_downstream()
    _require_restored(run)
    proven = proofs.prove_clients(run, run.old)
    gauge("between_stores", 0, run.before.name)
    return proven


@undo_task
def copy_back_again(run: SwitchRun) -> dict[str, Any]:
    """Copy back what clients wrote to the new store until they were proven on the old one.

    **Changes** the old store: adds blocks, overwrites and deletes none. **Safe to clear**: yes, with Downstream.
    """
    _require_restored(run)
    return copies.copy(run, run.new, run.old, timeout_s=copies.CATCH_UP_TIMEOUT_S)


@undo_task
def prove_blocks_on_old(run: SwitchRun) -> dict[str, Any]:
    """Prove by the metadata that every block that some file refers to is on the old store.

    Counts the object requests that failed in each client since the setting went back.
    **Changes** nothing. **Safe to clear**: yes.
    """
    return {**proofs.prove_blocks(run, run.old), **proofs.failed_requests_since(run, "restore_setting")}


@undo_task(kind="sensor", mode="reschedule", timeout=7200)
def copy_back_late(run: SwitchRun) -> PokeReturnValue:
    """Copy back and prove once more when `late_commit_s` have passed since the last client returned.

    **Changes** the old store: adds blocks, overwrites and deletes none. **Safe to clear**: yes.
    """
    return copies.catch_up_late(run, run.new, run.old, moved_by=("prove_clients_on_old", "settle_again"))

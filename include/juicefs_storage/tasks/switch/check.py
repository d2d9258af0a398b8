"""Check: what a run needs, before anything is changed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from airflow.sdk import get_current_context

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.names import NEEDED_BLOCKS
from include.juicefs_storage.objects.no_bucket import NoBucketYet
from include.juicefs_storage.objects.one_store import new_probe_key
from include.juicefs_storage.ports import Cluster, Place
from include.juicefs_storage.switch import checks
from include.juicefs_storage.switch.backup import backup_size
from include.juicefs_storage.switch.change import Change, find_change
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.switch.forecast import reading_rate
from include.juicefs_storage.switch.lease import check_leases
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.params import resolve_switch_params
from include.juicefs_storage.switch.probe_location import find_problem
from include.juicefs_storage.tasks.context import pull, push, run_id, task_states
from include.juicefs_storage.tasks.registry import read_registry
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.door import planned_door
from include.juicefs_storage.tasks.switch.run import volume_leases
from include.juicefs_storage.volume.canary import canary_name
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods, mounts_in
from include.juicefs_storage.volume.secret import volume_secrets
from include.juicefs_storage.volume.setting import Setting, StorageConfig, normal_endpoint

#: The checks by task id, for whoever makes them outside of a run of their own.
CHECK_FUNCTIONS: dict[str, Callable[[Runtime], list[Finding]]] = {}


@runbook_task
def resolve_params() -> dict[str, Any]:
    """Validate the params and fill in what the registry knows about the volume.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    given = dict(get_current_context()["params"])
    try:
        return resolve_switch_params(given, read_registry()).model_dump()
    except PermanentError as error:
        push("findings", [checks.refusal("resolve_params", error.problem, error.next_step).model_dump()])
        raise


def check_task(function: Callable[[Runtime], list[Finding]]) -> Any:
    """Make a task of one check: it leaves the findings for the plan, then fails where something is refused.

    A check that could not be made is a refusal too.
    """

    @functools.wraps(function)
    def run() -> list[dict[str, Any]]:
        try:
            with missing_connections_explained():
                findings = function(Runtime.of_run())
        except StorageSwitchError as error:
            push("findings", [checks.refusal(function.__name__, error.problem, error.next_step).model_dump()])
            raise
        rows = [finding.model_dump() for finding in findings]
        push("findings", rows)
        if refused := [finding for finding in findings if finding.level == "refusal"]:
            lines = "\n".join(f"{finding.message} Remedy: {finding.remedy}" for finding in refused)
            raise PermanentError(lines, state="nothing was changed")
        return rows

    # The signature that Airflow sees: no argument is left to be filled in.
    del run.__wrapped__
    CHECK_FUNCTIONS[function.__name__] = function
    return runbook_task(run)


@check_task
def check_rights(runtime: Runtime) -> list[Finding]:
    """Check that the Kubernetes API grants every right that the run will use.

    **Changes** nothing. **Safe to clear**: yes, with Downstream. Remedy for a refusal: `deploy/rbac.yaml`.
    """
    return checks.check_each(runtime.clusters, "rights", lambda _, cluster: checks.check_rights(cluster))


@check_task
def check_csi(runtime: Runtime) -> list[Finding]:
    """Check that the CSI driver runs in mount-pod mode and is healthy, and that no other run holds the volume's Lease.

    Of several clusters, that they are not one by two connections.
    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    timeout_s, now = runtime.params.rollout_timeout_s, datetime.now(UTC)
    uuid = runtime.setting().uuid
    return checks.gather(
        "csi",
        lambda: checks.check_each(
            runtime.clusters, "csi", lambda _, cluster: checks.check_csi(cluster, rollout_timeout_s=timeout_s, now=now)
        ),
        lambda: checks.check_distinct(runtime.clusters),
        lambda: check_leases(volume_leases(runtime, uuid, needs_all=True)),
    )


@check_task
def check_volume(runtime: Runtime) -> list[Finding]:
    """Check that every client of the volume can follow a change of the setting, and can be proven.

    Reads the setting, the sessions, `.config` and the free room of every mount pod; runs `juicefs status` where juicefs
    will run; tries the update of the setting in a transaction that is rolled back.
    **Changes** nothing in a dry run; else a small file is written through each mount and removed.
    **Safe to clear**: yes, with Downstream.
    """
    setting = runtime.setting()
    pods, timeout_s = runtime.volume_pods(setting), runtime.params.client_timeout_s
    mounts = pods.mounts()
    return checks.gather(
        "volume",
        lambda: checks.check_volume(
            setting,
            mounts,
            pods.served(mounts),
            runtime.metadata,
            timeout_s,
            leaving=pods.leaving(),
            accept=runtime.params.accept_clients,
        ),
        lambda: checks.check_expired_sessions(runtime.metadata, mounts),
        lambda: checks.check_metadata(runtime.metadata, runtime.juicefs, setting),
        lambda: _other_clusters(runtime, setting),
        lambda: checks.check_room(runtime.clusters, mounts),
        lambda: _served(runtime, setting, mounts),
        lambda: _canaries(runtime, pods, mounts),
        lambda: checks.check_runner(runtime.juicefs.version(), mounts, runtime.metadata.sessions()),
        # A run that has switched the volume before, and is cleared, keeps its fence.
        lambda: [] if setting.uses(runtime.target(setting)) else _fence(runtime, setting),
    )


def _other_clusters(runtime: Runtime, setting: Setting) -> list[Finding]:
    """Check that the Secret of each further cluster leads to this volume, and to no other one of its name."""

    def look(name: str, cluster: Cluster) -> list[Finding]:
        # The first one is looked at by `check_metadata`.
        return checks.check_secret_leads_to(runtime.juicefs_in(cluster), setting) if name else []

    return checks.check_each(runtime.clusters, "metadata", look)


def _fence(runtime: Runtime, setting: Setting) -> list[Finding]:
    before, after = runtime.source(setting), runtime.target(setting)
    return checks.check_fence(
        runtime.fence(setting),
        catch_up=runtime.params.catch_up,
        keys_only=before.place == after.place,
        same_access_key=before.access_key == after.access_key,
    )


def _served(runtime: Runtime, setting: Setting, mounts: Sequence[MountPod]) -> list[Finding]:
    """Look whether the clients reach the store that they will leave; one that they keep is looked at as the new one."""
    before = runtime.source(setting)
    if before.place == runtime.target(setting).place:
        return []
    return checks.check_served(runtime.clusters, before, mounts)


def _canaries(runtime: Runtime, pods: VolumePods, mounts: Sequence[MountPod]) -> list[Finding]:
    """Check the canaries, unless the run has switched the volume before: a cleared run proves its clients later."""
    config, target = runtime.source(pods.setting), runtime.target(pods.setting)
    if runtime.params.dry_run or config == target:
        return []
    # Where only the keys change it is the clients' own keys that tell whether anything can be written.
    store = runtime.clients_store(config) if config.place == target.place else runtime.source_store(config)
    going_back = runtime.recorded is not None
    return checks.check_canaries(pods, mounts, config, store, canary_name(run_id()), going_back=going_back)


@check_task
def check_secrets(runtime: Runtime) -> list[Finding]:
    """Check that every Secret with the volume's values is known, and nothing puts old ones back or restarts pods.

    Reads the namespace's Secrets, pods and workloads, and the PersistentVolumes. juicefs opens the old store with the
    keys that a pod would have that restarts after the switch.
    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    setting = runtime.setting()
    mounts = runtime.volume_pods(setting).mounts()

    def look(name: str, cluster: Cluster) -> list[Finding]:
        secrets = volume_secrets(cluster, runtime.params.secret_name, setting.name)
        return checks.check_secrets(cluster, setting, secrets, mounts_in(name, mounts))

    return checks.gather(
        "secrets", lambda: checks.check_each(runtime.clusters, "secrets", look), lambda: planned_door(runtime, setting)
    )


@check_task
def check_vault(runtime: Runtime) -> list[Finding]:
    """Check that connection `juicefs_backup` has a usable key, and its folder has room for what the way back needs.

    Writes a file of the size of a backup to the folder, in a dry run too, reads it back and removes it. Reads what lies
    there of volumes of this name. Refuses where backups or task logs lie on the volume itself.
    **Changes** nothing in the volume. **Safe to clear**: yes, with Downstream.
    """
    setting = runtime.setting()
    recorded = runtime.clusters.ask_all(
        lambda _, cluster: [
            *(dict(secret.data) for secret in volume_secrets(cluster, runtime.params.secret_name, setting.name)),
            dict(cluster.templates()),
        ]
    )
    size_bytes = backup_size(setting, recorded)
    runtime.vault.check_room(size_bytes)
    proven = f"a file of {size_bytes // 1024} KiB was written to {runtime.vault.folder}, read back and removed"
    return [
        checks.ok("vault", proven),
        *checks.check_places(_places(runtime), setting.name, [setting.config, runtime.target(setting)]),
        *checks.check_readable(runtime.vault, setting.name),
    ]


def _places(runtime: Runtime) -> list[Place]:
    """Find where backups and task logs lie, as this worker sees it."""
    from airflow.sdk.configuration import conf

    from include.juicefs_storage.adapters.places import find_place

    logs = conf.get("logging", "base_log_folder", fallback="")
    return [
        find_place("The folder of backups", str(runtime.vault.folder)),
        *([find_place("Airflow's log folder", logs)] if logs else []),
    ]


@check_task
def check_target_bucket(runtime: Runtime) -> list[Finding]:
    """Check that the new bucket exists, its keys work, it holds this volume's data, and the pods that need it reach it.

    juicefs itself opens the new store where `juicefs_runner` says, and lists.
    **Changes** nothing in a dry run; else one probe object is written to the new bucket and deleted again.
    The bucket is looked up with HEAD and never created here. **Safe to clear**: yes, with Downstream.
    """
    setting = runtime.setting()
    probe = None if runtime.params.dry_run else new_probe_key(f"{setting.name}/")
    target, origin = runtime.target(setting), runtime.target_store.store.origin
    controller = runtime.params.juicefs_runner == "controller"
    reach: list[Finding] = []

    def look_from_pods() -> list[Finding]:
        mounts = runtime.volume_pods(setting).mounts()
        found = checks.check_reach(runtime.clusters, target, mounts, origin, controller=controller)
        reach.extend(found if mounts or controller else ())
        return found

    def look_from_airflow() -> list[Finding]:
        pods_reach = bool(reach) and all(finding.level == "ok" for finding in reach)
        with checks.only_pods_reach(pods_reach=pods_reach):
            if runtime.lacks_bucket:
                source = runtime.source_store(runtime.source(setting))
                return checks.check_absent(source.versioning_and_lock, target.bucket)
            return checks.check_target(runtime.target_store, setting, target, probe_key=probe)

    findings = checks.gather("target", look_from_pods, look_from_airflow)
    if any(finding.level == "refusal" for finding in findings) or runtime.lacks_bucket:
        return findings  # juicefs would say the same in other words, or create the bucket
    findings += checks.check_use(runtime.juicefs, target, origin)
    return [*findings, *check_endpoints(runtime, target, probe)]


def check_endpoints(runtime: Runtime, target: StorageConfig, probe_key: str | None) -> list[Finding]:
    """Check that Airflow and the clients reach one store, where each has an endpoint of its own.

    Args:
        runtime: Of the run.
        target: The storage that the setting will name.
        probe_key: See `check_one_store`.
    """
    store = runtime.target_store
    if normal_endpoint(store.store.endpoint) == target.place[0]:
        return []
    return checks.check_one_store(runtime.juicefs, store, target, store.store.origin, probe_key=probe_key)


@check_task
def check_consistency(runtime: Runtime) -> list[Finding]:
    """Find out how the storage changes, then compare the stores as `consistency` says.

    Where the volume keeps its store, or where the old one does not serve, one store is compared with the metadata.
    **Changes** nothing in a dry run; else one object is written to the new bucket, looked for in the old one, and
    deleted. **Safe to clear**: yes, with Downstream. `consistency=off` leaves the comparison out, with a warning.
    """
    setting = runtime.setting()
    if setting.uses(runtime.target(setting)):
        return [checks.ok("consistency", "the volume is on this store already")]
    change = _change(runtime, setting)
    push("change", change.model_dump())
    source = runtime.source_store(runtime.source(setting))
    findings, difference = checks.check_consistency(
        source,
        NoBucketYet(runtime.target_store.name) if runtime.lacks_bucket else runtime.target_store,
        setting,
        runtime.metadata,
        mode=runtime.params.consistency,
        change=change,
        catch_up=runtime.params.catch_up,
        accept_lost=runtime.params.accept_lost_blocks,
        new_bucket=runtime.lacks_bucket,
    )
    push("lost_blocks", difference.lost_keys)
    counted = runtime.params.consistency not in {"off", "sample"} or not change.copies
    push("missing_objects", difference.missing if counted else None)
    push(NEEDED_BLOCKS, difference.expected if counted else None)
    if counted and difference.missing and difference.present:
        push("blocks_s", reading_rate(runtime.metadata, setting, source, time.monotonic))
    return [*findings, *checks.check_late_commits(runtime.params.late_commit_s, change)]


def _change(runtime: Runtime, setting: Setting) -> Change:
    params, before = runtime.params, runtime.source(setting)
    source = runtime.source_store(before)
    if runtime.lacks_bucket:
        source.check(f"{setting.name}/")  # there is nothing else to copy from
        return Change()

    def why_not_served() -> str:
        pods = [mount.name for mount in runtime.volume_pods(setting).mounts()]
        location = Location(before, source)
        return find_problem(runtime.clusters, runtime.juicefs, runtime.metadata, setting, location, pods, write=False)

    try:
        return find_change(
            before,
            runtime.target(setting),
            source,
            runtime.target_store,
            below=f"{setting.name}/",
            probe_key=None if params.dry_run else new_probe_key(f"{setting.name}/"),
            why_not_served=why_not_served,
        )
    except PermanentError:
        # Nothing is compared and nothing copied: Airflow needs no way to the old store.
        if params.consistency == "off" and not params.catch_up:
            return Change()
        raise


#: The check whose business the connection is.
_OF_THE_CONNECTION = "check_target_bucket"
#: The tasks that leave findings.
CHECKS = ("resolve_params", *CHECK_FUNCTIONS)


def all_findings() -> list[Finding]:
    """Collect what every check of this run found; a check that could not be made is a refusal."""
    states = task_states(*CHECKS)
    findings: list[Finding] = []
    for task_id in CHECKS:
        if states[task_id] == "upstream_failed":
            continue
        rows = pull(task_id, "findings") or []
        findings += [Finding.model_validate(row) for row in rows]
        if states[task_id] != "success" and not rows:
            message = f"{task_id} could not be made (state {states[task_id]})."
            findings.append(checks.refusal(task_id, message, "see its log"))
    return _said_once(findings)


def _said_once(findings: list[Finding]) -> list[Finding]:
    """Leave out refusals that say what another one says: a connection that cannot be used stops every check."""
    kept: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        if finding.level == "refusal":
            said = (finding.message, finding.remedy)
            if said not in kept or finding.check == _OF_THE_CONNECTION:
                kept[said] = finding
    return [finding for finding in findings if finding.level != "refusal" or finding in kept.values()]

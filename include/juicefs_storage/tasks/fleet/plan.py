"""A fleet of volumes: found, each rehearsed by a dry run of its own, and put into waves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from airflow.sdk import PokeReturnValue, TriggerRule, get_current_context, task_group

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.errors import PermanentError, StorageSwitchError
from include.juicefs_storage.fleet.members import Member, on_endpoint, unique_keys, volumes_by_secret
from include.juicefs_storage.fleet.params import FleetParams, found_volume, registered_volume
from include.juicefs_storage.fleet.plan import FleetPlan, make_waves
from include.juicefs_storage.fleet.report import explain_run
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.names import volume_run_id
from include.juicefs_storage.ports import SecretObject
from include.juicefs_storage.tasks.approval import require_second_person
from include.juicefs_storage.tasks.context import log, pull, push, run_id, task_states
from include.juicefs_storage.tasks.fleet.runs import (
    ACTIVE,
    LONGEST_WAIT_S,
    POLL_S,
    approved_plan,
    exists,
    pull_of_run,
    recorded_plan,
    run_state,
    trigger,
)
from include.juicefs_storage.tasks.registry import read_registry
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.volume.setting import Setting, endpoint_and_bucket

_PARALLEL_SETTINGS = 8


@runbook_task
def resolve_params() -> dict[str, Any]:
    """Validate the params of the fleet.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    return FleetParams.validated(get_current_context()["params"]).model_dump(mode="json")


def fleet_params() -> FleetParams:
    """Return the params of this run, as its first task validated them."""
    return FleetParams.model_validate(pull("resolve_params"))


@runbook_task
def find_volumes() -> list[str]:
    """Find every volume on the old endpoint by the Secrets and the settings, or take the list from the registry.

    **Changes** nothing. **Safe to clear**: yes, with Downstream. A run that has begun to move volumes keeps its list.
    """
    begun = recorded_plan()
    members = list(begun.members) if begun else find_members(fleet_params(), read_registry())
    push("members", [member.model_dump(mode="json") for member in members])
    return [member.key for member in members if member.params and not member.there]


def find_members(params: FleetParams, registry: dict[str, dict[str, Any]]) -> list[Member]:
    """Find the volumes of a fleet. One that cannot be read or identified is blocked, never left out silently."""
    found = _registered(params, registry) if params.volumes else _found(params, registry)
    members = unique_keys([member for member in found if member.key not in params.exclude])
    first: dict[str, Member] = {}
    for number, member in enumerate(members):
        if member.uuid and (other := first.setdefault(member.uuid, member)) is not member:
            message = f"It is the same volume as `{other.key}`. Remedy: leave one of them out."
            members[number] = member.model_copy(update={"blockers": (message,), "params": {}})
    return members


def _registered(params: FleetParams, registry: dict[str, dict[str, Any]]) -> Iterator[Member]:
    for name in params.volumes:
        secret = ""
        try:
            with missing_connections_explained():
                resolved = registered_volume(params, registry, name)
                secret = f"{resolved.namespace}/{resolved.secret_name}"
                runtime = Runtime(resolved)
                yield _member(runtime, runtime.setting(), secret)
        except StorageSwitchError as error:
            yield Member(key=name, secret=secret or "?", blockers=(_blocker(error),))


def _found(params: FleetParams, registry: dict[str, dict[str, Any]]) -> Iterator[Member]:
    cluster = Runtime(found_volume(params, {}, "any")).cluster
    named = volumes_by_secret(cluster.secrets_everywhere() or cluster.secrets(), params.namespace)
    # A database that is away costs half a minute.
    with ThreadPoolExecutor(_PARALLEL_SETTINGS) as pool:
        found = pool.map(lambda each: _look(each[0], params, registry, here=each[1]), named)
        yield from filter(None, found)


def _look(
    secret: SecretObject, params: FleetParams, registry: dict[str, dict[str, Any]], *, here: bool
) -> Member | None:
    """Find the volume of a Secret, where it is one of the fleet's."""
    where, bucket = f"{secret.namespace}/{secret.name}", secret.data.get("bucket", "")
    try:
        with missing_connections_explained():
            if not here:
                raise PermanentError(
                    f"Its Secret is in namespace {secret.namespace}, the driver in {params.namespace}.",
                    next_step="move it by a run of its own, see docs/switch.md",
                )
            # The setting decides where a volume is; its Secret may have no bucket, or an old one.
            setting = Runtime(found_volume(params, registry, secret.name)).setting()
            endpoint, name = endpoint_and_bucket(setting.storage, setting.bucket)
            if not on_endpoint(endpoint, params.source_endpoint or ""):
                return None
            return _member(Runtime(found_volume(params, registry, secret.name, name)), setting, where)
    except StorageSwitchError as error:
        if _is_elsewhere(secret, params):
            log.warning("Left out: Secret %s, which names another store. %s", where, error)
            return None
        key = re.sub(r"[^A-Za-z0-9_-]+", "-", secret.data["name"])
        return Member(key=key, secret=where, before=bucket, blockers=(_blocker(error),))


def _is_elsewhere(secret: SecretObject, params: FleetParams) -> bool:
    """Return whether a Secret names another store than the fleet's; False where it names none, or is unreadable."""
    try:
        endpoint, _ = endpoint_and_bucket(secret.data.get("storage", ""), secret.data.get("bucket", ""))
    except StorageSwitchError:
        return False
    return not on_endpoint(endpoint, params.source_endpoint or "")


def _member(runtime: Runtime, setting: Setting, secret: str) -> Member:
    there = setting.uses(runtime.target(setting))
    params = runtime.params.model_dump(mode="json")
    return Member(key=setting.name, secret=secret, uuid=setting.uuid, before=setting.bucket, params=params, there=there)


def _blocker(error: StorageSwitchError) -> str:
    return f"{error.problem} Remedy: {error.next_step or 'see the log of find_volumes'}."


@runbook_task(map_index_template="{{ task.op_kwargs['volume'] }}", retries=3)
def start_dry_run(volume: str) -> None:
    """Start a dry run of `juicefs_storage_switch` for the volume, once.

    **Changes** nothing. **Safe to clear**: yes, it finds the run that it started.
    """
    rehearsal = volume_run_id(run_id(), volume, dry_run=True)
    if not exists(rehearsal):
        member = next(Member.model_validate(row) for row in pull("find_volumes", "members") if row["key"] == volume)
        trigger(rehearsal, member.conf(dry_run=True, restart_csi=fleet_params().restart_csi))


@runbook_task(
    kind="sensor", mode="reschedule", poke_interval=POLL_S, timeout=LONGEST_WAIT_S,
    map_index_template="{{ task.op_kwargs['volume'] }}",
)  # fmt: skip
def wait_for_dry_run(volume: str) -> PokeReturnValue:
    """Wait for the end of a volume's dry run, however it ends: the plan judges it. Holds no worker slot.

    **Changes** nothing. **Safe to clear**: yes.
    """
    return PokeReturnValue(is_done=run_state(volume_run_id(run_id(), volume, dry_run=True)) not in ACTIVE)


@runbook_task(trigger_rule=TriggerRule.ALL_DONE)
def plan() -> dict[str, Any]:
    """Put the dry runs together: one table for all, with what blocks whom, and the waves.

    **Changes** nothing. **Safe to clear**: yes, with Downstream. A run that has begun to move volumes keeps its plan.
    """
    rows, begun = pull("find_volumes", "members"), recorded_plan()
    if task_states("find_volumes")["find_volumes"] != "success":
        raise PermanentError("The volumes are not known.", next_step="see the log of find_volumes")
    planned = begun or make_plan(fleet_params(), [judge(Member.model_validate(row)) for row in rows])
    push("planned", planned.model_dump(mode="json"))
    push("markdown", planned.to_markdown())
    push("subject", f"{planned.title}?")
    if not planned.members:
        source = planned.params.source_endpoint
        raise PermanentError(
            f"No volume was found on {source}.",
            state="nothing was changed",
            next_step="compare `source_endpoint` with the bucket in the Secrets, and `namespace` with the driver's",
        )
    if planned.blocked and (planned.params.on_failure == "stop" or not planned.waves):
        lines = "\n".join(f"- {member.key}: {line}" for member in planned.blocked for line in member.blockers)
        raise PermanentError(
            f"{len(planned.blocked)} of {counted(len(planned.members), 'volume')} blocked:\n{lines}",
            state="nothing was changed",
            next_step="remove what blocks them, leave them out with `exclude`, or trigger with on_failure=continue",
        )
    return planned.model_dump(mode="json")


def make_plan(params: FleetParams, members: list[Member]) -> FleetPlan:
    """Put those that are ready into waves."""
    ready = [member for member in members if member.ready]
    waves = make_waves(ready, params.canary, params.wave_size)
    return FleetPlan(run_id=run_id(), params=params, members=tuple(members), waves=waves)


def judge(member: Member) -> Member:
    """Judge what a volume's dry run found."""
    if not member.params or member.there:
        return member
    rehearsal = volume_run_id(run_id(), member.key, dry_run=True)
    report = pull_of_run(rehearsal, "finalize", "report") or {}
    planned = pull_of_run(rehearsal, "plan") or {}
    findings = report.get("findings") or []
    blockers = [
        f"{row['check']}: {row['message']} Remedy: {row['remedy']}" for row in findings if row["level"] == "refusal"
    ]
    if not blockers and report.get("outcome") != "planned":
        blockers = [f"Its dry {explain_run(report.get('outcome'), rehearsal)} Remedy: see that run."]
    return member.model_copy(
        update={
            "blockers": tuple(blockers),
            "warnings": sum(row["level"] == "warning" for row in findings),
            "after": (planned.get("after") or {}).get("bucket", ""),
            "fingerprint": planned.get("target_fingerprint", ""),
            "clients": len(planned.get("mount_pods") or ()),
            "missing": planned.get("missing_objects"),
        }
    )


@runbook_task(kind="branch")
def choose_path() -> str:
    """End a dry run here; continue a real run, through approval where it is required.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    planned = approved_plan()
    require_second_person(asked=planned.params.require_approval)
    if planned.params.dry_run or not planned.waves:
        return "finalize"
    return "approve" if planned.params.require_approval else "start_canary"


@task_group(prefix_group_id=False, tooltip="A dry run of juicefs_storage_switch for each volume")
def dry_runs(volume: str) -> None:
    """Start a volume's dry run, and wait for its end."""
    start_dry_run(volume=volume) >> wait_for_dry_run(volume=volume)

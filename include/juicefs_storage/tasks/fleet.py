"""A fleet of volumes: found, rehearsed, approved together, then moved in waves, each volume by a run of its own."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn

from airflow.sdk import Context, PokeReturnValue, TriggerRule, get_current_context, task_group
from airflow.sdk.exceptions import AirflowRescheduleException, AirflowSkipException, DagRunTriggerException
from pydantic import SecretStr

from include.juicefs_storage.core.backup import FLEET_PREFIX
from include.juicefs_storage.core.copying import missing_blocks
from include.juicefs_storage.core.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.core.fleet import (
    MEANING,
    SWITCH,
    FleetOutcome,
    FleetParams,
    FleetPlan,
    Member,
    Standing,
    VolumeEnd,
    check_fleet_params,
    explain_run,
    fleet_markdown,
    found_volume,
    make_waves,
    on_endpoint,
    registered_volume,
    run_of,
    stands,
    unique_keys,
    volumes_by_secret,
    waves_ahead,
    whose_turn,
)
from include.juicefs_storage.core.params import SwitchParams
from include.juicefs_storage.core.plan import Plan, StorageView, fingerprint
from include.juicefs_storage.core.ports import SecretObject
from include.juicefs_storage.core.proofs import prove_clients, prove_no_restarts, require_all_blocks
from include.juicefs_storage.core.setting import Setting, StorageConfig
from include.juicefs_storage.core.steps import RestartCsi
from include.juicefs_storage.tasks.check import PlanApproval
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.runtime import (
    Runtime,
    log,
    missing_connections_explained,
    open_vault,
    pull,
    push,
    read_registry,
    run_id,
    runbook_task,
    task_states,
)

#: How often a volume's run, and a volume after it, is looked at, in seconds.
POLL_S = 15
_ACTIVE = ["queued", "running"]
_PARALLEL_SETTINGS = 8
_LONGEST_WAIT_S = 14 * 86400


@runbook_task
def resolve_params() -> dict[str, Any]:
    """Validate the params of the fleet.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    return check_fleet_params(dict(get_current_context()["params"])).model_dump(mode="json")


def fleet_params() -> FleetParams:
    """The params of this run, as its first task validated them."""
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
    """The volumes of a fleet. One that cannot be read, or told, is blocked: none is passed over in silence."""
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
    """The volume of a Secret, where it is one of the fleet's."""
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
            endpoint, name = _place(setting.storage, setting.bucket)
            if not on_endpoint(endpoint, params.source_endpoint or ""):
                return None
            return _member(Runtime(found_volume(params, registry, secret.name, name)), setting, where)
    except StorageSwitchError as error:
        if _is_elsewhere(secret, params):
            log.warning("Left out: Secret %s, which names another store. %s", where, error)
            return None
        key = re.sub(r"[^A-Za-z0-9_-]+", "-", secret.data["name"])
        return Member(key=key, secret=where, before=bucket, blockers=(_blocker(error),))


def _place(storage: str, bucket: str) -> tuple[str, str]:
    """Endpoint and bucket's name; no key is needed for that."""
    return StorageConfig(storage, bucket, SecretStr(""), SecretStr("")).endpoint_and_bucket


def _is_elsewhere(secret: SecretObject, params: FleetParams) -> bool:
    """Whether a Secret itself names another store than the fleet's; False where it names none, or cannot be read."""
    try:
        endpoint, _ = _place(secret.data.get("storage", ""), secret.data.get("bucket", ""))
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
    rehearsal = run_of(run_id(), volume, dry_run=True)
    if not exists(rehearsal):
        member = next(Member.model_validate(row) for row in pull("find_volumes", "members") if row["key"] == volume)
        trigger(rehearsal, member.conf(dry_run=True, restart_csi=fleet_params().restart_csi))


@runbook_task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS, retries=3)
def start_canary() -> None:
    """Start the run of `juicefs_storage_switch` that moves the canary, once.

    **Changes** nothing by itself; the run does. **Safe to clear**: yes, it finds the run that it started.
    """
    planned = approved_plan()
    start_run(planned, planned.keys[0])


@runbook_task(map_index_template="{{ task.op_kwargs['volume'] }}", retries=3)
def start(volume: str) -> None:
    """Start the run of `juicefs_storage_switch` that moves the volume, once, when it is its wave's turn.

    With `on_failure=stop` not after a failure: it is skipped then. Holds no worker slot while it waits.
    **Changes** nothing by itself; the run does. **Safe to clear**: yes, it finds the run that it started.
    """
    start_run(approved_plan(), volume)


def start_run(planned: FleetPlan, key: str) -> None:
    """Start the run that moves a volume, wait for its turn, or find that the run is there already."""
    own = run_of(planned.run_id, key)
    if exists(own):
        return
    standing, mine = standings(planned), planned.wave_of(key)
    others = [run_of(planned.run_id, other) for other in planned.keys if planned.wave_of(other) != mine]
    running = bool(others) and exists(*others, states=_ACTIVE)
    turn = whose_turn(planned.waves, key, standing, running=running, on_failure=planned.params.on_failure)
    if turn == "stop":
        raise AirflowSkipException("A volume of this fleet failed, and on_failure=stop.")
    if turn == "wait":
        # Those who come much later ask less often.
        later = timedelta(seconds=POLL_S * max(1, waves_ahead(planned.waves, key, standing)))
        raise AirflowRescheduleException(datetime.now(UTC) + later)  # type: ignore[no-untyped-call]
    member = planned.member(key)
    require_as_approved(member)
    record_plan(planned)
    # Restarted beside other runs the components would cut off what these run in them: the fleet does it at its end.
    trigger(own, member.conf(dry_run=False, restart_csi=planned.params.restart_csi and mine == 0))


def exists(*volume_runs: str, states: Sequence[str] | None = None) -> bool:
    """Whether one of these runs is there, where wanted in one of these states."""
    ti: Any = get_current_context()["ti"]
    return bool(ti.get_dr_count(dag_id=SWITCH, run_ids=list(volume_runs), states=states))


def trigger(volume_run: str, conf: dict[str, Any]) -> NoReturn:
    """Start a run of `juicefs_storage_switch`; ends the task.

    This is what TriggerDagRunOperator raises. Its module imports the tables of Airflow's database, which would take
    longer than all that a DAG file may.

    Raises:
        NeedsHumanError: The DAG is paused: the run would wait for ever.
    """
    ti: Any = get_current_context()["ti"]
    if ti.get_dag(SWITCH).is_paused:
        raise NeedsHumanError(
            f"DAG {SWITCH} is paused.", state="no run was started", next_step="unpause it, then clear this task"
        )
    raise DagRunTriggerException(
        trigger_dag_id=SWITCH, dag_run_id=volume_run, conf=conf, reset_dag_run=False, skip_when_already_exists=False,
        wait_for_completion=False, allowed_states=[], failed_states=[], poke_interval=0, deferrable=False,
    )  # fmt: skip


def require_as_approved(member: Member) -> None:
    """The volume, and what its target's connection says, are what the plan showed.

    Raises:
        NeedsHumanError: They are not.
    """
    runtime = Runtime(SwitchParams.model_validate(member.params))
    setting = runtime.setting()
    now = (setting.uuid, setting.bucket, fingerprint(runtime.target(setting), runtime.vault.key))
    if now != (member.uuid, member.before, member.fingerprint):
        raise NeedsHumanError(
            f"Volume {member.key} was to be moved from {member.before} to {member.after}; since the plan was made the "
            f"volume, or connection {runtime.params.target_conn_id!r}, changed: it is on {setting.bucket}.",
            state="this volume was not touched",
            next_step="start a new run, so that the plan shows what will be done",
        )


@runbook_task(
    kind="sensor", mode="reschedule", poke_interval=POLL_S, timeout=_LONGEST_WAIT_S,
    map_index_template="{{ task.op_kwargs['volume'] }}",
)  # fmt: skip
def wait_for_dry_run(volume: str) -> PokeReturnValue:
    """Wait for the end of a volume's dry run, however it ends: the plan judges it. Holds no worker slot.

    **Changes** nothing. **Safe to clear**: yes.
    """
    return PokeReturnValue(is_done=run_state(run_of(run_id(), volume, dry_run=True)) not in _ACTIVE)


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
            f"{len(planned.blocked)} of {len(planned.members)} volumes are blocked:\n{lines}",
            state="nothing was changed",
            next_step="remove what blocks them, leave them out with `exclude`, or trigger with on_failure=continue",
        )
    return planned.model_dump(mode="json")


def make_plan(params: FleetParams, members: list[Member]) -> FleetPlan:
    """The waves of those that are ready."""
    ready = [member for member in members if member.ready]
    waves = make_waves(ready, params.canary, params.wave_size)
    return FleetPlan(run_id=run_id(), params=params, members=tuple(members), waves=waves)


def judge(member: Member) -> Member:
    """What a volume's dry run found."""
    if not member.params or member.there:
        return member
    rehearsal = run_of(run_id(), member.key, dry_run=True)
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
    """A dry run ends here; a real run goes on, through approval where it is required.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    planned = approved_plan()
    if planned.params.dry_run or not planned.waves:
        return "finalize"
    return "approve" if planned.params.require_approval else "start_canary"


class CanaryApproval(PlanApproval):
    """Approval between the canary and the others, where it is wanted and there are others."""

    rejected = "The others were not approved: the canary stays moved, nothing else was touched."

    def execute(self, context: Context) -> Any:
        """Ask, or go on at once."""
        planned = approved_plan()
        if not planned.params.approve_after_canary or len(planned.waves) < 2:
            return None
        return super().execute(context)


def approve_rest() -> PlanApproval:
    """The second human gate: shows how the canary fared."""
    return CanaryApproval(
        task_id="approve_rest",
        subject="The canary was moved and is well. Move the others?",
        body="{{ ti.xcom_pull(task_ids='watch_canary', key='markdown') }}",
        defaults="Reject",
        fail_on_reject=True,
        response_timeout=timedelta(hours=24),
        notifiers=[Notify("waits for approval after the canary", told_by="watch_canary")],
        doc_md="After the canary: wait for a human, unless `approve_after_canary` is off. A rejection, or no answer "
        "within 24 hours, ends the run failed; the canary stays moved. **Changes** nothing. **Safe to clear**: yes.",
    )


_WATCH: dict[str, Any] = {"kind": "sensor", "mode": "reschedule", "poke_interval": POLL_S, "timeout": _LONGEST_WAIT_S}


@runbook_task(**_WATCH, retries=3)
def watch_canary() -> PokeReturnValue:
    """Follow the canary's run to its end, then watch the volume for `soak_s`; holds no worker slot.

    **Changes** nothing; a small file is written through each mount and removed. **Safe to clear**: yes.
    """
    planned = approved_plan()
    return watch_volume(planned, planned.keys[0])


@runbook_task(**_WATCH, retries=3, map_index_template="{{ task.op_kwargs['volume'] }}")
def watch(volume: str) -> PokeReturnValue:
    """Follow the volume's run to its end, then watch the volume for `soak_s`; holds no worker slot.

    **Changes** nothing; a small file is written through each mount and removed. **Safe to clear**: yes.
    """
    return watch_volume(approved_plan(), volume)


def watch_volume(planned: FleetPlan, key: str) -> PokeReturnValue:
    """Look at a volume once: its run, then its clients and pods, and its blocks at the end of the soak.

    Raises:
        PermanentError: The run did not move it.
        StorageSwitchError: It is not well any more.
    """
    own = run_of(planned.run_id, key)
    state = run_state(own)
    if state in _ACTIVE:
        return PokeReturnValue(is_done=False)
    outcome = (pull_of_run(own, "finalize", "report") or {}).get("outcome")
    if state != "success" or outcome != "switched":
        raise PermanentError(
            f"Volume {key} was not moved: {explain_run(outcome, own)}",
            state="the other volumes are as they were",
            next_step="see that run; where clearing it there has moved the volume, clear this task with Downstream",
        )
    moved_at = datetime.fromisoformat(pull_of_run(own, "finalize", "timing")["applied_at"])
    soaked = datetime.now(UTC) >= moved_at + timedelta(seconds=planned.params.soak_s)
    member, carried_out = planned.member(key), Plan.model_validate(pull_of_run(own, "plan"))
    if carried_out.target_fingerprint != member.fingerprint:
        raise NeedsHumanError(
            f"Volume {key} was moved to {carried_out.after.bucket}, which is not what the fleet's plan showed: the "
            "connection of the new store changed right as its run began.",
            state=f"the volume is on {carried_out.after.bucket}",
            next_step="look at the connection; juicefs_storage_revert takes the volume back",
        )
    health = examine(member, carried_out, f"{planned.run_id}.{key}", blocks=soaked)
    if soaked:
        ends = [VolumeEnd(key=key, wave="", state="moved", detail=well(health), run_id=own)]
        push("markdown", fleet_markdown(f"Volume `{key}` is moved", "Its run, and how it fared since.", ends))
    return PokeReturnValue(is_done=soaked, xcom_value=health if soaked else None)


def well(health: dict[str, Any]) -> str:
    """What was proven, in a line."""
    return f"{health['clients']} clients proven, no restarts, all {health['blocks']} blocks there"


def examine(member: Member, carried_out: Plan, salt: str, *, blocks: bool) -> dict[str, Any]:
    """Prove that a volume that was moved is well: it is where it was moved, with its clients, no pod restarted.

    Args:
        member: The volume.
        carried_out: The plan of its run.
        salt: Makes the name of the file that is written through each mount and removed.
        blocks: Prove by the metadata, too, that no block is missing.

    Raises:
        StorageSwitchError: It is not, or that cannot be found out.
    """
    runtime = Runtime(SwitchParams.model_validate(member.params))
    setting = runtime.setting()
    config = runtime.source(setting)
    if StorageView.of(config) != carried_out.after:
        raise NeedsHumanError(
            f"Volume {member.key} was moved to {carried_out.after.bucket}; the setting now names {setting.bucket}, or "
            "other keys.",
            state="this task changed nothing",
            next_step="find out who moved it since",
        )
    canary = f".storage-switch-{hashlib.sha256(salt.encode()).hexdigest()[:12]}"
    proofs = prove_clients(
        runtime.cluster, setting, config, runtime.target_store, canary,
        timeout_s=runtime.params.client_timeout_s, clock=time.monotonic, sleep=time.sleep,
    )  # fmt: skip
    prove_no_restarts(runtime.cluster, carried_out)
    health: dict[str, Any] = {"clients": len(proofs)}
    if blocks:
        difference = missing_blocks(runtime.metadata, setting, runtime.target_store)
        require_all_blocks(difference, config.bucket, runtime.metadata)
        health["blocks"] = difference.expected
    return health


@runbook_task
def later_volumes() -> list[str]:
    """The volumes after the canary, in the order of their waves.

    **Changes** nothing. **Safe to clear**: yes, with Downstream.
    """
    return approved_plan().keys[1:]


@runbook_task(trigger_rule=TriggerRule.ALL_DONE)
def restart_csi() -> dict[str, Any]:
    """Restart the CSI components once for all waves; the canary's run has done so for itself.

    **Changes** the pod templates' annotation; mounts do not notice. **Safe to clear**: yes.
    """
    planned = planned_or_none()
    places = _places(planned) if planned and planned.params.restart_csi else {}
    if not places:
        raise AirflowSkipException("No volume was moved after the canary, or restart_csi is off.")
    return {where: RestartCsi(runtime.cluster, run_id()).apply() for where, runtime in places.items()}


@runbook_task(kind="sensor", mode="reschedule", poke_interval=3, timeout=7300)
def wait_for_rollouts() -> PokeReturnValue:
    """Wait until the restarts are done; holds no worker slot.

    **Changes** nothing. **Safe to clear**: yes.
    """
    planned, timing = approved_plan(), pull("restart_csi", "timing")
    waiting = [line for runtime in _places(planned).values() for line in RestartCsi(runtime.cluster, run_id()).verify()]
    waited_s = (datetime.now(UTC) - datetime.fromisoformat(timing["applied_at"])).total_seconds()
    if waiting and waited_s > planned.params.rollout_timeout_s:
        raise PermanentError(
            f"Rollouts not done {waited_s:.0f} s after the restart: {'; '.join(waiting)}.",
            state="the volumes are moved, the existing mounts go on",
            next_step=f"kubectl -n {planned.params.namespace} get pods; then clear this task with Downstream",
        )
    return PokeReturnValue(is_done=not waiting, xcom_value=None if waiting else {"waited_s": round(waited_s, 1)})


def _places(planned: FleetPlan) -> dict[str, Runtime]:
    """The CSI installations of the volumes that were moved after the canary."""
    standing = standings(planned)
    moved = [planned.member(key) for key in planned.keys[1:] if standing[key] == "moved"]
    runtimes = [Runtime(SwitchParams.model_validate(member.params)) for member in moved]
    return {f"{runtime.params.kubernetes_conn_id}/{runtime.params.namespace}": runtime for runtime in runtimes}


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, retries=0)
def finalize() -> dict[str, Any]:
    """Write the table of the volumes and their states; fail unless every one is on the new store and well.

    **Changes** nothing. **Safe to clear**: yes. The report stands in XCom `report`, as Markdown in `markdown`,
    in a line in `note`.
    """
    planned, states = planned_or_none(), task_states("plan", "approve", "restart_csi", "wait_for_rollouts")
    standing = standings(planned) if planned else {}
    ends = [_end(planned, member, standing.get(member.key)) for member in planned.members] if planned else []
    outcome = _outcome(planned, states, ends)
    good = sum(end.state in {"moved", "already there"} for end in ends)
    title = f"{outcome.capitalize()}: {good} of {len(ends)} volumes are on the new store"
    push("report", {"outcome": outcome, "volumes": {end.key: end.state for end in ends}})
    push("markdown", fleet_markdown(title, MEANING[outcome], ends))
    push("note", f"{title[0].lower()}{title[1:]}.")
    if outcome not in {"moved", "planned"}:
        lines = "\n".join(f"- {end.key}: {end.state}. {end.detail}" for end in ends)
        raise PermanentError(f"{title}. {MEANING[outcome]}\n{lines}")
    return {"outcome": outcome}


def _outcome(planned: FleetPlan | None, states: dict[str, str], ends: list[VolumeEnd]) -> FleetOutcome:
    if planned is None or states["plan"] != "success":
        return "refused"
    if planned.params.dry_run:
        return "planned" if not planned.blocked else "refused"
    if states["approve"] in {"failed", "upstream_failed"}:
        return "rejected"
    bad_restart = "failed" in {states["restart_csi"], states["wait_for_rollouts"]}
    if all(end.state in {"moved", "already there"} for end in ends) and not bad_restart:
        return "moved"
    return "stopped" if any(end.state == "not started" for end in ends) else "incomplete"


def _end(planned: FleetPlan, member: Member, standing: Standing | None) -> VolumeEnd:
    """What became of a volume."""
    number, own = planned.wave_of(member.key), run_of(planned.run_id, member.key)
    if number is None:
        state, detail = ("already there", "") if member.there else ("blocked", " ".join(member.blockers))
        return VolumeEnd(key=member.key, wave="", state=state, detail=detail)
    wave = str(number or "canary")
    if standing in {"left out", "waits"}:
        return VolumeEnd(key=member.key, wave=wave, state="not started")
    outcome = (pull_of_run(own, "finalize", "report") or {}).get("outcome")
    if standing == "moved":
        state, detail = ("moved", "") if _is_on_target(member) else ("moved on", "it is elsewhere now: look")
    elif outcome == "switched":
        state, detail = "not well", "it was moved, and something is wrong since: see the log of its `watch`"
    else:
        state, detail = outcome or "failed", "" if outcome else "see the logs of its tasks here, and its run"
    return VolumeEnd(key=member.key, wave=wave, state=state, detail=detail, run_id=own)


def _is_on_target(member: Member) -> bool:
    try:
        with missing_connections_explained():
            return Runtime(SwitchParams.model_validate(member.params)).setting().bucket == member.after
    except StorageSwitchError:
        log.exception("Where volume %s is now could not be found out.", member.key)
        return False


def approved_plan() -> FleetPlan:
    """What was planned, and approved where approval is required.

    Raises:
        PermanentError: There is no plan.
    """
    found = pull("plan")
    if not found:
        raise PermanentError("This run has no plan.", next_step="clear plan with Downstream")
    return FleetPlan.model_validate(found)


def planned_or_none() -> FleetPlan | None:
    """What was planned, also where it was refused."""
    found = pull("plan", "planned")
    return FleetPlan.model_validate(found) if found else None


def _record_name() -> str:
    return f"{FLEET_PREFIX}{re.sub(r'[^A-Za-z0-9._-]+', '-', run_id())}"


def record_plan(planned: FleetPlan) -> None:
    """Keep the plan beside the backups before the first volume is touched: XComs go when their task is cleared."""
    vault = open_vault()
    if vault.load(_record_name()) is None:
        vault.save(_record_name(), planned.model_dump_json().encode())


def recorded_plan() -> FleetPlan | None:
    """The plan that this run has begun to carry out; None where it has not."""
    found = open_vault().load(_record_name())
    return FleetPlan.model_validate_json(found) if found else None


def run_state(volume_run: str) -> str:
    """The state of a volume's run."""
    ti: Any = get_current_context()["ti"]
    state = ti.get_dagrun_state(SWITCH, volume_run)
    # A plain string in the type hints, a member of an enum in fact.
    return str(getattr(state, "value", state))


def pull_of_run(volume_run: str, task_id: str, key: str = "return_value") -> Any:
    """An XCom of a volume's run; None where there is none."""
    ti: Any = get_current_context()["ti"]
    return ti.xcom_pull(dag_id=SWITCH, run_id=volume_run, task_ids=task_id, key=key)


def standings(planned: FleetPlan) -> dict[str, Standing]:
    """Where every volume stands, by the states of this run's tasks."""
    context = get_current_context()
    tasks = ["start_canary", "watch_canary", "start", "watch"]
    found = context["ti"].get_task_states(dag_id=context["dag"].dag_id, task_ids=tasks, run_ids=[run_id()])
    states = {task: str(state or "none") for task, state in found.get(run_id(), {}).items()}
    standing: dict[str, Standing] = {}
    for number, key in enumerate(planned.keys):
        # As long as it is not known how many there are, Airflow has one instance without an index for all.
        names = (f"{{}}_{number - 1}", "{}") if number else ("{}_canary",)
        start, end = (
            next((states[name.format(task)] for name in names if name.format(task) in states), "none")
            for task in ("start", "watch")
        )
        standing[key] = stands(start, end)
    return standing


@task_group(prefix_group_id=False, tooltip="A dry run of juicefs_storage_switch for each volume")
def dry_runs(volume: str) -> None:
    """Start a volume's dry run, and wait for its end."""
    start_dry_run(volume=volume) >> wait_for_dry_run(volume=volume)


@task_group(prefix_group_id=False, tooltip="A run of juicefs_storage_switch for each volume, wave by wave")
def waves(volume: str) -> None:
    """Start a volume's run when it is its wave's turn, then watch it."""
    start(volume=volume) >> watch(volume=volume)

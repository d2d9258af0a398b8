"""A fleet that was planned: moved in waves, each volume by a run of its own, watched, and judged."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import Context, PokeReturnValue, TriggerRule, get_current_context, task_group
from airflow.sdk.exceptions import AirflowRescheduleException, AirflowSkipException

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError
from include.juicefs_storage.fleet.members import Member
from include.juicefs_storage.fleet.plan import FleetPlan
from include.juicefs_storage.fleet.report import FLEET_MEANING, FleetOutcome, VolumeEnd, explain_run, fleet_markdown
from include.juicefs_storage.fleet.turns import VolumeState, volume_state, waves_ahead, whose_turn
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.names import volume_run_id
from include.juicefs_storage.switch.params import SwitchParams
from include.juicefs_storage.switch.plan import Plan, StorageView, has_fingerprint
from include.juicefs_storage.switch.prove_blocks import blocks_there, require_all_blocks
from include.juicefs_storage.switch.prove_clients import prove_every_client
from include.juicefs_storage.switch.prove_no_restarts import compare_pods
from include.juicefs_storage.switch.restart_csi import RestartCsi
from include.juicefs_storage.tasks.approval import GATE, PlanApproval
from include.juicefs_storage.tasks.context import log, push, run_id, task_states, why_it_failed
from include.juicefs_storage.tasks.fleet.runs import (
    ACTIVE,
    LONGEST_WAIT_S,
    POLL_S,
    approved_plan,
    exists,
    planned_or_none,
    pull_of_run,
    record_plan,
    run_state,
    trigger,
)
from include.juicefs_storage.tasks.notify import Notify
from include.juicefs_storage.tasks.runbook import runbook_task
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.rollouts import rollouts_done
from include.juicefs_storage.volume.canary import Move, canary_name
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.difference import missing_blocks

_WATCH: dict[str, Any] = {"kind": "sensor", "mode": "reschedule", "poke_interval": POLL_S, "timeout": LONGEST_WAIT_S}


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
    own = volume_run_id(planned.run_id, key)
    if exists(own):
        return
    volumes, mine = volume_states(planned), planned.wave_of(key)
    others = [volume_run_id(planned.run_id, other) for other in planned.keys if planned.wave_of(other) != mine]
    running = bool(others) and exists(*others, states=ACTIVE)
    turn = whose_turn(planned.waves, key, volumes, running=running, on_failure=planned.params.on_failure)
    if turn == "stop":
        raise AirflowSkipException("A volume of this fleet failed, and on_failure=stop.")
    if turn == "wait":
        # Those who come much later ask less often.
        later = timedelta(seconds=POLL_S * max(1, waves_ahead(planned.waves, key, volumes)))
        raise AirflowRescheduleException(datetime.now(UTC) + later)  # type: ignore[no-untyped-call]
    member = planned.member(key)
    require_as_approved(member)
    record_plan(planned)
    # Restarted beside other runs the components would cut off what these run in them: the fleet does it at its end.
    trigger(own, member.conf(dry_run=False, restart_csi=planned.params.restart_csi and mine == 0))


def require_as_approved(member: Member) -> None:
    """Require that the volume, and its target's connection, are still what the plan showed.

    Raises:
        NeedsHumanError: They are not.
    """
    runtime = Runtime(SwitchParams.model_validate(member.params))
    setting = runtime.setting()
    same_target = has_fingerprint(runtime.target(setting), member.fingerprint, runtime.vault.keys)
    if (setting.uuid, setting.bucket) != (member.uuid, member.before) or not same_target:
        raise NeedsHumanError(
            f"Volume {member.key} was to be moved from {member.before} to {member.after}; since the plan was made the "
            f"volume, or connection {runtime.params.target_conn_id!r}, changed: it is on {setting.bucket}.",
            state="this volume was not touched",
            next_step="start a new run, so that the plan shows what will be done",
        )


class CanaryApproval(PlanApproval):
    """Approval between the canary and the others, where it is wanted and there are others."""

    rejected = "The others were not approved: the canary stays moved, nothing else was touched."

    def execute(self, context: Context) -> Any:
        """Ask, or continue at once."""
        planned = approved_plan()
        if not planned.params.approve_after_canary or len(planned.waves) < 2:
            return None
        return super().execute(context)


def approve_rest() -> PlanApproval:
    """Ask the second human gate: show how the canary fared."""
    return CanaryApproval(
        task_id="approve_rest",
        subject="The canary was moved and is well. Move the others?",
        body="{{ ti.xcom_pull(task_ids='watch_canary', key='markdown') }}",
        **GATE,
        notifiers=[Notify("waits for approval after the canary", source="watch_canary")],
        doc_md="After the canary: wait for a human, unless `approve_after_canary` is off. A rejection, or no answer "
        "within 24 hours, ends the run failed; the canary stays moved. **Changes** nothing. **Safe to clear**: yes.",
    )


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
    own = volume_run_id(planned.run_id, key)
    state = run_state(own)
    if state in ACTIVE:
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
    if not _same_target(member, carried_out):
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


def _same_target(member: Member, carried_out: Plan) -> bool:
    """Return whether a volume's run moved it to what the fleet's plan showed; the key may have been rotated between."""
    if carried_out.target_fingerprint == member.fingerprint:
        return True
    runtime = Runtime(SwitchParams.model_validate(member.params))
    config, keys = runtime.source(runtime.setting()), runtime.vault.keys
    return all(has_fingerprint(config, found, keys) for found in (member.fingerprint, carried_out.target_fingerprint))


def well(health: dict[str, Any]) -> str:
    """Say what was proven, in a line."""
    blocks = blocks_there(health["blocks"], health.get("lost_before", 0))
    return f"{health['clients']} clients proven, no restarts, {blocks} there"


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
    pods = runtime.volume_pods(setting)
    proofs = prove_every_client(
        pods, Move(config, runtime.target_store), canary_name(salt),
        timeout_s=runtime.params.client_timeout_s, clock=time.monotonic, sleep=time.sleep,
    )  # fmt: skip
    compare_pods(pods, carried_out).require_no_restarts()
    health: dict[str, Any] = {"clients": len(proofs)}
    if blocks:
        difference = missing_blocks(runtime.metadata, setting, runtime.target_store, frozenset(carried_out.lost_blocks))
        require_all_blocks(difference, config.bucket, runtime.metadata)
        health |= {"blocks": difference.present, "lost_before": difference.lost}
    return health


@runbook_task
def later_volumes() -> list[str]:
    """List the volumes after the canary, in the order of their waves.

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
    return {where: RestartCsi(cluster, run_id()).apply() for where, cluster in places.items()}


@runbook_task(kind="sensor", mode="reschedule", poke_interval=3, timeout=7300)
def wait_for_rollouts() -> PokeReturnValue:
    """Wait until the restarts are done; holds no worker slot.

    **Changes** nothing. **Safe to clear**: yes.
    """
    planned = approved_plan()
    return rollouts_done(list(_places(planned).values()), "restart_csi", planned.params.rollout_timeout_s)


def _places(planned: FleetPlan) -> dict[str, Clusters]:
    """List the CSI installations of the volumes that were moved after the canary."""
    volumes = volume_states(planned)
    moved = [planned.member(key) for key in planned.keys[1:] if volumes[key] == "moved"]
    runtimes = [Runtime(SwitchParams.model_validate(member.params)) for member in moved]
    places: dict[str, Clusters] = {}
    for runtime in runtimes:
        conn_ids = [runtime.params.kubernetes_conn_id, *runtime.params.more_kubernetes_conn_ids]
        for conn_id, cluster in zip(conn_ids, runtime.clusters.each.values(), strict=True):
            places[f"{conn_id}/{runtime.params.namespace}"] = Clusters(cluster)
    return places


@runbook_task(trigger_rule=TriggerRule.ALL_DONE, retries=0)
def finalize() -> dict[str, Any]:
    """Write the table of the volumes and their states; fail unless every one is on the new store and well.

    **Changes** nothing. **Safe to clear**: yes. The report stands in XCom `report`, as Markdown in `markdown`,
    in a line in `note`.
    """
    planned, states = planned_or_none(), task_states("plan", "approve", "restart_csi", "wait_for_rollouts")
    volumes = volume_states(planned) if planned else {}
    ends = [_end(planned, member, volumes.get(member.key)) for member in planned.members] if planned else []
    outcome = _outcome(planned, states, ends)
    good = sum(end.state in {"moved", "already there"} for end in ends)
    title = f"{outcome.capitalize()}: {good} of {counted(len(ends), 'volume')} on the new store"
    meaning = FLEET_MEANING[outcome]
    if not ends:
        title, meaning = (
            "Refused: no volume was found",
            "Nothing was changed. See the log of the task that failed first.",
        )
    push("report", {"outcome": outcome, "volumes": {end.key: end.state for end in ends}})
    failed = why_it_failed() if outcome not in {"moved", "planned"} else []
    push("markdown", fleet_markdown(title, meaning, ends, failed))
    push("note", f"{title[0].lower()}{title[1:]}.")
    if outcome not in {"moved", "planned"}:
        lines = "\n".join(f"- {end.key}: {end.state}. {end.detail}" for end in ends)
        raise PermanentError(f"{title}. {meaning}\n{lines}")
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


def _end(planned: FleetPlan, member: Member, state_here: VolumeState | None) -> VolumeEnd:
    """Say what became of a volume."""
    number, own = planned.wave_of(member.key), volume_run_id(planned.run_id, member.key)
    if number is None:
        state, detail = ("already there", "") if member.there else ("blocked", " ".join(member.blockers))
        return VolumeEnd(key=member.key, wave="", state=state, detail=detail)
    wave = str(number or "canary")
    if state_here in {"left out", "waits"}:
        return VolumeEnd(key=member.key, wave=wave, state="not started")
    outcome = (pull_of_run(own, "finalize", "report") or {}).get("outcome")
    if state_here == "moved":
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


def volume_states(planned: FleetPlan) -> dict[str, VolumeState]:
    """Return the state of every volume, by the states of this run's tasks."""
    context = get_current_context()
    tasks = ["start_canary", "watch_canary", "start", "watch"]
    found = context["ti"].get_task_states(dag_id=context["dag"].dag_id, task_ids=tasks, run_ids=[run_id()])
    states = {task: str(state or "none") for task, state in found.get(run_id(), {}).items()}
    volumes: dict[str, VolumeState] = {}
    for number, key in enumerate(planned.keys):
        # As long as it is not known how many there are, Airflow has one instance without an index for all.
        names = (f"{{}}_{number - 1}", "{}") if number else ("{}_canary",)
        start, end = (
            next((states[name.format(task)] for name in names if name.format(task) in states), "none")
            for task in ("start", "watch")
        )
        volumes[key] = volume_state(start, end)
    return volumes


@task_group(prefix_group_id=False, tooltip="A run of juicefs_storage_switch for each volume, wave by wave")
def waves(volume: str) -> None:
    """Start a volume's run when it is its wave's turn, then watch it."""
    start(volume=volume) >> watch(volume=volume)

"""What a fleet's tasks do by the states of its volumes' runs: start once, wait, stop, and tell the truth at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.api.datamodels._generated import DagRunState
from airflow.sdk.exceptions import (
    AirflowFailException,
    AirflowRescheduleException,
    AirflowSkipException,
    DagRunTriggerException,
)
from airflow.sdk.execution_time.context import set_current_context

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.fleet.members import Member
from include.juicefs_storage.fleet.params import FleetParams
from include.juicefs_storage.fleet.plan import FleetPlan, make_waves
from include.juicefs_storage.switch.params import SwitchParams
from include.juicefs_storage.switch.plan import fingerprint
from include.juicefs_storage.tasks.fleet import plan, runs, waves
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from tests.support import fakes
from tests.support.fakes import NEW, OLD, FakeVault

RUN = "manual__2026-11-23T12:00:00+00:00"
KEYS = ("a", "b", "c", "d")
TASKS = (
    "plan",
    "approve",
    "start_canary",
    "watch_canary",
    "start",
    "watch",
    "restart_csi",
    "wait_for_rollouts",
    "finalize",
)


class TaskInstance:
    """What the tasks ask of Airflow: XComs of this run and of others, states of tasks and runs."""

    def __init__(self) -> None:
        self.xcoms: dict[tuple[str, str, str], Any] = {}
        self.tasks: dict[str, str] = {}
        self.runs: dict[str, str] = {}
        self.paused = False

    def xcom_push(self, key: str, value: Any) -> None:
        self.xcoms[RUN, "self", key] = value

    def xcom_pull(
        self, *, task_ids: str, key: str = "return_value", run_id: str = RUN, dag_id: str = "", map_indexes: int = -1
    ) -> Any:
        assert (run_id == RUN) == (not dag_id)
        if map_indexes >= 0:
            return self.xcoms.get((run_id, f"{task_ids}_{map_indexes}", key))
        return self.xcoms.get((run_id, task_ids, key))

    def get_task_states(self, *, task_ids: list[str], run_ids: list[str], dag_id: str) -> dict[str, dict[str, str]]:
        assert dag_id == "juicefs_storage_fleet"
        found = {task: state for task, state in self.tasks.items() if task in task_ids or task[:-2] in task_ids}
        return {run_ids[0]: found}

    def get_dr_count(self, *, dag_id: str, run_ids: list[str], states: list[str] | None) -> int:
        assert dag_id == "juicefs_storage_switch"
        return sum(run in self.runs and (states is None or self.runs[run] in states) for run in run_ids)

    def get_dagrun_state(self, dag_id: str, run_id: str) -> DagRunState:
        assert dag_id == "juicefs_storage_switch"
        return DagRunState(self.runs[run_id])

    def get_dag(self, dag_id: str) -> Any:
        assert dag_id == "juicefs_storage_switch"
        return SimpleNamespace(is_paused=self.paused)


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch) -> FakeVault:
    kept = FakeVault()
    monkeypatch.setattr(runs, "open_vault", lambda: kept)
    return kept


class Moved:
    """The adapters of a volume's run; the key of the backups was rotated since its plan was made."""

    vault = SimpleNamespace(keys=(b"new key", b"old key"))

    def __init__(self, params: SwitchParams) -> None:
        self.params = params

    def setting(self) -> Setting:
        return fakes.setting(OLD)

    def source(self, row: Setting) -> StorageConfig:
        return row.config

    def target(self, row: Setting) -> StorageConfig:
        return NEW


@pytest.mark.parametrize(("made_with", "refused"), [(b"new key", False), (b"old key", False), (b"lost", True)])
def test_a_plan_from_before_the_key_was_rotated_is_carried_out(
    made_with: bytes, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waves, "Runtime", Moved)
    params = {"target_conn_id": "new", "target_bucket": "data"}
    member = Member(
        key="a",
        secret="juicefs/a",
        uuid=fakes.UUID,
        before=OLD.bucket,
        fingerprint=fingerprint(NEW, made_with),
        params=params,
    )
    with pytest.raises(NeedsHumanError) if refused else nullcontext():
        waves.require_as_approved(member)


@pytest.mark.parametrize(("made_with", "same"), [((b"old key", b"new key"), True), ((b"old key", b"lost"), False)])
def test_a_run_is_the_planned_one_where_the_key_was_rotated_between(
    made_with: tuple[bytes, bytes], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waves, "Runtime", Moved)
    planned, carried = (fingerprint(OLD, key) for key in made_with)
    params = {"target_conn_id": "new", "target_bucket": "data"}
    member = Member(key="a", secret="juicefs/a", fingerprint=planned, params=params)
    assert waves._same_target(member, fakes.plan(target_fingerprint=carried)) is same


@pytest.fixture
def ti(vault: FakeVault, monkeypatch: pytest.MonkeyPatch) -> Iterator[TaskInstance]:
    """A run whose plan is a, then b and c, then d; nothing has begun. What needs a cluster agrees with the plan."""
    monkeypatch.setattr(waves, "require_as_approved", lambda member: None)
    monkeypatch.setattr(waves, "_is_on_target", lambda member: True)
    instance = TaskInstance()
    planned(instance)
    context: Any = {
        "ti": instance,
        "dag": SimpleNamespace(dag_id="juicefs_storage_fleet", task_ids=TASKS),
        "run_id": RUN,
        "params": {},
    }
    with set_current_context(context):
        yield instance


def planned(ti: TaskInstance, *more: Member, **given: Any) -> FleetPlan:
    params = FleetParams.validated(
        {"source_endpoint": "http://old:9000", "target_conn_id": "new", "wave_size": 2, "dry_run": False} | given
    )
    members = [Member(key=key, secret=f"juicefs/{key}", params={"target_bucket": "data"}, clients=1) for key in KEYS]
    turns = make_waves(members, None, params.wave_size)
    fleet = FleetPlan(run_id=RUN, params=params, members=(*members, *more), waves=turns)
    ti.xcoms[RUN, "plan", "return_value"] = ti.xcoms[RUN, "plan", "planned"] = fleet.model_dump(mode="json")
    ti.tasks["plan"] = "success"
    return fleet


def moved(ti: TaskInstance, *keys: str) -> None:
    for key in keys:
        ended(ti, key, "success", "switched", "success")


def ended(ti: TaskInstance, key: str, run: str, outcome: str | None, watch: str) -> None:
    number = KEYS.index(key)
    start, end = ("start_canary", "watch_canary") if number == 0 else (f"start_{number - 1}", f"watch_{number - 1}")
    ti.tasks |= {start: "success", end: watch}
    ti.runs[f"{RUN}.{key}"] = run
    ti.xcoms[f"{RUN}.{key}", "finalize", "report"] = {"outcome": outcome} if outcome else None


def test_a_run_is_started_with_its_own_id_and_asks_nobody(ti: TaskInstance, vault: FakeVault) -> None:
    with pytest.raises(DagRunTriggerException) as started:
        waves.start_canary.function()
    assert (started.value.trigger_dag_id, started.value.dag_run_id) == ("juicefs_storage_switch", f"{RUN}.a")
    assert started.value.conf == {
        "target_bucket": "data", "dry_run": False, "require_approval": False, "restart_csi": True,
    }  # fmt: skip
    assert list(vault.files) == ["_fleet.manual__2026-11-23T12-00-00-00-00"]

    moved(ti, "a")
    with pytest.raises(DagRunTriggerException) as started:
        waves.start.function("c")
    assert started.value.conf
    assert started.value.conf["restart_csi"] is False, "it would cut off what the runs beside it do"


def test_a_run_that_is_there_is_not_started_again(ti: TaskInstance) -> None:
    ti.runs[f"{RUN}.a"] = "failed"
    assert waves.start_canary.function() is None


def test_a_paused_dag_is_reported_instead_of_waited_for(ti: TaskInstance) -> None:
    ti.paused = True
    with pytest.raises(AirflowFailException, match="is paused"):
        waves.start_canary.function()


def test_a_later_wave_waits_without_a_slot_and_asks_less_often_the_later_it_is(ti: TaskInstance) -> None:
    ended(ti, "a", "running", None, "up_for_reschedule")
    waits = {}
    for key in "bd":
        with pytest.raises(AirflowRescheduleException) as waiting:
            waves.start.function(key)
        waits[key] = waiting.value.reschedule_date
    assert waits["d"] > waits["b"]


def test_a_run_of_another_wave_in_progress_is_waited_for(ti: TaskInstance) -> None:
    planned(ti, on_failure="continue")
    moved(ti, "a", "c")
    ended(ti, "b", "running", None, "failed")
    with pytest.raises(AirflowRescheduleException):
        waves.start.function("d")
    ti.runs[f"{RUN}.b"] = "failed"
    with pytest.raises(DagRunTriggerException):
        waves.start.function("d")


def test_after_a_failure_nobody_else_is_started(ti: TaskInstance) -> None:
    moved(ti, "a", "c")
    ended(ti, "b", "failed", "rolled back", "failed")
    with pytest.raises(AirflowSkipException):
        waves.start.function("d")


def test_a_volume_that_its_run_did_not_move_fails_the_watch_with_what_became_of_it(ti: TaskInstance) -> None:
    ended(ti, "b", "running", None, "none")
    assert waves.watch.function("b").is_done is False
    ended(ti, "b", "failed", "rolled back", "none")
    with pytest.raises(AirflowFailException, match="ended rolled back: A step failed; the volume is back"):
        waves.watch.function("b")
    ended(ti, "b", "failed", None, "none")
    with pytest.raises(AirflowFailException, match="ended without a report"):
        waves.watch.function("b")
    # A dry run ends green, and moves nothing.
    ended(ti, "b", "success", "planned", "none")
    with pytest.raises(AirflowFailException, match="was not moved"):
        waves.watch.function("b")


def test_what_has_begun_keeps_its_volumes_and_its_plan(ti: TaskInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Volumes that were moved are not found on the old endpoint any more."""
    before = planned(ti)
    runs.record_plan(before)
    ti.xcoms.clear()
    monkeypatch.setattr(plan, "find_members", lambda *_: pytest.fail("looked again"))
    assert plan.find_volumes.function() == list(KEYS)
    ti.xcoms[RUN, "find_volumes", "members"] = ti.xcoms[RUN, "self", "members"]
    ti.tasks["find_volumes"] = "success"
    assert FleetPlan.model_validate(plan.plan.function()) == before


def rehearsed(ti: TaskInstance, key: str, outcome: str, *refusals: str) -> None:
    findings = [{"check": "volume", "level": "refusal", "message": text, "remedy": "mend it"} for text in refusals]
    findings.append({"check": "csi", "level": "warning", "message": "old", "remedy": "upgrade"})
    run = f"{RUN}.{key}.plan"
    ti.xcoms[run, "finalize", "report"] = {"outcome": outcome, "findings": findings}
    if outcome == "planned":
        plan = {"after": {"bucket": "new"}, "target_fingerprint": "f", "mount_pods": [{}, {}], "missing_objects": 3}
        ti.xcoms[run, "plan", "return_value"] = plan


def test_the_plan_puts_the_dry_runs_together(ti: TaskInstance) -> None:
    params = planned(ti, on_failure="continue").params
    rows = [Member(key=key, secret=f"juicefs/{key}", params={"x": 1}).model_dump(mode="json") for key in KEYS[:3]]
    ti.xcoms = {
        (RUN, "resolve_params", "return_value"): params.model_dump(mode="json"),
        (RUN, "find_volumes", "members"): rows,
    }
    ti.tasks = {"find_volumes": "success"}
    rehearsed(ti, "a", "planned")
    rehearsed(ti, "b", "refused", "It is read-only.")
    fleet = FleetPlan.model_validate(plan.plan.function())
    assert fleet.waves == (("a",),)
    a = fleet.member("a")
    assert (a.after, a.fingerprint, a.clients, a.missing, a.warnings) == ("new", "f", 2, 3, 1)
    assert fleet.member("b").blockers == ("volume: It is read-only. Remedy: mend it",)
    assert "ended without a report" in fleet.member("c").blockers[0]

    ti.xcoms[RUN, "resolve_params", "return_value"]["on_failure"] = "stop"
    with pytest.raises(AirflowFailException, match="2 of 3 volumes blocked"):
        plan.plan.function()
    assert "It is read-only." in ti.xcoms[RUN, "self", "markdown"]

    ti.xcoms[RUN, "find_volumes", "members"] = []
    with pytest.raises(AirflowFailException, match="No volume was found on http://old:9000"):
        plan.plan.function()
    ti.tasks = {"find_volumes": "failed"}
    with pytest.raises(AirflowFailException, match="not known"):
        plan.plan.function()


def test_a_fleet_is_green_when_every_volume_is_moved_and_well(
    ti: TaskInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved(ti, *KEYS)
    assert waves.finalize.function() == {"outcome": "moved"}
    assert ti.xcoms[RUN, "self", "note"] == "moved: 4 of 4 volumes on the new store."
    assert "| canary | `a` | moved |" in ti.xcoms[RUN, "self", "markdown"]
    ti.tasks["wait_for_rollouts"] = "failed"
    assert end(ti)["outcome"] == "incomplete"
    ti.tasks["wait_for_rollouts"] = "success"
    monkeypatch.setattr(waves, "_is_on_target", lambda member: member.key != "c")
    assert end(ti) == {"outcome": "incomplete", "volumes": {"a": "moved", "b": "moved", "c": "moved on", "d": "moved"}}


def end(ti: TaskInstance) -> dict[str, Any]:
    """The report of a run that ends red."""
    with pytest.raises(AirflowFailException):
        waves.finalize.function()
    report: dict[str, Any] = ti.xcoms[RUN, "self", "report"]
    return report


def test_a_fleet_that_stopped_reports_where_each_volume_is(ti: TaskInstance) -> None:
    moved(ti, "a", "c")
    ended(ti, "b", "failed", "rolled back", "failed")
    ti.tasks |= {"start_2": "skipped", "watch_2": "skipped"}
    states = {"a": "moved", "b": "rolled back", "c": "moved", "d": "not started"}
    assert end(ti) == {"outcome": "stopped", "volumes": states}
    # Moved by its run, and then something was wrong.
    ended(ti, "b", "success", "switched", "failed")
    assert end(ti)["volumes"]["b"] == "not well"


def test_a_report_that_is_not_green_begins_with_the_task_that_failed_first(ti: TaskInstance) -> None:
    moved(ti, "a", "c")
    ended(ti, "b", "failed", "rolled back", "failed")
    ti.tasks |= {"wait_for_rollouts": "failed"}
    error = {"problem": "Volume b was not moved.", "state": "", "next_step": "see that run"}
    ti.xcoms[RUN, "watch_0", "error"] = error
    end(ti)
    title, first = ti.xcoms[RUN, "self", "markdown"].splitlines()[:2]
    assert title.startswith("## Stopped")
    run = "dags/juicefs_storage_fleet/runs/manual__2026-11-23T12%3A00%3A00%2B00%3A00"
    assert first == f"**[watch]({run}/tasks/watch/mapped/0) failed**: Volume b was not moved. **Next**: see that run."


def test_a_canary_that_failed_leaves_all_others_alone(ti: TaskInstance) -> None:
    ended(ti, "a", "failed", "refused", "failed")
    # Before it is known how many there are, there is one instance without an index.
    ti.tasks |= {"start": "upstream_failed", "watch": "upstream_failed"}
    assert end(ti) == {"outcome": "stopped", "volumes": {"a": "refused"} | dict.fromkeys("bcd", "not started")}


def test_a_fleet_with_a_blocked_volume_is_never_green(ti: TaskInstance) -> None:
    blocked = Member(key="e", secret="juicefs/e", blockers=("It is read-only.",))
    planned(ti, blocked, on_failure="continue")
    moved(ti, *KEYS)
    assert end(ti) == {"outcome": "incomplete", "volumes": dict.fromkeys(KEYS, "moved") | {"e": "blocked"}}
    planned(ti, blocked, on_failure="continue", dry_run=True)
    assert end(ti)["outcome"] == "refused"


@pytest.mark.parametrize(
    ("given", "tasks", "outcome"),
    [
        ({"dry_run": True}, {}, "planned"),
        ({}, {"approve": "failed"}, "rejected"),
        ({}, {"plan": "failed"}, "refused"),
    ],
)
def test_how_a_fleet_ends_that_moved_nothing(
    given: dict[str, Any], tasks: dict[str, str], outcome: str, ti: TaskInstance
) -> None:
    planned(ti, **given)
    ti.tasks |= tasks | {"start_canary": "skipped", "watch_canary": "skipped", "start": "skipped", "watch": "skipped"}
    assert (waves.finalize.function() if outcome == "planned" else end(ti))["outcome"] == outcome


@pytest.mark.parametrize(
    ("given", "path"),
    [({"dry_run": True}, "finalize"), ({}, "approve"), ({"require_approval": False}, "start_canary")],
)
def test_the_path(given: dict[str, Any], path: str, ti: TaskInstance) -> None:
    planned(ti, **given)
    assert plan.choose_path.function() == path


def test_a_fleet_without_volumes_says_so(ti: TaskInstance) -> None:
    ti.xcoms[RUN, "plan", "planned"] = None
    ti.tasks |= {"plan": "failed"}
    assert end(ti) == {"outcome": "refused", "volumes": {}}
    assert ti.xcoms[RUN, "self", "note"] == "refused: no volume was found."
    assert "|" not in ti.xcoms[RUN, "self", "markdown"]

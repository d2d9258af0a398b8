from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from include.juicefs_storage.names import FINISH, FLEET, REHEARSAL, SWITCH, SYNC
from include.juicefs_storage.run_state import Row, Run, steps_of
from include.juicefs_storage.run_status import describe, first_failed
from include.juicefs_storage.run_steps import ROLLBACK, STEPS
from include.juicefs_storage.switch.outcome import GREEN, RUN_MEANING

T0 = datetime(2026, 11, 29, 3, 0, tzinfo=UTC)
PARAMS = {"dry_run": False, "on_failure": "rollback", "late_commit_s": 360}
PLAN = {"volume": "home", "before": {"bucket": "http://old/data"}, "after": {"bucket": "http://new/data"}}
CHECKED = [*list(STEPS[SWITCH])[:10]]
TO_BACKUP = [*CHECKED, "approve", "backup", "copy_ahead"]
#: States in which a task has begun.
RAN = {"running", "success", "failed", "up_for_retry", "up_for_reschedule", "awaiting_input", "deferred"}


def row(task_id: str, state: str, number: int = 0, instances: int = 1, first: int = -1) -> Row:
    """A task that took ten seconds, its turn having come after those before it."""
    started = T0 + timedelta(seconds=10 * number) if state in RAN else None
    ended = started + timedelta(seconds=10) if started and state in {"success", "failed"} else None
    tries = 1 if state in RAN or state in {"queued", "scheduled"} else 0
    return Row(task_id, state, instances, tries, started, ended, first)


def run(done: list[str], state: str = "running", dag_id: str = SWITCH, **now: str) -> Run:
    """A run whose first tasks have passed, with the states of some others; the rest has not begun."""
    states = {**dict.fromkeys(STEPS[dag_id], "none"), **dict.fromkeys(done, "success"), **now}
    rows = [row(task_id, is_now, number) for number, (task_id, is_now) in enumerate(states.items())]
    return Run(dag_id, "run 1", state, steps_of(dag_id, reversed(rows)), {"resolve_params": PARAMS, "plan": PLAN})


def said(run: Run) -> dict[str, Any]:
    found = describe(run)
    json.dumps(found)
    return found


def test_a_run_that_waits_for_its_turn() -> None:
    found = said(run([], "queued"))
    assert found["sentence"].startswith("The run is queued")
    assert found["abort"] == {"safe": "yes", "text": "Nothing was changed. To abort, mark the run as failed."}


def test_a_check_at_work_says_which_since_when_and_what_comes_next() -> None:
    found = said(run(CHECKED[:4], check_secrets="running"))
    assert found["sentence"] == "check_secrets checks every Secret of the volume."
    assert found["since"] == (T0 + timedelta(seconds=40)).isoformat()
    assert found["next"] == "check_vault checks the folder of backups and its key."
    assert found["no_return"].startswith("Not passed")
    assert found["abort"]["safe"] == "yes"


def test_a_dry_run_goes_on_with_its_report() -> None:
    dry = run(CHECKED[:9], choose_path="running")
    found = said(replace(dry, results={"resolve_params": {**PARAMS, "dry_run": True}}))
    assert found["next"] == "finalize writes the report."


def test_a_planned_run() -> None:
    skipped = dict.fromkeys(list(STEPS[SWITCH])[10:-1], "skipped")
    ended = replace(run([*CHECKED, "finalize"], "success", **skipped), note="planned, volume `home`.")
    found = said(ended)
    assert (found["ended"], found["tone"], found["abort"]) == (True, "good", None)
    assert found["sentence"] == "Planned, volume home."
    assert found["next"] == "Read the plan. Trigger again with dry_run=false to carry it out."
    assert not {step["task"] for step in found["steps"]} & set(ROLLBACK)


@pytest.mark.parametrize("state", ["awaiting_input", "deferred"])
def test_an_approval_that_waits(state: str) -> None:
    found = said(run(CHECKED, approve=state))
    assert found["tone"] == "waits"
    assert found["sentence"] == "approve waits for a person who approves or rejects the plan."
    assert found["until"] == (T0 + timedelta(seconds=100, hours=24)).isoformat()
    assert "answer in task approve" in found["next"]
    assert found["abort"]["text"].startswith("Nothing was changed.")


def test_before_the_cut_over_aborting_says_what_stays() -> None:
    found = said(run(TO_BACKUP[:-1], copy_ahead="running"))
    assert found["abort"]["safe"] == "yes"
    assert "blocks that the run copied" in found["abort"]["text"]
    assert "bucket" not in found["abort"]["text"]
    assert "Lease" in found["abort"]["text"]
    made = replace(run(TO_BACKUP), results={"resolve_params": {**PARAMS, "create_bucket": True}})
    assert "a bucket that the run made" in said(made)["abort"]["text"]


def test_right_before_and_in_the_cut_over_nothing_is_promised() -> None:
    queued = said(run(TO_BACKUP, follow_writes="running", write_setting="queued"))
    assert (queued["abort"]["safe"], queued["no_return"][:10]) == ("no", "Not passed")
    waits = said(run(TO_BACKUP, write_setting="up_for_retry"))["sentence"]
    assert waits.startswith("write_setting failed and is tried again in a moment: it writes the setting")
    assert said(run([], resolve_params="queued"))["sentence"] == (
        "resolve_params waits for a worker: it validates the params."
    )
    writing = said(run(TO_BACKUP, follow_writes="running", write_setting="running"))
    assert (writing["abort"]["safe"], writing["no_return"][:10]) == ("no", "About to b")
    assert writing["sentence"].startswith("write_setting writes the setting: ")
    assert writing["sentence"].endswith("Beside it: follow_writes.")


def test_the_clients_are_those_of_the_proof_that_began_last() -> None:
    proven, waits = (
        [{"name": name, "proven": name != "c", "seen": "", "at": None} for name in "ab"],
        [{"name": "c", "proven": False, "seen": "it shows the old bucket", "at": None}],
    )
    forward = run([*TO_BACKUP, "write_setting", "patch_secret"], settle="running", prove_clients="running")
    seen = replace(forward, clients={"prove_clients": [*waits, *proven], "prove_clients_on_old": proven})
    assert said(seen)["clients"] == [*waits, *proven], "what the way back left is of an earlier try"
    assert said(seen)["sentence"].startswith("prove_clients proves every client on the new store: 2 of 3 proven.")
    back = run([*TO_BACKUP, "write_setting", "restore_setting"], prove_clients="failed", prove_clients_on_old="running")
    assert said(replace(back, clients=seen.clients))["clients"] == proven
    assert said(forward)["clients"] == []


def test_after_the_cut_over_aborting_is_not_safe_and_says_how_to_go_back() -> None:
    moved = run([*TO_BACKUP, "write_setting", "patch_secret"], settle="running", prove_clients="running")
    found = said(moved)
    assert found["sentence"] == "prove_clients proves every client on the new store. Beside it: settle."
    assert found["no_return"].startswith("Passed: ")
    assert found["abort"]["safe"] == "no"
    assert "roll nothing back" in found["abort"]["text"]
    assert "mark the task that is at work as failed: decide then rolls back" in found["abort"]["text"]
    held = replace(moved, results={"resolve_params": {**PARAMS, "on_failure": "hold"}})
    assert "on_failure is hold" in said(held)["abort"]["text"]
    cleared = replace(moved, note="switched, volume `home`.")
    assert "decide then leaves the volume where it is, since the run had ended green" in said(cleared)["abort"]["text"]


def test_a_wait_for_late_commits_says_until_when() -> None:
    done = [*TO_BACKUP, "follow_writes", "write_setting", "patch_secret", "settle", "prove_clients", "prove_blocks"]
    found = said(run(done, catch_up_late="up_for_reschedule"))
    number = list(STEPS[SWITCH]).index("prove_clients")
    assert found["until"] == (T0 + timedelta(seconds=10 * number + 10 + 360)).isoformat()
    assert found["next"] == "decide decides whether the run finishes or rolls back."


def test_a_write_that_was_cleared_still_counts() -> None:
    rows = [row(task, "success", number) for number, task in enumerate(TO_BACKUP)]
    cleared = Row("write_setting", "none", 1, 1, None, None, -1)
    again = Run(SWITCH, "r", "running", steps_of(SWITCH, [*rows, cleared]), {"resolve_params": PARAMS})
    found = said(again)
    assert found["no_return"].startswith("May be passed")
    assert found["abort"]["safe"] == "no"


def test_a_failed_step_after_the_cut_over_is_shown_while_the_run_goes_on() -> None:
    failed = run([*TO_BACKUP, "write_setting"], prove_clients="failed", settle="running")
    error = {"problem": "Pod `home-1` did not follow.", "state": "moved", "next_step": "see the pod's log"}
    found = said(replace(failed, errors={("prove_clients", -1): error}))
    assert first_failed(failed.steps) == ("prove_clients", -1)
    assert found["tone"] == "bad"
    assert found["failure"] == {
        "task": "prove_clients",
        "url": f"dags/{SWITCH}/runs/run%201/tasks/prove_clients",
        "problem": "Pod home-1 did not follow.",
        "state": "moved",
        "next": "see the pod's log",
    }
    assert found["next"] == "decide decides whether the run finishes or rolls back."
    assert "Let the run end: decide rolls back" in found["abort"]["text"]


def test_a_rollback_at_work_and_ended() -> None:
    back = ["decide", "collect_diagnostics", "copy_back", "restore_secret"]
    going = run([*TO_BACKUP, "write_setting", *back], prove_clients="failed", restore_setting="running")
    found = said(going)
    assert found["sentence"] == "restore_setting puts the setting back."
    assert (found["abort"]["safe"], found["abort"]["text"][:20]) == ("no", "The run rolls back. ")
    assert set(ROLLBACK) <= {step["task"] for step in found["steps"]}
    ended = run([*TO_BACKUP, "write_setting", "decide", *ROLLBACK], "failed", prove_clients="failed", finalize="failed")
    found = said(replace(ended, note="rolled back, volume `home`, from `a` to `b`."))
    assert found["sentence"] == "Rolled back, volume home, from a to b."
    assert found["no_return"].startswith("Passed and undone")
    assert found["failure"]["task"] == "prove_clients"
    assert "trigger a new run" in found["next"]


def test_a_refused_run() -> None:
    never = dict.fromkeys(list(STEPS[SWITCH])[9:-1], "upstream_failed")
    refused = run(CHECKED[:5], "failed", **{**never, "check_vault": "failed", "plan": "failed", "finalize": "failed"})
    found = said(replace(refused, note="refused. Refusals: 1."))
    assert found["sentence"] == "Refused. Refusals: 1."
    assert found["failure"]["task"] == "check_vault"
    assert found["failure"]["problem"].startswith("No error was recorded")
    assert found["failure"]["next"] == "see its log"
    told = replace(refused, errors={("check_vault", -1): {"problem": "No key. Remedy: make one."}})
    assert said(told)["failure"]["next"] == ""
    assert found["no_return"].startswith("Not passed")
    assert found["next"].startswith("Remove what was refused")


def test_a_run_that_was_marked_failed_in_mid_move_says_what_is_held() -> None:
    found = said(run([*TO_BACKUP, "write_setting"], "failed", settle="failed", finalize="skipped"))
    assert "Volume home was moved from http://old/data to http://new/data. Still held" in found["sentence"]


def test_a_switched_run() -> None:
    found = said(replace(run([task for task in STEPS[SWITCH] if task not in ROLLBACK], "success"), note="switched."))
    assert (found["sentence"], found["next"]) == ("Switched.", "Nothing is left to do in this run: see the report.")


def test_every_red_end_of_a_switch_has_a_next_step_of_its_own() -> None:
    failed = run(CHECKED, "failed", backup="failed", finalize="failed")
    otherwise = said(replace(failed, note="something else."))["next"]
    assert otherwise == "Remove the cause, then clear backup with Downstream, or trigger a new run."
    for outcome in set(RUN_MEANING) - GREEN:
        assert said(replace(failed, note=f"{outcome}, volume `x`."))["next"] != otherwise


def progress(**values: Any) -> Mapping[str, Any]:
    common = {"state": "running", "doing": "copying", "because": "", "objects": 10, "bytes": 100, "at": "2026"}
    return {**common, "objects_expected": 40, "bytes_expected": 200, "objects_s": 2.0, "bytes_s": 5.0, **values}


def test_partitions_are_added_up_and_one_that_is_not_known_makes_the_sum_unknown() -> None:
    done = ["check", "list_source", "plan_partitions"]
    rows = [row(task, "success", number) for number, task in enumerate(done)]
    rows += [row("copy", "success", 3, 6, 0), row("copy", "failed", 3, 1, 7), row("copy", "running", 3, 1, 4)]
    ended = progress(state="ended", objects=40, bytes=200, objects_s=99.0)
    steps = steps_of(SYNC, rows)
    all_known = Run(SYNC, "r", "running", steps, progress={"copy": [*[ended] * 7, progress(eta_s=15.0)]})
    found = said(all_known)
    assert found["sentence"] == "copy copies the partitions: 6 of 8 done, 1 failed, 90.6 %."
    shown = found["progress"][0]
    assert (shown["objects"], shown["objects_expected"], shown["bytes"]) == (290, 320, 1500)
    assert (shown["objects_s"], shown["bytes_s"], shown["eta_s"]) == (2.0, 5.0, 15.0)
    assert found["failure"]["url"].endswith("/tasks/copy/mapped/7")
    steps_shown = {step["task"]: step for step in found["steps"]}
    assert steps_shown["copy"]["counts"] == "8 instances: 1 running, 1 failed, 6 success"
    assert steps_shown["copy"]["url"].endswith("/tasks/copy/mapped")
    for records in ([ended] * 6, [*[ended] * 7, progress(objects_expected=None, eta_s=None)]):
        shown = said(replace(all_known, progress={"copy": records}))["progress"][0]
        assert (shown["objects_expected"], shown["eta_s"]) == (None, None)


def test_progress_of_a_task_that_had_nothing_to_do_is_shown_while_it_works_alone() -> None:
    none = {"copy_ahead": [progress(objects=0, state="ended")]}
    assert len(said(replace(run(TO_BACKUP[:-1], copy_ahead="running"), progress=none))["progress"]) == 1
    assert said(replace(run(TO_BACKUP, write_setting="running"), progress=none))["progress"] == []


@pytest.mark.parametrize(
    ("dag_id", "done", "now", "safe", "words"),
    [
        (SYNC, ["check"], {"list_source": "running"}, "yes", "What was copied stays"),
        (FLEET, ["plan", "approve"], {"start_canary": "queued"}, "yes", "No volume was moved"),
        (FLEET, ["plan", "start_canary"], {"watch_canary": "running"}, "no", "go on by themselves"),
        (REHEARSAL, ["list_volumes"], {"rehearse": "running"}, "yes", "Nothing was changed"),
        (FINISH, ["plan"], {"refresh_mount_pods": "running"}, "no", "half replaced"),
        (FINISH, ["plan"], {"rehearse_off": "running"}, "no", "denied for now"),
        (FINISH, ["plan", "refresh_mount_pods"], {"certify": "running"}, "yes", "stays so"),
    ],
)
def test_aborting_a_run_of_another_dag(
    dag_id: str, done: list[str], now: dict[str, str], safe: str, words: str
) -> None:
    found = said(run(done, dag_id=dag_id, **now))
    assert found["abort"]["safe"] == safe
    assert words in found["abort"]["text"]

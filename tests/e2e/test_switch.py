"""`juicefs_storage_switch` through a real scheduler and REST, on a real volume that is in use.

The tests share one lab and run in the order of the file. The volume is on the old store before and after.
"""

from __future__ import annotations

import json
import threading
from typing import Any
from urllib.parse import quote

import pytest

from include.juicefs_storage.adapters.juicefs_command import _STATUS, _TRY, _VERSION
from include.juicefs_storage.run_steps import ROLLBACK
from include.juicefs_storage.volume.canary import _ROOM
from include.juicefs_storage.volume.mount_pods import _READ_CONFIG, _READ_STATS
from lab.airflow import Airflow
from lab.environment import Lab
from lab.mariadb import mutating
from lab.process import wait_for
from tests.support.live_runs import RUN_S, SHORT, SWITCH, buckets, finish, note_of, start_switch
from tests.support.world import assert_nothing_lost, writing


def error_of(airflow: Airflow, run_id: str, task_id: str) -> str:
    task = next(task for task in airflow.task_states(SWITCH, run_id) if task.task_id == task_id)
    return airflow.task_error(SWITCH, run_id, task)


def world(lab: Lab) -> dict[str, Any]:
    """Everything that a run which changes nothing leaves as it was."""
    kinds = ("secrets", "statefulsets", "daemonsets")
    objects = {kind: json.loads(lab.kubectl("get", kind, "-n", "juicefs", "-o", "json"))["items"] for kind in kinds}
    return {
        "setting": lab.mariadb.query("SELECT value FROM jfs_setting"),
        "specs": {
            kind: [{k: item.get(k) for k in ("data", "spec")} for item in found] for kind, found in objects.items()
        },
        "old": lab.old_store.objects(),
        "new": lab.new_store.objects(),
        "mounts": lab.mount_processes(),
    }


def test_a_dry_run_makes_no_mutating_call(lab: Lab, airflow: Airflow) -> None:
    password = "dry-run-password"
    lab.mariadb.add_user("dryrun", password, "SELECT, UPDATE")
    airflow.api(
        "POST",
        "/connections",
        json={
            "connection_id": "meta_reader", "conn_type": "mysql", "host": lab.mariadb.host, "port": lab.mariadb.port,
            "schema": lab.mariadb.database, "login": "dryrun", "password": password,
        },
    )  # fmt: skip
    before = world(lab)
    requests = [store.mutating_requests() for store in (lab.old_store, lab.new_store)]
    audited = len(lab.kube.audit())
    lab.mariadb.start_general_log()
    state, report = finish(airflow, SWITCH, start_switch(lab, airflow, dry_run=True, meta_conn_id="meta_reader"))
    lab.mariadb.stop_general_log()

    assert (state, report["outcome"]) == ("success", "planned")
    statements = lab.mariadb.general_log_statements("dryrun")
    assert any("jfs_setting" in statement for statement in statements)
    # The update that a way back would make is tried, with the value that is there, and taken back.
    (tried,) = mutating(statements)
    assert "SET value = value" in tried
    assert "ROLLBACK" in statements[statements.index(tried) :]
    calls = lab.kube.audit()[audited:]
    assert any(call.verb == "connect" or call.subresource == "exec" for call in calls)
    assert [call for call in calls if call.mutating and call.subresource != "exec"] == []
    # What was run in the pods only reads; of juicefs it was `version`, `status`, and a look at the new store.
    scripts = {call.command[2] for call in calls if call.subresource == "exec"}
    known = {_READ_CONFIG, _READ_STATS, _ROOM, _STATUS, _TRY, _VERSION}
    (reach,) = scripts - known
    assert known < scripts
    assert "curl" in reach
    assert "juicefs" not in reach
    assert [store.mutating_requests() for store in (lab.old_store, lab.new_store)] == requests
    assert world(lab) == before


@pytest.mark.slow
def test_a_dry_run_and_a_real_run_plan_the_same_steps(lab: Lab, airflow: Airflow) -> None:
    """Approval is refused, so that the real run stops after its plan; nothing was changed."""
    before = world(lab)
    dry = start_switch(lab, airflow, dry_run=True)
    finish(airflow, SWITCH, dry)
    real = start_switch(lab, airflow, dry_run=False, require_approval=True)
    airflow.answer(SWITCH, real, "approve", "Reject")
    state, report = finish(airflow, SWITCH, real)
    assert (state, report["outcome"]) == ("failed", "rejected")
    plans = [airflow.xcom(SWITCH, run_id, "plan") for run_id in (dry, real)]
    assert plans[0]["steps"] == plans[1]["steps"]
    assert world(lab) == before


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"target_bucket": "no-such-bucket"}, ["no-such-bucket", "never created"]),
        pytest.param({"target_conn_id": "no_such_connection"}, ["no_such_connection"], marks=pytest.mark.slow),
        pytest.param({"namespace": "nowhere"}, ["nowhere"], marks=pytest.mark.slow),
        pytest.param({"dryrun": False}, ["`dryrun` is not a param"], marks=pytest.mark.slow),
    ],
)
def test_a_switch_that_cannot_work_is_refused_before_anything_is_touched(
    lab: Lab, airflow: Airflow, params: dict[str, Any], words: list[str]
) -> None:
    before = world(lab)
    run_id = start_switch(lab, airflow, dry_run=False, **params)
    state, report = finish(airflow, SWITCH, run_id)
    assert (state, report["outcome"]) == ("failed", "refused")
    status = airflow.page(f"runs/{SWITCH}/{quote(run_id, safe='')}/status").json()
    assert status["ended"]
    assert status["sentence"].startswith("Refused")
    assert status["no_return"].startswith("Not passed")
    assert not [step["task"] for step in status["steps"] if step["task"] in ROLLBACK]
    refused = error_of(airflow, run_id, "plan")
    assert [word for word in words if word not in refused] == []
    assert world(lab) == before
    assert lab.new_store.client().list_buckets()["Buckets"][0]["Name"] == lab.new_store.bucket
    assert len(lab.new_store.client().list_buckets()["Buckets"]) == 1


@pytest.mark.slow
def test_a_switch_to_a_store_that_then_refuses_writes_is_rolled_back(lab: Lab, airflow: Airflow) -> None:
    before, row = buckets(lab), lab.mariadb.query("SELECT value FROM jfs_setting")
    processes = lab.mount_processes()

    def refuse_as_soon_as_the_setting_is_written() -> None:
        wait_for(
            "the setting is written", lambda: lab.mariadb.setting()["Bucket"] == lab.new_store.bucket_url,
            deadline_s=RUN_S, poll_s=0.05,
        )  # fmt: skip
        lab.new_store.refuse_writes()

    saboteur = threading.Thread(target=refuse_as_soon_as_the_setting_is_written)
    with writing(lab, "rolled-back") as writer:
        saboteur.start()
        try:
            run_id = start_switch(lab, airflow, dry_run=False)
            state, report = finish(airflow, SWITCH, run_id)
        finally:
            saboteur.join()
            lab.new_store.allow_writes()
        acknowledged = writer.summary().written
        wait_for("the writer continues", lambda: writer.summary().written > acknowledged + 5, deadline_s=60)

    assert (state, report["outcome"]) == ("failed", "rolled back"), report["states"]
    assert report["states"]["prove_clients"] == "failed"
    restored = report["results"]["restore_setting"]
    assert (restored["restored"], restored["followed"]) == (True, True)
    assert report["results"]["copy_back_late"]["waited_s"] == SHORT["late_commit_s"]
    assert buckets(lab) == before == {lab.old_store.bucket_url}
    assert lab.mariadb.query("SELECT value FROM jfs_setting") == row
    assert lab.mount_processes() == processes
    way = f"from `{lab.old_store.bucket_url}` to `{lab.new_store.bucket_url}`"
    outcome = f"/report)**: rolled back, volume `myjfs`, {way}. Backup: `{report['backup_id']}`."
    assert note_of(airflow, run_id).startswith(f"**[prove_clients](dags/{SWITCH}/runs/")
    assert note_of(airflow, run_id).endswith(outcome)
    airflow.api("PATCH", f"/dags/{SWITCH}/dagRuns/{run_id}", json={"note": f"INC-7\n\n{note_of(airflow, run_id)}"})
    # The run's steps forward refuse from now on: "only failed" would go green over a half-undone volume.
    airflow.clear(SWITCH, run_id, ["settle"])
    assert airflow.wait_run(SWITCH, run_id, timeout_s=RUN_S) == "failed"
    assert "rolled back since" in error_of(airflow, run_id, "settle")
    assert buckets(lab) == before
    assert note_of(airflow, run_id).startswith("INC-7\n\n")
    assert note_of(airflow, run_id).endswith(outcome)
    assert (note_of(airflow, run_id).count("Outcome"), note_of(airflow, run_id).count(" failed**: ")) == (1, 1)

    lab.new_store.stop()
    try:
        assert_nothing_lost(lab, writer)
    finally:
        lab.new_store.start()

"""A live volume moves to the new store and stays there: the last file of the folder, so that no other moves it back."""

from __future__ import annotations

import base64
import json
import time

import httpx

from lab.airflow import Airflow
from lab.environment import Lab
from lab.keys import random_part
from tests.support.live_runs import SHORT, SWITCH, buckets, finish, note_of, start_switch
from tests.support.world import assert_nothing_lost, writing


def test_a_live_volume_moves_and_nothing_is_lost(lab: Lab, airflow: Airflow) -> None:
    processes, old_objects = lab.mount_processes(), lab.old_store.objects()
    with writing(lab, "moving") as writer:
        begun = time.time()
        run_id = start_switch(lab, airflow, dry_run=False, require_approval=True)
        airflow.answer(SWITCH, run_id, "approve", "Approve")
        state, report = finish(airflow, SWITCH, run_id)
        during = writer.summary(since=begun)

    failed = [task for task in airflow.task_states(SWITCH, run_id) if task.state == "failed"]
    assert state == "success", [airflow.task_error(SWITCH, run_id, task) for task in failed]
    assert (report["outcome"], report["approved_by"]) == ("switched", "admin")
    assert "/report)**: switched, volume `myjfs`, from " in note_of(airflow, run_id)
    assert buckets(lab) == {lab.new_store.bucket_url}
    assert lab.mount_processes() == processes
    assert report["results"]["prove_no_restarts"]["restarts"] == 0
    assert len(report["results"]["prove_clients"]["clients"]) == len(lab.mounts()) == 2
    assert during.written > 0
    assert during.write_errors == []
    results = report["results"]
    assert results["write_setting"]["followed"] is True
    assert results["follow_writes"]["problem"] == ""
    assert (results["catch_up_late"]["waited_s"], results["catch_up_late"]["copied"]) == (SHORT["late_commit_s"], 0)
    # Nothing of ours was removed from the old store or written over there.
    assert {key: lab.old_store.objects().get(key) for key in old_objects if "/chunks/" not in key} == {
        key: value for key, value in old_objects.items() if "/chunks/" not in key
    }
    assert_no_secrets(lab, airflow, run_id)
    lab.old_store.stop()
    assert_nothing_lost(lab, writer)


def test_the_plan_and_the_report_are_pages_for_those_who_may_see_the_run(lab: Lab, airflow: Airflow) -> None:
    runs = airflow.api("GET", f"/dags/{SWITCH}/dagRuns", params={"order_by": "-start_date"})["dag_runs"]
    run_id = next(run["dag_run_id"] for run in runs if run["state"] == "success")
    links = airflow.api("GET", f"/dags/{SWITCH}/dagRuns/{run_id}/taskInstances/finalize/links")["extra_links"]
    for name, words in {"Plan": "Switch of volume", "Report": "Switched: volume"}.items():
        page = f"{airflow.url}/{links[name]}"
        assert httpx.get(page).status_code == httpx.codes.UNAUTHORIZED
        token = httpx.post(
            f"{airflow.url}/auth/token", json={"username": "viewer", "password": airflow.viewer_password}
        ).json()["access_token"]
        shown = httpx.get(page, headers={"Authorization": f"Bearer {token}"})
        assert shown.status_code == httpx.codes.OK
        assert words in shown.text
        assert lab.old_store.access_key not in shown.text


def assert_no_secrets(lab: Lab, airflow: Airflow, run_id: str) -> None:
    """No key in the logs, XComs, rendered fields, exec commands or backups of a run."""
    stores, backup = (lab.old_store, lab.new_store), airflow.api("GET", "/connections/juicefs_backup")
    keys = [key for store in stores for key in (store.access_key, store.secret_key)] + [lab.mariadb.password]
    assert backup["password"] in (None, "***")
    secrets = [random_part(key) for key in keys] + [base64.b64encode(key.encode()).decode() for key in keys]
    shown = [json.dumps([entry.command for entry in lab.kube.audit()]), note_of(airflow, run_id)]
    shown += [file.read_bytes().decode("latin-1") for file in (lab.state / "backups").iterdir()]
    for task in airflow.task_states(SWITCH, run_id):
        path = f"/dags/{SWITCH}/dagRuns/{run_id}/taskInstances/{task.task_id}"
        shown.append(json.dumps(airflow.api("GET", path)))  # rendered fields among it
        entries = airflow.api("GET", f"{path}/xcomEntries")["xcom_entries"]
        shown += [json.dumps(airflow.xcom(SWITCH, run_id, task.task_id, entry["key"])) for entry in entries]
        if task.state in {"success", "failed"} and task.start:
            log = airflow.task_log(SWITCH, run_id, task.task_id, try_number=task.try_number)
            assert log
            shown.append(log)
    assert len(shown) > 40
    assert [secret for secret in secrets for text in shown if secret in text] == []

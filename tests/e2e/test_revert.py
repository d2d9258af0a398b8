"""Rehearsal and revert through a real scheduler: what is asked of a person, and what becomes of a volume in use.

The tests leave the volume on the old store, both stores running.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import httpx

from lab.airflow import Airflow
from lab.environment import Lab
from lab.process import wait_for
from tests.support.live_runs import SWITCH, finish, start_switch
from tests.support.oncall import EXTRA, oncall

REVERT, REHEARSAL = "juicefs_storage_revert", "juicefs_storage_rehearsal"


def connect(airflow: Airflow, conn_id: str, **values: object) -> None:
    airflow.api("POST", "/connections", json={"connection_id": conn_id, **values})


def authorized(airflow: Airflow) -> dict[str, str]:
    user = {"username": airflow.user, "password": airflow.password}
    token = httpx.post(f"{airflow.url}/auth/token", json=user, timeout=60).json()["access_token"]
    return {"Authorization": f"Bearer {token}"}


def last_event(airflow: Airflow) -> dict[str, Any]:
    """The last event of the asset: what the page of the volumes shows."""
    asset = airflow.api("GET", "/assets", params={"name_pattern": "juicefs_storage_readiness"})["assets"][0]
    query = {"asset_id": asset["id"], "order_by": "-timestamp", "limit": 1}
    extra: dict[str, Any] = airflow.api("GET", "/assets/events", params=query)["asset_events"][0]["extra"]
    return extra


def test_a_rehearsal_tells_who_is_ready_and_since_when(lab: Lab, airflow: Airflow) -> None:
    run_id = airflow.trigger(REHEARSAL, {})
    state, report = finish(airflow, REHEARSAL, run_id)
    assert (state, report) == ("success", {"ready": ["myjfs"], "blocked": []})
    note = airflow.api("GET", f"/dags/{REHEARSAL}/dagRuns/{run_id}")["note"]
    assert note.endswith("/report)**: 1 of 1 volumes ready to be switched.")
    ready = last_event(airflow)
    assert (ready["volume"], ready["ready"], ready["blockers"]) == ("myjfs", True, [])
    mapped = airflow.api("GET", f"/dags/{REHEARSAL}/dagRuns/{run_id}/taskInstances/rehearse/listMapped")
    assert [task["rendered_map_index"] for task in mapped["task_instances"]] == ["myjfs"]

    with oncall() as (connection, posted):
        connect(airflow, "oncall", **connection)
        connect(airflow, "juicefs_notify", conn_type="generic", extra=json.dumps(EXTRA))
        lab.new_store.stop()
        try:
            run_id = airflow.trigger(REHEARSAL, {})
            state, report = finish(airflow, REHEARSAL, run_id)
            wait_for("the notification arrives", lambda: bool(posted), deadline_s=60)
        finally:
            lab.new_store.start()
            for conn_id in ("oncall", "juicefs_notify"):
                airflow.api("DELETE", f"/connections/{conn_id}")
    assert [body["subject"] for body in posted] == [f"{REHEARSAL}: a volume is not ready to be switched"]
    assert "**not ready** since" in posted[0]["text"]
    assert run_id.split("+")[0] in unquote(posted[0]["url"])
    assert (state, report["ready"]) == ("failed", [])
    blocked = last_event(airflow)
    assert blocked["ready"] is False
    assert blocked["since"] > ready["since"]
    assert lab.new_store.endpoint_url in "".join(blocked["blockers"])

    page = httpx.get(f"{airflow.url}/juicefs-storage/volumes", headers=authorized(airflow), timeout=60)
    assert page.status_code == 200
    assert "What blocks myjfs" in page.text
    assert httpx.get(f"{airflow.url}/juicefs-storage/volumes", timeout=60).status_code == 401


def test_a_revert_offers_the_backups_and_goes_back_to_the_chosen_one(lab: Lab, airflow: Airflow) -> None:
    processes = lab.mount_processes()
    state, report = finish(airflow, SWITCH, start_switch(lab, airflow, dry_run=False))
    assert (state, report["outcome"]) == ("success", "switched"), report["states"]
    assert lab.mariadb.setting()["Bucket"] == lab.new_store.bucket_url

    run_id = airflow.trigger(REVERT, {"dry_run": False, "require_approval": False})
    task = f"/dags/{REVERT}/dagRuns/{run_id}/taskInstances/choose_backup"
    wait_for("a backup is asked for", lambda: airflow.api("GET", task)["state"] == "awaiting_input", deadline_s=120)
    detail = airflow.api("GET", f"{task}/-1/hitlDetails")
    newest = detail["options"][0]
    assert f"| `{newest}` | myjfs (" in detail["body"]

    airflow.answer(REVERT, run_id, "choose_backup", newest)
    state, report = finish(airflow, REVERT, run_id)
    failed = [task for task in airflow.task_states(REVERT, run_id) if task.state == "failed"]
    assert (state, report["outcome"]) == ("success", "reverted"), [
        airflow.task_error(REVERT, run_id, task) for task in failed
    ]
    assert airflow.xcom(REVERT, run_id, "plan")["backup_id"] == newest
    assert report["backup_id"] not in {newest, None}
    assert lab.mariadb.setting()["Bucket"] == lab.old_store.bucket_url
    assert lab.mount_processes() == processes

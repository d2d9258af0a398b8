"""docker-compose.yaml, run: two workers, log-in, the pages, an approved switch, and a worker that dies in mid-copy.

The tests share one stack and one lab and run in the order of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from urllib.parse import quote

import httpx
import pytest

from lab.airflow import Airflow
from lab.environment import Lab
from lab.process import wait_for
from tests.support import compose_stack, docker_engine
from tests.support.compose_stack import Stack
from tests.support.labs import lab_required, up_with_objects
from tests.support.live_runs import RUN_S, SWITCH, buckets, finish, start_switch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SYNC, PREFIX, OBJECTS, BYTES, PARTITIONS = "juicefs_storage_sync", "compose/", 120, 128 * 2**10, 3
SERVICES = {
    "postgres": ["healthy"],
    "redis": ["healthy"],
    "airflow-init": ["exited 0"],
    "airflow-apiserver": ["healthy"],
    "airflow-scheduler": ["healthy"],
    "airflow-dag-processor": ["healthy"],
    "airflow-triggerer": ["healthy"],
    "airflow-worker": ["healthy", "healthy"],
}
VIEWER_PASSWORD = "looks-only"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from up_with_objects(tmp_path_factory.mktemp("lab"), PREFIX, OBJECTS, BYTES)


@pytest.fixture(scope="module")
def stack(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("compose")
    registered = {"myjfs": {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket}}
    with (
        lab_required(),
        docker_engine.engine(folder) as environment,
        compose_stack.up(environment, folder, registered, workers=2) as stack,
    ):
        yield stack


@pytest.fixture(scope="module")
def airflow(lab: Lab, stack: Stack) -> Iterator[Airflow]:
    """The stack's Airflow as its administrator uses it, with the connections to the lab made in it."""
    airflow = Airflow(stack.folder, 8080, stack.password, VIEWER_PASSWORD, stack.user)
    wait_for("every service is healthy", lambda: stack.health() == SERVICES, deadline_s=900, poll_s=5)
    ports = [lab.mariadb.port, lab.old_store.ports[3], lab.new_store.ports[3], kubernetes_port(lab)]
    with compose_stack.loopback(stack, stack.containers("airflow-worker"), ports):
        airflow.connect_store("minio_old", lab.old_store)
        airflow.connect_store("minio_new", lab.new_store)
        kubernetes = json.dumps({"kube_config": lab.kube.kubeconfig.read_text()})
        body = {"connection_id": "kubernetes_default", "conn_type": "kubernetes", "extra": kubernetes}
        airflow.api("POST", "/connections", json=body)
        metadata = {
            "connection_id": "juicefs_meta", "conn_type": "mysql", "host": lab.mariadb.host,
            "port": lab.mariadb.port, "schema": lab.mariadb.database, "login": lab.mariadb.user,
            "password": lab.mariadb.password,
        }  # fmt: skip
        airflow.api("POST", "/connections", json=metadata)
        yield airflow


def kubernetes_port(lab: Lab) -> int:
    config = json.loads(lab.kube.kubeconfig.read_text())
    return int(config["clusters"][0]["cluster"]["server"].rpartition(":")[2])


def log_in(airflow: Airflow, user: str, password: str) -> httpx.Client:
    """Log in on the page that people see; returns a client with the session's cookies."""
    client = httpx.Client(base_url=airflow.url, timeout=60, follow_redirects=True)
    page = client.get("/auth/login/")
    [token] = re.findall(r'name="csrf_token"[^>]*value="([^"]+)"', page.text)
    client.post("/auth/login/", data={"username": user, "password": password, "csrf_token": token}).raise_for_status()
    return client


def test_every_service_is_healthy(stack: Stack, airflow: Airflow) -> None:
    assert stack.health() == SERVICES
    assert "No broken requirements" in stack.in_service("airflow-scheduler", "python", "-m", "pip", "check")


def test_the_dags_are_there_and_not_paused(airflow: Airflow) -> None:
    names = {f"juicefs_storage_{name}" for name in ("switch", "fleet", "revert", "finish", "sync", "rehearsal")}

    def paused() -> dict[str, bool]:
        return {dag["dag_id"]: dag["is_paused"] for dag in airflow.api("GET", "/dags")["dags"]}

    wait_for("every DAG is there", lambda: paused().keys() == names, deadline_s=300, poll_s=2)
    assert paused() == dict.fromkeys(names, False)
    assert airflow.import_errors() == {}
    assert airflow.api("GET", "/pools/juicefs_storage")["slots"] == 8


def test_initialising_again_changes_nothing(stack: Stack, airflow: Airflow) -> None:
    by_hand = {"name": "juicefs_storage", "slots": 5, "include_deferred": False}
    airflow.api("PATCH", "/pools/juicefs_storage", params={"update_mask": ["slots"]}, json=by_hand)
    stack.compose("run", "--rm", "--no-deps", "airflow-init", deadline_s=600)
    assert airflow.api("GET", "/pools/juicefs_storage")["slots"] == 5
    assert log_in(airflow, stack.user, stack.password).get("/api/v2/dags").status_code == 200


def test_the_pages_are_for_those_who_may_see_the_runs(stack: Stack, airflow: Airflow) -> None:
    viewer = {
        "username": "viewer", "password": VIEWER_PASSWORD, "first_name": "V", "last_name": "V",
        "email": "viewer@localhost", "roles": [{"name": "Viewer"}],
    }  # fmt: skip
    token = httpx.post(
        f"{airflow.url}/auth/token", json={"username": stack.user, "password": stack.password}, timeout=60
    ).json()["access_token"]
    headers = {"Authorization": f"Bearer {token}"}
    httpx.post(f"{airflow.url}/auth/fab/v1/users", json=viewer, headers=headers, timeout=60).raise_for_status()

    page = "/juicefs-storage/volumes"
    assert httpx.get(airflow.url + page, timeout=60).status_code == 401
    assert log_in(airflow, stack.user, "wrong").get(page).status_code == 401
    for user, password in ((stack.user, stack.password), ("viewer", VIEWER_PASSWORD)):
        answer = log_in(airflow, user, password).get(page)
        assert answer.status_code == 200
        assert "<title>JuiceFS volumes</title>" in answer.text


def test_a_dry_run_changes_nothing(lab: Lab, airflow: Airflow) -> None:
    lab.copy_to_new_store()
    state, report = finish(airflow, SWITCH, start_switch(lab, airflow, dry_run=True))
    assert (state, report["outcome"]) == ("success", "planned"), report["states"]
    assert buckets(lab) == {lab.old_store.bucket_url}


def test_an_approved_switch_moves_the_volume(lab: Lab, stack: Stack, airflow: Airflow) -> None:
    processes = lab.mount_processes()
    run_id = start_switch(lab, airflow, dry_run=False, require_approval=True)
    airflow.answer(SWITCH, run_id, "approve", "Approve", deadline_s=RUN_S)
    state, report = finish(airflow, SWITCH, run_id)
    assert (state, report["outcome"]) == ("success", "switched"), report["states"]
    assert buckets(lab) == {lab.new_store.bucket_url}
    assert lab.mount_processes() == processes
    plan = f"/juicefs-storage/runs/{SWITCH}/{quote(run_id, safe='')}/plan"
    assert httpx.get(airflow.url + plan, timeout=60).status_code == 401
    assert log_in(airflow, "viewer", VIEWER_PASSWORD).get(plan).status_code == 200
    assert ".backup" in stack.in_service("airflow-worker", "ls", "-R", "/opt/airflow/backups")


def test_a_worker_dies_in_mid_copy_and_the_copy_ends_proven(lab: Lab, stack: Stack, airflow: Airflow) -> None:
    conf = {
        "source_conn_id": "minio_old", "source_bucket": lab.old_store.bucket, "source_prefix": PREFIX,
        "target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket, "target_prefix": PREFIX,
        # A few seconds of data for each of the tasks, so that the kill finds them at work.
        "partitions": PARTITIONS, "bandwidth_mib_s": 1, "dry_run": False,
    }  # fmt: skip
    run_id = airflow.trigger(SYNC, conf)
    victims: set[int] = set()
    victim = stack.containers("airflow-worker")[0]
    name = stack.docker("exec", victim, "python", "-c", "import socket; print(socket.getfqdn())").strip()
    path = f"/dags/{SYNC}/dagRuns/{run_id}/taskInstances/copy/listMapped"

    def at_work() -> bool:
        tasks = airflow.api("GET", path)["task_instances"] if lab.new_store.objects(PREFIX) else []
        running = [task for task in tasks if task["state"] == "running" and task["pid"]]
        victims.clear()
        victims.update(task["map_index"] for task in running if task["hostname"] == name)
        return bool(victims)

    wait_for("the worker copies", at_work, deadline_s=240, poll_s=0.3)
    stack.docker("kill", victim)
    state, report = finish(airflow, SYNC, run_id)
    assert (state, report["outcome"], report["problems"]) == ("success", "proven", [])
    tries = {task.map_index: task.try_number for task in airflow.task_states(SYNC, run_id) if task.task_id == "copy"}
    assert {index for index, number in tries.items() if number > 1} == victims
    assert len(stack.containers("airflow-worker")) == 1
    assert lab.new_store.objects(PREFIX) == lab.old_store.objects(PREFIX)

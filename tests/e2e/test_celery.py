"""Celery's workers, PostgreSQL and Redis, as docker-compose.yaml has them: a worker dies in mid-copy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from lab.airflow import Airflow
from lab.celery import PostgreSQL, Redis
from lab.environment import Lab, tear_down
from lab.process import Server, wait_for
from tests.support.labs import lab_required, up_with_objects
from tests.support.live_runs import SWITCH, buckets, finish, start_switch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SYNC = "juicefs_storage_sync"
WORKERS = ("worker-1", "worker-2")
PREFIX, OBJECTS, BYTES, PARTITIONS = "celery/", 120, 128 * 2**10, 3
#: docker-compose.yaml and deploy/values.yaml have 60. A task that lives reports every 5 s, later on a busy machine.
HEARTBEAT_TIMEOUT_S = 20


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    yield from up_with_objects(tmp_path_factory.mktemp("lab"), PREFIX, OBJECTS, BYTES)


@pytest.fixture(scope="module")
def airflow(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Airflow]:
    state = tmp_path_factory.mktemp("celery")
    with contextlib.ExitStack() as stack:
        stack.callback(tear_down, state, remove=False)
        with lab_required(), ThreadPoolExecutor() as pool:
            redis = pool.submit(Redis.start, state)
            postgresql = PostgreSQL.start(state)
            stack.callback(postgresql.remove)
            scheduler = {"task_instance_heartbeat_timeout": HEARTBEAT_TIMEOUT_S}
            airflow = Airflow.start_with_celery(
                state, postgresql, redis.result(), workers=WORKERS, settings={"scheduler": scheduler}
            )
        airflow.connect(lab.mariadb, lab.old_store, lab.new_store, lab.kube.kubeconfig)
        yield airflow


def at_work(lab: Lab, airflow: Airflow, run_id: str) -> dict[str, set[int]]:
    """Return which partitions are copied by which worker, once every one is and the first objects are there."""
    found: dict[str, set[int]] = {name: set() for name in WORKERS}
    path = f"/dags/{SYNC}/dagRuns/{run_id}/taskInstances/copy/listMapped"
    tasks = airflow.api("GET", path)["task_instances"] if lab.new_store.objects(PREFIX) else []
    for task in tasks:
        if task["state"] != "running" or not task["pid"]:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            parents = {parent.pid for parent in psutil.Process(task["pid"]).parents()}
            for name in WORKERS:
                if worker(airflow, name).pid in parents:
                    found[name].add(task["map_index"])
    return found if sum(map(len, found.values())) == PARTITIONS else {}


def worker(airflow: Airflow, name: str) -> Server:
    server = Server.load(airflow.state, f"airflow-{name}")
    assert server
    return server


def kill(server: Server) -> None:
    """SIGKILL a worker with all that it runs, as when its machine dies."""
    process = psutil.Process(server.pid)
    for member in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def tries(airflow: Airflow, run_id: str) -> dict[int, int]:
    """Return how often each partition's copy was begun."""
    return {
        task.map_index: task.try_number
        for task in airflow.task_states(SYNC, run_id)
        if task.task_id == "copy" and task.start
    }


def test_a_dry_run_of_a_switch_ends_as_planned(lab: Lab, airflow: Airflow) -> None:
    lab.copy_to_new_store()
    before = buckets(lab)
    state, report = finish(airflow, SWITCH, start_switch(lab, airflow, dry_run=True))
    assert (state, report["outcome"]) == ("success", "planned"), report["states"]
    assert buckets(lab) == before == {lab.old_store.bucket_url}


def test_a_worker_dies_in_mid_copy_and_the_copy_ends_proven(
    lab: Lab, airflow: Airflow, record_property: Callable[[str, object], None]
) -> None:
    conf = {
        "source_conn_id": "minio_old", "source_bucket": lab.old_store.bucket, "source_prefix": PREFIX,
        "target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket, "target_prefix": PREFIX,
        # A few seconds of data for each of the tasks, so that the kill finds all of them at work.
        "partitions": PARTITIONS, "bandwidth_mib_s": 3, "dry_run": False,
    }  # fmt: skip
    run_id = airflow.trigger(SYNC, conf)
    found: dict[str, set[int]] = {}

    def all_at_work() -> bool:
        found.update(at_work(lab, airflow, run_id))
        return bool(found)

    wait_for("every partition is at work", all_at_work, deadline_s=180, poll_s=0.2)
    victim = max(WORKERS, key=lambda name: len(found[name]))
    kill(worker(airflow, victim))
    killed = time.monotonic()

    def again() -> bool:
        begun = tries(airflow, run_id)
        return all(begun.get(index, 0) > 1 for index in found[victim])

    wait_for("what the dead worker ran is tried again", again, deadline_s=120, poll_s=0.5)
    record_property("seconds_until_tried_again", round(time.monotonic() - killed, 1))
    state, report = finish(airflow, SYNC, run_id)

    assert (state, report["outcome"], report["problems"]) == ("success", "proven", [])
    assert {index for index, number in tries(airflow, run_id).items() if number > 1} == found[victim]
    assert not worker(airflow, victim).alive()
    assert lab.new_store.objects(PREFIX) == lab.old_store.objects(PREFIX)

"""A lab with Airflow that the tests share: its volume has files, both stores hold them, and both serve."""

from __future__ import annotations

import pytest

from lab.airflow import Airflow
from lab.environment import Lab
from tests.support.live_runs import SHORT, SWITCH, buckets, finish


@pytest.fixture(scope="module")
def lab(airflow_lab: Lab) -> Lab:
    """The volume is on the old store, wherever the tests of another file left it."""
    for store in (airflow_lab.old_store, airflow_lab.new_store):
        server = store.server()
        if not server or not server.alive():
            store.start()
    if buckets(airflow_lab) != {airflow_lab.old_store.bucket_url}:
        assert airflow_lab.airflow is not None
        back = {"target_conn_id": "minio_old", "target_bucket": airflow_lab.old_store.bucket, "dry_run": False}
        run_id = airflow_lab.airflow.trigger(SWITCH, back | SHORT)
        state, report = finish(airflow_lab.airflow, SWITCH, run_id)
        assert (state, report["outcome"]) == ("success", "switched"), report["states"]
    airflow_lab.seed(30)
    airflow_lab.copy_to_new_store()
    return airflow_lab


@pytest.fixture(scope="module")
def airflow(lab: Lab) -> Airflow:
    assert lab.airflow is not None
    return lab.airflow

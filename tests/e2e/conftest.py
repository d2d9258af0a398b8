"""A lab with Airflow that the tests share: its volume has files, both stores hold them, and both serve."""

from __future__ import annotations

import pytest

from lab.airflow import Airflow
from lab.environment import Lab


@pytest.fixture(scope="module")
def lab(airflow_lab: Lab) -> Lab:
    """The volume is where the tests before left it."""
    for store in (airflow_lab.old_store, airflow_lab.new_store):
        server = store.server()
        if not server or not server.alive():
            store.start()
    if airflow_lab.mariadb.setting()["Bucket"] == airflow_lab.old_store.bucket_url:
        airflow_lab.seed(30)
        airflow_lab.copy_to_new_store()
    return airflow_lab


@pytest.fixture(scope="module")
def airflow(lab: Lab) -> Airflow:
    assert lab.airflow is not None
    return lab.airflow

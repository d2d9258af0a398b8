"""Each refusal is provoked in the lab, and found by the checks of the DAG's tasks.

The tasks' own code runs, without a scheduler: connections come from the environment, as Airflow offers.
"""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import base64
import contextlib
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes import client, config

from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.switch.params import resolve_switch_params
from lab.environment import Lab
from tests.support.refusals import Look, new_store


@pytest.fixture(scope="module")
def core(lab: Lab) -> client.CoreV1Api:
    return client.CoreV1Api(config.new_client_from_config(str(lab.kube.kubeconfig)))


@pytest.fixture(scope="module")
def apps(core: client.CoreV1Api) -> client.AppsV1Api:
    return client.AppsV1Api(core.api_client)


@pytest.fixture(scope="module", autouse=True)
def copied(lab: Lab) -> Iterator[None]:
    """A volume with some files and a copy of it; afterwards the new store is as empty as it was."""
    before = set(lab.new_store.objects())
    folder = lab.mounts()[0] / "refusals"
    folder.mkdir()
    for number in range(20):
        (folder / str(number)).write_bytes(secrets.token_bytes(5000))
    lab.copy_to_new_store()
    yield
    for key in set(lab.new_store.objects()) - before:
        lab.new_store.client().delete_object(Bucket=lab.new_store.bucket, Key=key)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.fixture
def connections(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set a connection, as an environment variable."""

    def connect(conn_id: str, **values: object) -> None:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(values))

    connect("kubernetes_default", conn_type="kubernetes", extra={"kube_config_path": str(lab.kube.kubeconfig)})
    connect("minio_new", **new_store(lab))
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    connect("juicefs_backup", conn_type="generic", password=key, extra={"path": tmp_path.as_uri()})
    return connect


@pytest.fixture
def look(lab: Lab, connections: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Run checks of the DAG and return their findings."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    from airflow.sdk.exceptions import AirflowFailException

    from include.juicefs_storage.errors import TransientError
    from include.juicefs_storage.switch.checks import consistency
    from include.juicefs_storage.tasks import context, runtime
    from include.juicefs_storage.tasks.switch import check

    # Whatever other tests have left in the volume: a sample that is all of it meets the block that a test changes.
    monkeypatch.setattr(consistency, "SAMPLE_BLOCKS", 10**6)

    def run(*names: str, **params: object) -> list[Finding]:
        given = {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket, "consistency": "off"}
        made = runtime.Runtime(resolve_switch_params(given | params, {}))
        pushed: dict[str, list[Any]] = {}
        kept = SimpleNamespace(
            xcom_push=lambda key, value: pushed.setdefault(key, []).append(value), xcom_pull=lambda **_: None
        )
        current = {"ti": kept, "dag": SimpleNamespace(dag_id="juicefs_storage_switch"), "run_id": "manual__test"}
        for module in (context.__name__, "include.juicefs_storage.tasks.switch.run"):
            monkeypatch.setattr(f"{module}.get_current_context", lambda: current)
        monkeypatch.setattr(runtime.Runtime, "of_run", lambda: made)
        made_by = names or tuple(check.CHECK_FUNCTIONS)
        for name in made_by:
            with contextlib.suppress(AirflowFailException, TransientError):
                getattr(check, name).function()
        assert len(pushed["findings"]) == len(made_by)
        return [Finding.model_validate(row) for rows in pushed["findings"] for row in rows]

    return run

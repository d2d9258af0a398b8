"""The rehearsal in the lab: a volume that could be switched, one that could not, and neither of them touched."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from lab.environment import Lab
from tests.support.harness import connections
from tests.support.world import row

if TYPE_CHECKING:
    from pathlib import Path

    from include.juicefs_storage.switch.readiness import Readiness


@pytest.fixture
def rehearse(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rehearse a volume of a registry, without a scheduler."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    for name, value in connections(lab).items():
        monkeypatch.setenv(name, value)
    from airflow.sdk.execution_time.context import set_current_context

    from include.juicefs_storage.tasks.rehearsal import rehearse_volume

    context: Any = {
        "ti": SimpleNamespace(xcom_push=lambda key, value: None, xcom_pull=lambda task_ids, key: None),
        "dag": SimpleNamespace(dag_id="juicefs_storage_rehearsal"),
        "run_id": "rehearsal",
    }

    def run(volume: str, earlier: list[dict[str, Any]], **entry: str) -> Readiness:
        registry = {volume: {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket} | entry}
        with set_current_context(context):
            return rehearse_volume(volume, registry, earlier)

    return run


def world(lab: Lab) -> list[object]:
    secrets = json.loads(lab.kubectl("get", "secrets", "-n", "juicefs", "-o", "json"))["items"]
    stores = (lab.old_store, lab.new_store)
    return [row(lab), [item["data"] for item in secrets], *(store.mutating_requests() for store in stores)]


def test_every_volume_gets_its_own_result_and_none_is_touched(lab: Lab, rehearse: Any) -> None:
    before = set(lab.new_store.objects())
    lab.seed(5)
    lab.copy_to_new_store()
    untouched, audited = world(lab), len(lab.kube.audit())

    ready = rehearse("home", [])
    assert ready.blockers == ()
    assert ready.ready
    assert {finding.check for finding in ready.findings} >= {
        "rights",
        "csi",
        "volume",
        "target",
        "consistency",
        "backup",
    }

    blocked = rehearse("home", [ready.event()], target_bucket="no-such-bucket")
    assert not blocked.ready
    assert blocked.since > ready.since
    assert "never created" in "".join(blocked.blockers)
    still = rehearse("home", [blocked.event(), ready.event()], target_conn_id="no_such_connection")
    assert (still.ready, still.since) == (False, blocked.since)
    assert "no_such_connection" in "".join(still.blockers)

    calls = lab.kube.audit()[audited:]
    assert [call for call in calls if call.mutating and call.subresource != "exec"] == []
    assert world(lab) == untouched
    client = lab.new_store.client()
    for key in lab.new_store.objects().keys() - before:
        client.delete_object(Bucket=lab.new_store.bucket, Key=key)

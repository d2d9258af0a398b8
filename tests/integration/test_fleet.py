"""A fleet in the lab, without a scheduler: who is found, what is compared before a start, who is well afterwards."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from include.juicefs_storage.errors import NeedsHumanError
from include.juicefs_storage.fleet.members import Member
from include.juicefs_storage.fleet.params import FleetParams
from include.juicefs_storage.switch.plan import Plan, fingerprint
from lab.environment import Lab
from lab.fleet import add_volume, mount_of, secret_name
from lab.keys import random_part
from lab.volume import copy_volume
from tests.support.harness import Run, connections
from tests.support.labs import up

if TYPE_CHECKING:
    from collections.abc import Iterator

#: The lab's heartbeat is one second.
SHORT = {"settle_s": 2, "client_timeout_s": 20, "rollout_timeout_s": 60, "late_commit_s": 2}


@pytest.fixture(scope="module")
def fleet_lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab with two more volumes, each with a file and its copy on the new store."""
    for lab in up(tmp_path_factory.mktemp("fleet"), airflow=False, heartbeat_s=1):
        for name in ("home", "work"):
            add_volume(lab, name, heartbeat_s=1)
            (mount_of(lab, name) / "file").write_bytes(name.encode() * 100_000)
            copy_volume(name, lab.old_store, lab.new_store)
        yield lab


@pytest.fixture
def fleet(fleet_lab: Lab, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What the tasks are made of, with the lab's connections, in a run."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    for name, value in connections(fleet_lab).items():
        monkeypatch.setenv(name, value)
    from airflow.sdk.execution_time.context import set_current_context

    from include.juicefs_storage.tasks.fleet import plan, waves

    context: Any = {"ti": SimpleNamespace(), "dag": SimpleNamespace(dag_id="juicefs_storage_fleet"), "run_id": "fleet"}
    with set_current_context(context):
        yield SimpleNamespace(**{**vars(plan), **vars(waves)})


def params(lab: Lab, **more: Any) -> Any:
    given = {"source_endpoint": lab.old_store.endpoint_url, "target_conn_id": "minio_new"}
    return FleetParams.validated(given | {"target_bucket": lab.new_store.bucket} | SHORT | more)


def add_secret(lab: Lab, secret: str, namespace: str, /, **values: str) -> None:
    data = {key.replace("_", "-"): base64.b64encode(value.encode()).decode() for key, value in values.items()}
    path = lab.state / f"{namespace}-{secret}.json"
    path.write_text(
        json.dumps(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret, "namespace": namespace}, "data": data}
        )
    )
    lab.kubectl("create", "--validate=false", "-f", str(path))


def find(fleet: Any, lab: Lab, registry: dict[str, dict[str, Any]] | None = None, **more: Any) -> dict[str, Member]:
    return {member.key: member for member in fleet.find_members(params(lab, **more), registry or {})}


def test_every_volume_on_the_endpoint_is_found_and_none_is_passed_over_in_silence(fleet_lab: Lab, fleet: Any) -> None:
    old, metaurl = fleet_lab.old_store.bucket_url, fleet_lab.mariadb.meta_url_with_password
    found = find(fleet, fleet_lab)
    assert {key: member.secret for key, member in found.items()} == {
        "home": "juicefs/home-secret", "myjfs": "juicefs/juicefs-sc-secret", "work": "juicefs/work-secret",
    }  # fmt: skip
    assert {member.before for member in found.values()} == {old}
    assert all(member.ready and member.uuid and member.params for member in found.values())
    assert found["home"].params["target_bucket"] == fleet_lab.new_store.bucket
    assert random_part(fleet_lab.old_store.secret_key) not in repr(found)
    assert set(find(fleet, fleet_lab, exclude=["home"])) == {"myjfs", "work"}
    assert find(fleet, fleet_lab, source_endpoint=fleet_lab.new_store.endpoint_url) == {}

    registry = {
        "the-home": {"secret_name": secret_name("home"), "target_conn_id": "minio_new", "target_bucket": "homes"}
    }
    listed = fleet.find_members(FleetParams.validated({"volumes": ["the-home", "gone"]}), registry)
    assert [(member.key, member.ready) for member in listed] == [("home", True), ("gone", False)]
    assert listed[0].params["target_bucket"] == "homes"
    assert "registered: the-home" in listed[1].blockers[0]

    nowhere = f"{metaurl}_of_somebody_else"
    try:
        add_secret(fleet_lab, "dead", "juicefs", name="dead", metaurl=nowhere, bucket=old, storage="minio")
        add_secret(fleet_lab, "untold", "juicefs", name="untold", metaurl=nowhere)
        add_secret(
            fleet_lab, "other", "juicefs", name="other", metaurl=nowhere, bucket="http://127.0.0.1:1/x", storage="s3"
        )
        add_secret(fleet_lab, "far", "apps", name="far", metaurl=nowhere, bucket=old, storage="minio")
        # What the setting says counts, not what a Secret says.
        add_secret(fleet_lab, "stale", "juicefs", name="myjfs", metaurl=metaurl, bucket="http://127.0.0.1:1/x")
        found = find(fleet, fleet_lab, exclude=["home", "work"])
    finally:
        for namespace, name in (
            ("juicefs", "dead"),
            ("juicefs", "untold"),
            ("juicefs", "other"),
            ("apps", "far"),
            ("juicefs", "stale"),
        ):
            fleet_lab.kubectl("-n", namespace, "delete", "secret", name, "--ignore-not-found")
    assert {key: member.ready for key, member in found.items()} == {
        "myjfs": True, "dead": False, "untold": False, "far": False,
    }  # fmt: skip
    assert "namespace apps" in found["far"].blockers[0]
    assert random_part(fleet_lab.mariadb.password) not in repr(found)


def test_what_was_approved_is_what_is_started(fleet_lab: Lab, fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from include.juicefs_storage.switch.params import SwitchParams

    member = find(fleet, fleet_lab)["work"]
    runtime = fleet.Runtime(SwitchParams.model_validate(member.params))
    approved = member.model_copy(
        update={"fingerprint": fingerprint(runtime.target(runtime.setting()), runtime.vault.key), "after": "new"}
    )
    fleet.require_as_approved(approved)
    with pytest.raises(NeedsHumanError, match="changed"):
        fleet.require_as_approved(approved.model_copy(update={"before": "http://elsewhere/x"}))
    connection = json.loads(connections(fleet_lab)["AIRFLOW_CONN_MINIO_NEW"]) | {"login": "ANOTHERKEY"}
    monkeypatch.setenv("AIRFLOW_CONN_MINIO_NEW", json.dumps(connection))
    with pytest.raises(NeedsHumanError, match="was not touched"):
        fleet.require_as_approved(approved)


def test_a_volume_that_was_moved_is_watched_by_its_clients_its_pods_and_its_blocks(
    fleet_lab: Lab, fleet: Any, tmp_path: Any
) -> None:
    other = fleet_lab.mariadb.query("SELECT value FROM jfs_setting")
    member = find(fleet, fleet_lab)["home"]
    run = Run(fleet_lab, tmp_path / "run", "fleet.home", member.conf(dry_run=False, restart_csi=False))
    assert run.go() == "switched", run.errors
    carried_out = Plan.model_validate(run.xcom("plan"))
    assert len(carried_out.mount_pods) == 1

    health = fleet.examine(member, carried_out, "salt", blocks=True)
    assert health["clients"] == 1
    assert health["blocks"] >= 1
    assert not list(mount_of(fleet_lab, "home").glob(".storage-switch-*"))
    assert fleet_lab.mariadb.query("SELECT value FROM jfs_setting") == other, "another volume moved"
    assert {member.key for member in find(fleet, fleet_lab).values()} == {"myjfs", "work"}
    there = fleet.find_members(
        FleetParams.validated({"volumes": ["home"]}),
        {
            "home": {
                "secret_name": secret_name("home"),
                "target_conn_id": "minio_new",
                "target_bucket": fleet_lab.new_store.bucket,
            }
        },
    )
    assert [(each.key, each.there) for each in there] == [("home", True)]

    pod = carried_out.mount_pods[0]
    restarted = carried_out.model_copy(update={"mount_pods": (pod.model_copy(update={"uid": "before"}),)})
    with pytest.raises(NeedsHumanError, match="Pods restarted"):
        fleet.examine(member, restarted, "salt", blocks=False)
    elsewhere = carried_out.model_copy(update={"after": carried_out.before})
    with pytest.raises(NeedsHumanError, match="the setting now names"):
        fleet.examine(member, elsewhere, "salt", blocks=False)
    key = next(key for key in fleet_lab.new_store.objects("home/chunks/"))
    fleet_lab.new_store.client().delete_object(Bucket=fleet_lab.new_store.bucket, Key=key)
    assert fleet.examine(member, carried_out, "salt", blocks=False)["clients"] == 1
    with pytest.raises(NeedsHumanError, match="1 of"):
        fleet.examine(member, carried_out, "salt", blocks=True)

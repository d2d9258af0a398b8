"""The ways in which a storage changes beside the copy side by side: other keys, another address, moved as a whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from lab.environment import Lab
from lab.process import wait_for
from lab.seaweed import Store
from tests.support.faults import StuckClient
from tests.support.harness import SHORT, Run
from tests.support.labs import up
from tests.support.s3_proxy import S3Proxy
from tests.support.worker import Fault
from tests.support.world import assert_nothing_lost, writing

_NEW_KEYS = ("NEWKEYNEWKEYNEWKEY01", "new/secret+value0123456789abcdefghij==")
_FAILS = Fault("prove_no_restarts", "before", error="injected", tries=9)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    for lab in up(tmp_path_factory.mktemp("changes"), airflow=False, heartbeat_s=1):
        lab.seed(20)
        lab.copy_to_new_store()
        yield lab


@pytest.fixture
def start(lab: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Run]:
    """Make a run that moves the volume to a store."""

    def make(target: Store, *faults: Fault, endpoint: str = "", **params: Any) -> Run:
        name = f"{request.node.name}-{len(list(tmp_path.iterdir()))}"
        given = {"target_conn_id": "minio_to", "target_bucket": target.bucket}
        run = Run(lab, tmp_path / name, name, SHORT | given | params, faults)
        extra = {"endpoint_url": endpoint or target.endpoint_url, "config_kwargs": {"s3": {"addressing_style": "path"}}}
        connection = {"conn_type": "aws", "login": target.access_key, "password": target.secret_key, "extra": extra}
        run.environment["AIRFLOW_CONN_MINIO_TO"] = json.dumps(connection)
        return run

    return make


@pytest.fixture
def rotated(lab: Lab, start: Callable[..., Run]) -> Iterator[Store]:
    """The old store, with other keys that it takes as well. In the end the volume is back on the keys of the lab."""
    store = lab.old_store.with_keys(*_NEW_KEYS)
    lab.old_store.take_only(lab.old_store, store)
    yield store
    lab.old_store.take_only(lab.old_store, store)
    _back(lab, start)
    lab.old_store.take_only(lab.old_store)


def _back(lab: Lab, start: Callable[..., Run]) -> None:
    form = lab.mariadb.setting()
    if (form["Bucket"], form["AccessKey"]) != (lab.old_store.bucket_url, lab.old_store.access_key):
        run = start(lab.old_store)
        assert run.go() == "switched", run.errors


def _kind(run: Run) -> str:
    return str(run.xcom("plan")["change"]["kind"])


def _proven_by(run: Run) -> set[str]:
    return {client["by"] for client in run.xcom("prove_clients")["clients"]}


def _access_keys(lab: Lab) -> set[str]:
    """Which keys the clients show."""
    return {json.loads((mount / ".config").read_text())["Format"]["AccessKey"] for mount in lab.mounts()}


def _assert_stuck_rolls_back(lab: Lab, run: Run, stuck: StuckClient) -> None:
    run.before = {"write_setting": stuck.stick, "collect_diagnostics": stuck.release}
    assert run.go() == "rolled back", run.errors
    assert "it could not use the setting that it had read" in run.errors["prove_clients"]
    assert_nothing_lost(lab)


def test_keys_are_rotated_without_a_copy_or_a_wait(lab: Lab, start: Callable[..., Run], rotated: Store) -> None:
    run = start(rotated, late_commit_s=600)  # is not waited for
    with writing(lab, "rotation") as writer:
        assert run.go() == "switched", run.errors
    assert _kind(run) == "keys"
    assert run.xcom("copy_ahead") == run.xcom("follow_writes") == run.xcom("catch_up") == {"copied": 0}
    assert run.xcom("catch_up_late")["one_store"]
    assert _proven_by(run) == {"log"}
    assert _access_keys(lab) == {rotated.access_key}
    report = run.xcom("finalize", "markdown")
    assert "Other keys for the same bucket" in report
    assert "The store still takes the old key" in report
    assert_nothing_lost(lab, writer)


@pytest.mark.slow
def test_a_rotation_shows_that_only_the_secret_key_changes(lab: Lab, start: Callable[..., Run], rotated: Store) -> None:
    """The store knows one secret key of an access key: the old one is refused from the moment that it changes."""
    store = lab.old_store.with_keys(lab.old_store.access_key, "another/secret+value01234567890abcdefg==")
    lab.old_store.take_only(store, rotated)
    run = start(store)
    assert run.go() == "switched", run.errors
    before, after = run.xcom("plan")["secret_keys"]
    assert before
    assert after
    assert before != after
    assert _proven_by(run) == {"key"}
    assert_nothing_lost(lab)
    assert start(rotated).go() == "switched"


def test_a_revoked_key_is_replaced_with_the_new_one(lab: Lab, start: Callable[..., Run], rotated: Store) -> None:
    """The way out of an outage: no client can read or write, and every look is taken with the new key."""
    lab.old_store.take_only(rotated)
    run = start(rotated)
    assert run.go() == "switched", run.errors
    assert _kind(run) == "keys"
    assert _proven_by(run) == {"key"}
    assert_nothing_lost(lab)


@pytest.mark.slow
def test_a_rotation_goes_back_while_the_old_key_is_valid(lab: Lab, start: Callable[..., Run], rotated: Store) -> None:
    run = start(rotated, _FAILS)
    assert run.go() == "rolled back", run.errors
    assert _access_keys(lab) == {lab.old_store.access_key}
    assert_nothing_lost(lab)


@pytest.mark.slow
def test_a_rotation_does_not_go_back_to_a_key_that_was_revoked_meanwhile(
    lab: Lab, start: Callable[..., Run], rotated: Store
) -> None:
    run = start(rotated, _FAILS)
    run.before = {"prove_no_restarts": lambda: lab.old_store.take_only(rotated)}
    assert run.go() == "held", run.errors
    assert _access_keys(lab) == {rotated.access_key}
    assert_nothing_lost(lab)


@pytest.fixture
def minio(lab: Lab, start: Callable[..., Run], rotated: Store) -> Iterator[S3Proxy]:
    """The volume reaches its store at an address that has MinIO's admin API."""
    with S3Proxy(lab.old_store.endpoint_url) as proxy:
        there = start(lab.old_store, endpoint=proxy.url)
        assert there.go() == "switched", there.errors
        yield proxy
        proxy.fenced, proxy.read_only = set(), False
        back = start(rotated)
        assert back.go() == "switched", back.errors


def _with_fence(run: Run, proxy: S3Proxy) -> Run:
    admin = {"conn_type": "aws", "login": "admin", "password": "admin-key", "extra": {"endpoint_url": proxy.url}}
    run.environment["AIRFLOW_CONN_MINIO_ADMIN"] = json.dumps(admin)
    run.params["fence_conn_id"] = "minio_admin"
    return run


@pytest.mark.slow
def test_the_old_key_is_denied_for_a_moment_to_prove_that_no_client_uses_it(
    lab: Lab, start: Callable[..., Run], rotated: Store, minio: S3Proxy
) -> None:
    run = _with_fence(start(rotated, endpoint=minio.url), minio)
    with writing(lab, "denied") as writer:
        assert run.go() == "switched", run.errors
    assert run.xcom("prove_clients")["denied"] == len(lab.mounts())
    assert minio.fenced == {lab.old_store.access_key}
    assert (minio.groups, minio.read_only) == (set(), False)
    assert "while the store refused the old key" in run.xcom("finalize", "markdown")
    assert writer.summary().write_errors == []
    assert_nothing_lost(lab, writer)


@pytest.mark.slow
def test_a_client_that_cannot_write_while_the_old_key_is_denied_is_not_proven(
    lab: Lab, start: Callable[..., Run], rotated: Store, minio: S3Proxy
) -> None:
    """The store denies the new key as well, as if the clients had kept theirs."""
    run = _with_fence(start(rotated, endpoint=minio.url), minio)
    run.before["prove_clients"] = lambda: minio.fenced.add(rotated.access_key)
    run.before["decide"] = lambda: minio.fenced.discard(rotated.access_key)
    assert run.go() == "rolled back", run.errors
    assert run.failed() >= {"prove_clients"}
    assert (minio.groups, minio.read_only) == (set(), False)
    assert_nothing_lost(lab)


@pytest.fixture
def stuck(lab: Lab) -> Iterator[StuckClient]:
    """The client of the first mount pod; it is released in the end."""
    client = StuckClient.first(lab)
    yield client
    client.release()


@pytest.mark.slow
def test_a_client_that_keeps_the_old_key_is_not_proven(
    lab: Lab, start: Callable[..., Run], rotated: Store, stuck: StuckClient
) -> None:
    """Its blocks go to the same bucket, signed with the old key."""
    _assert_stuck_rolls_back(lab, start(rotated), stuck)


@pytest.mark.slow
def test_another_address_of_one_store_is_told_from_another_store(lab: Lab, start: Callable[..., Run]) -> None:
    address = lab.old_store.endpoint_url.replace("127.0.0.1", "localhost")
    dry = start(lab.old_store, endpoint=address, dry_run=True)
    assert dry.go() == "planned", dry.errors
    run = start(lab.old_store, endpoint=address)
    with writing(lab, "address") as writer:
        assert run.go() == "switched", run.errors
    assert _kind(dry) == _kind(run) == "address"
    assert _proven_by(run) == {"log"}
    assert_nothing_lost(lab, writer)
    _back(lab, start)


@pytest.mark.slow
def test_a_client_that_keeps_the_old_address_is_not_proven(
    lab: Lab, start: Callable[..., Run], stuck: StuckClient
) -> None:
    """Its blocks are in the store that both addresses name."""
    run = start(lab.old_store, endpoint=lab.old_store.endpoint_url.replace("127.0.0.1", "localhost"))
    _assert_stuck_rolls_back(lab, run, stuck)


@pytest.fixture
def moved(lab: Lab, start: Callable[..., Run]) -> Iterator[Store]:
    """The new store holds all of the volume, and the old one serves no more. In the end all is as it was."""
    _back(lab, start)
    for mount in lab.mounts():
        wait_for("the mount to serve", lambda mount=mount: list(mount.iterdir()), deadline_s=30)  # type: ignore[misc]
    lab.copy_to_new_store()
    lab.old_store.stop()
    yield lab.new_store
    lab.old_store.start()
    with suppress(AssertionError):
        _back(lab, start)


def test_a_store_that_moved_as_a_whole_is_proven_by_the_metadata(
    lab: Lab, start: Callable[..., Run], moved: Store
) -> None:
    run = start(moved)
    assert run.go() == "switched", run.errors
    assert _kind(run) == "moved"
    assert _proven_by(run) == {"block"}
    assert "compared with the metadata alone" in run.xcom("plan", "markdown")
    assert_nothing_lost(lab)


@pytest.mark.slow
def test_a_client_that_does_not_find_the_store_that_moved_is_not_sent_back(
    lab: Lab, start: Callable[..., Run], moved: Store, stuck: StuckClient
) -> None:
    # A write to a store that is gone hangs for half a minute.
    run = start(moved, client_timeout_s=60)
    run.before = {"write_setting": stuck.stick}
    assert run.go() == "held", run.errors
    assert "it could not use the setting that it had read" in run.errors["prove_clients"]
    stuck.release()
    run.clear("prove_clients", downstream=True)
    assert run.go() == "switched", {k: v for k, v in run.errors.items() if v}
    assert_nothing_lost(lab)


@pytest.mark.slow
def test_a_block_that_did_not_move_with_its_store_is_named_with_its_file(
    lab: Lab, start: Callable[..., Run], moved: Store
) -> None:
    key = next(key for key in moved.objects("myjfs/chunks/") if not key.endswith("_0"))
    body = moved.client().get_object(Bucket=moved.bucket, Key=key)["Body"].read()
    moved.client().delete_object(Bucket=moved.bucket, Key=key)
    try:
        run = start(moved)
        assert run.go() == "refused"
        assert key in run.errors["check_consistency"]
        assert "accept_lost_blocks=1" in run.errors["check_consistency"]
        assert "Files of these: /" in run.errors["check_consistency"]
    finally:
        moved.client().put_object(Bucket=moved.bucket, Key=key, Body=body)


@pytest.mark.slow
def test_a_volume_does_not_go_back_to_a_store_that_has_moved_away(
    lab: Lab, start: Callable[..., Run], moved: Store
) -> None:
    run = start(moved, _FAILS)
    assert run.go() == "held", run.errors
    assert lab.mariadb.setting()["Bucket"] == moved.bucket_url
    assert_nothing_lost(lab)

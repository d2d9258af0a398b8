"""The ways in which a storage changes beside the copy side by side: other keys, another address, moved as a whole.

Each way, of those and of the others, with what may go wrong in it. The tests without a file are here:

| | a client is stuck | the old key is refused | a proof fails after the cut-over |
|---|---|---|---|
| A keys | `test_a_stuck_client_…` | meanwhile: `test_a_failure_…` | `test_a_failure_…` |
| A' keys, the old one refused | `test_a_stuck_client_…` | that is the case itself | `test_a_failure_…` |
| B moved as a whole | `test_a_stuck_client_…` | `test_a_store_that_moved_…` | `test_a_failure_…` |
| B' another address | `test_a_stuck_client_…` | `test_another_address_whose_old_key_…` | `test_a_failure_…` |
| C copied | `test_unseen.py` | `test_way_back.py` | `test_failing.py`, `test_kill.py` |
| D, E another kind, TLS, a token | `integration/test_storage_kinds.py` | the new token: there | there |
| F read-only mounts, a gateway | `test_clients.py`: the mount | `test_a_revoked_key_…` | `test_clients.py` |
| F a second cluster | `test_second_cluster.py` | as without it | `test_second_cluster.py` |

No such cells: C' (a store that only one side reaches) and G (shards) are refused before anything is touched, by
`integration/refusals/test_target.py` and `unit/switch/checks/test_clients.py`. H (no client) has no client to be stuck,
and differs from its row in nothing else. A gateway that is stuck cannot be told: nothing here writes through it. That
the old key is refused in D and E is C once more: the kind of the new store plays no part in it.
"""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from lab.environment import Lab
from lab.process import wait_for
from lab.seaweed import Store
from tests.support.faults import StuckClient
from tests.support.harness import SHORT, Run
from tests.support.labs import up
from tests.support.mounted import mounted
from tests.support.s3_proxy import Fault as Silence
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


def _other_address(lab: Lab) -> str:
    return lab.old_store.endpoint_url.replace("127.0.0.1", "localhost")


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
    assert "To undo it, at any time" in report
    told = report.split("### Findings")[0]  # the checks name their side, whichever way the storage changes
    assert "new store" not in told
    assert "blocks were copied" not in told
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


@pytest.mark.parametrize("read_only", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_revoked_key_is_replaced_with_the_new_one(
    lab: Lab, start: Callable[..., Run], rotated: Store, read_only: bool
) -> None:
    """The way out of an outage: no client can read or write, and every look is taken with the new key."""
    core = client.CoreV1Api(config.new_client_from_config(str(lab.kube.kubeconfig)))
    run = start(rotated)
    with mounted(core, "ro") if read_only else nullcontext():
        lab.old_store.take_only(rotated)
        assert run.go() == "switched", run.errors
    assert _kind(run) == "keys"
    assert "the key in the backup does not open" in run.xcom("finalize", "markdown")
    assert _proven_by(run) == ({"key", "read_key"} if read_only else {"key"})
    assert_nothing_lost(lab)


@pytest.mark.slow
def test_a_new_key_that_is_withdrawn_meanwhile_leads_back_to_the_old_one(
    lab: Lab, start: Callable[..., Run], rotated: Store
) -> None:
    """Every look of the way back is then taken with the key that the clients have again."""
    run = start(rotated, client_timeout_s=60)
    run.before = {"prove_clients": lambda: lab.old_store.take_only(lab.old_store)}
    assert run.go() == "rolled back", {k: v for k, v in run.errors.items() if v}
    assert _access_keys(lab) == {lab.old_store.access_key}
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
    found = StuckClient.first(lab)
    yield found
    found.release()


@pytest.mark.slow
def test_another_address_of_one_store_is_told_from_another_store(lab: Lab, start: Callable[..., Run]) -> None:
    address = _other_address(lab)
    dry = start(lab.old_store, endpoint=address, dry_run=True)
    assert dry.go() == "planned", dry.errors
    run = start(lab.old_store, endpoint=address)
    with writing(lab, "address") as writer:
        assert run.go() == "switched", run.errors
    assert _kind(dry) == _kind(run) == "address"
    assert _proven_by(run) == {"log"}
    assert_nothing_lost(lab, writer)
    _back(lab, start)


@pytest.fixture
def moved(lab: Lab, start: Callable[..., Run], request: pytest.FixtureRequest) -> Iterator[Store]:
    """The new store holds all of the volume, and the old one serves no more: it is down, or its key is refused.

    In the end all is as it was.
    """
    _back(lab, start)
    for mount in lab.mounts():
        wait_for("the mount to serve", lambda mount=mount: list(mount.iterdir()), deadline_s=30)  # type: ignore[misc]
    lab.copy_to_new_store()
    refused = getattr(request, "param", "") == "refuses its key"
    if refused:
        lab.old_store.take_only(lab.old_store.with_keys(*_NEW_KEYS))
    else:
        lab.old_store.stop()
    yield lab.new_store
    if refused:
        lab.old_store.take_only(lab.old_store)
    else:
        lab.old_store.start()
    with suppress(AssertionError):
        _back(lab, start)


@pytest.mark.parametrize("moved", ["is down", pytest.param("refuses its key", marks=pytest.mark.slow)], indirect=True)
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
@pytest.mark.timeout(900)
def test_an_old_store_that_is_silent_delays_no_task_for_minutes(lab: Lab, start: Callable[..., Run]) -> None:
    """It takes connections and answers nothing: whoever looks at it waits until the time of the look is over."""
    _back(lab, start)
    with S3Proxy(lab.old_store.endpoint_url) as proxy:
        there = start(lab.old_store, endpoint=proxy.url)
        assert there.go() == "switched", there.errors
        lab.copy_to_new_store()
        proxy.faults = [Silence.HANG]
        dry = start(lab.new_store, dry_run=True)
        assert dry.go() == "planned", dry.errors
        run = start(lab.new_store, client_timeout_s=60)
        assert run.go() == "switched", run.errors
    took_s = {
        f"{task}, {'dry' if each is dry else 'real'}": s for each in (dry, run) for task, s in each.took_s.items()
    }
    # Each takes half a minute at most, and took two minutes and more; a loaded machine adds to it.
    assert not {task: s for task, s in took_s.items() if task.startswith("check_") and s >= 45}
    assert run.took_s["finalize"] < 60
    assert _kind(dry) == _kind(run) == "moved"
    assert_nothing_lost(lab)
    _back(lab, start)


@pytest.mark.slow
@pytest.mark.parametrize("consistency", ["listing", "content"])
def test_a_block_that_did_not_move_whole_with_its_store_is_named_with_its_file(
    lab: Lab, start: Callable[..., Run], moved: Store, consistency: str
) -> None:
    key = next(key for key in moved.objects("myjfs/chunks/") if not key.endswith("_0"))
    s3 = moved.client()
    place: Any = {"Bucket": moved.bucket, "Key": key}
    had = s3.get_object(**place)
    body, kept = had["Body"].read(), had["Metadata"]
    if consistency == "content":
        s3.put_object(**place, Body=body[:-1] + bytes([body[-1] ^ 1]), Metadata=kept)
    else:
        s3.delete_object(**place)
    try:
        run = start(moved, consistency=consistency)
        assert run.go() == "refused"
        assert key in run.errors["check_consistency"]
        assert "accept_lost_blocks=1" in run.errors["check_consistency"]
        assert "Files of these: /" in run.errors["check_consistency"]
        assert ("its content has the CRC32C" in run.errors["check_consistency"]) == (consistency == "content")
    finally:
        s3.put_object(**place, Body=body, Metadata=kept)


Make = Callable[..., Run]


@pytest.fixture
def row(lab: Lab, start: Make, request: pytest.FixtureRequest) -> Callable[[str], Make]:
    """Prepare a row of the table above, and return what makes its run."""

    def prepare(name: str) -> Make:
        if name == "moved":
            # A write to a store that is gone hangs for half a minute.
            return partial(start, request.getfixturevalue("moved"), client_timeout_s=60)
        if name == "address":
            _back(lab, start)
            request.addfinalizer(lambda: _back(lab, start))
            return partial(start, lab.old_store, endpoint=_other_address(lab))
        store = request.getfixturevalue("rotated")
        if name == "keys, the old one refused":
            lab.old_store.take_only(store)
            # As where the store is gone: a write that the store refuses is tried again for a long time.
            return partial(start, store, client_timeout_s=60)
        return partial(start, store)

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "outcome"),
    [("keys", "rolled back"), ("keys, the old one refused", "held"), ("moved", "held"), ("address", "rolled back")],
)
def test_a_stuck_client_is_not_proven_and_goes_back_only_where_it_is_served(
    lab: Lab, row: Callable[[str], Make], stuck: StuckClient, name: str, outcome: str
) -> None:
    """Where the store stays, its blocks are there all the same, by the old key or at the old address."""
    run = row(name)()
    run.before = {"write_setting": stuck.stick}
    if outcome == "rolled back":
        run.before["collect_diagnostics"] = stuck.release
    assert run.go() == outcome, run.errors
    assert "it could not use the setting that it had read" in run.errors["prove_clients"]
    if outcome == "held":
        stuck.release()
        run.clear("prove_clients", downstream=True)
        assert run.go() == "switched", {k: v for k, v in run.errors.items() if v}
    assert_nothing_lost(lab)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "refused_meanwhile", "outcome"),
    [
        ("keys", False, "rolled back"),
        ("keys", True, "held"),
        ("keys, the old one refused", False, "held"),
        ("moved", False, "held"),
        ("address", False, "rolled back"),
    ],
)
def test_a_failure_after_the_cut_over_goes_back_only_to_where_the_clients_are_served(
    lab: Lab, row: Callable[[str], Make], name: str, refused_meanwhile: bool, outcome: str
) -> None:
    make = row(name)
    before = lab.mariadb.setting()
    run = make(_FAILS)
    if refused_meanwhile:
        run.before = {"prove_no_restarts": lambda: lab.old_store.take_only(lab.old_store.with_keys(*_NEW_KEYS))}
    assert run.go() == outcome, run.errors
    after = lab.mariadb.setting()
    same = all(after[field] == before[field] for field in ("Bucket", "AccessKey"))
    assert same == (outcome == "rolled back")
    assert _access_keys(lab) == {after["AccessKey"]}
    assert_nothing_lost(lab)


@pytest.mark.slow
def test_another_address_whose_old_key_is_refused_is_a_store_that_moved(
    lab: Lab, start: Callable[..., Run], rotated: Store
) -> None:
    """Nothing but its key opens the old address, so that it cannot be told whether it is the same store."""
    lab.old_store.take_only(rotated)
    run = start(rotated, endpoint=_other_address(lab))
    assert run.go() == "switched", run.errors
    assert _kind(run) == "moved"
    assert "InvalidAccessKeyId" in run.xcom("plan")["change"]["why"]
    assert _proven_by(run) == {"block"}
    assert_nothing_lost(lab)


@pytest.mark.slow
def test_an_old_store_that_airflow_reaches_and_the_pods_do_not(lab: Lab, start: Make) -> None:
    """Nothing could be written back there, nor is it known what the clients hold."""
    lab.copy_to_new_store()
    with S3Proxy(lab.old_store.endpoint_url) as proxy:
        there = start(lab.old_store, endpoint=proxy.url)
        assert there.go() == "switched", there.errors
    try:
        run = start(lab.new_store, source_conn_id="minio_old")
        assert run.go() == "refused"
        served = [row["message"] for row in run.xcom("check_volume", "findings") if row["check"] == "served"]
        assert len(served) == len(lab.mounts())
        assert "The old store, by the volume's setting: pod juicefs-" in served[0]
        assert f"cannot use {proxy.url}: " in served[0]
        assert "cannot be proven on the store that the volume is on" in run.errors["check_volume"]
    finally:
        _back(lab, start)

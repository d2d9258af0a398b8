"""The adapters of the simulated world answer as the real ones do: each test runs on both."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from kubernetes import client, config
from pydantic import SecretStr

from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.vault import FileVault, Keyring
from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.objects.model import KeyRange, ObjectOutcome
from include.juicefs_storage.ports import Lease, SecretObject
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.mount_pods import MOUNT_POD_SELECTOR
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from lab.environment import Lab
from lab.seaweed import Store
from tests.simulation.adapters import Ask, SimulatedCluster, SimulatedMetadata, SimulatedVault
from tests.simulation.stores import SimulatedBucket, SimulatedEngine
from tests.simulation.world import NAMESPACE, Setup, World

#: Below this both sides of a test keep their objects.
FOLDER = f"contract-{secrets.token_hex(4)}/"
WRONG = SecretStr("not the secret key")


@dataclass
class Side:
    """One of the two worlds.

    Attributes:
        store_with: Makes the new store, as Airflow reaches it, with these keys in place of its own.
        put: Writes an object: to the old store, or to the new one; by its number.
    """

    metadata: Any
    cluster: Any
    vault: Any
    old: Any
    new: Any
    engine: Any
    secret: str
    store_with: Callable[[SecretStr], Any]
    put: Callable[[int, str, bytes], None]


class _OneAtATime:
    """An adapter of a simulated world, called from outside of its processes."""

    def __init__(self, world: World, adapter: Any) -> None:
        self._world, self._adapter = world, adapter

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._adapter, name)
        return (lambda *args, **kwargs: self._call(found, args, kwargs)) if callable(found) else found

    def _call(self, method: Any, args: Any, kwargs: Any) -> Any:
        left: list[tuple[Any, Exception | None]] = []

        def call() -> None:
            try:
                result = method(*args, **kwargs)
                left.append((list(result) if isinstance(result, Iterator) else result, None))
            except Exception as error:  # noqa: BLE001  it is raised where the adapter was called
                left.append((None, error))

        process = self._world.scheduler.spawn("contract", call)
        self._world.scheduler.run(lambda: process.ended)
        result, error = left[0]
        if error:
            raise error
        return result


def _simulated() -> Side:
    world = World(Random(1), Setup())  # noqa: S311
    ask = Ask(world)

    def bucket(config: StorageConfig) -> SimulatedBucket:
        return SimulatedBucket(world.scheduler, world.store_of(config), config, ask)

    def put(number: int, key: str, content: bytes) -> None:
        store = world.store_of((world.old, world.new)[number])
        store.put(f"{FOLDER}{key}", len(content), content.decode(), "a test")

    world.secrets["contract"] = SecretObject(NAMESPACE, "contract", "1", data={"bucket": "a", "name": "b"})
    old, new = bucket(world.old), bucket(world.new)
    return Side(
        _OneAtATime(world, SimulatedMetadata(ask)),
        _OneAtATime(world, SimulatedCluster(ask)),
        _OneAtATime(world, SimulatedVault(ask)),
        _OneAtATime(world, old),
        _OneAtATime(world, new),
        _OneAtATime(world, SimulatedEngine(old, new)),
        "contract",
        lambda key: _OneAtATime(world, bucket(replace(world.new, secret_key=key))),
        put,
    )


def _storage(store: Store) -> StorageConfig:
    return StorageConfig("minio", store.bucket_url, SecretStr(store.access_key), SecretStr(store.secret_key))


@pytest.fixture(scope="module")
def real(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    from airflow.sdk import ObjectStoragePath

    core = client.CoreV1Api(config.new_client_from_config(str(lab.kube.kubeconfig)))
    core.create_namespaced_secret(
        "juicefs", {"metadata": {"name": "contract"}, "stringData": {"bucket": "a", "name": "b"}}
    )
    metadata = MySqlMetadata.from_metaurl(Metaurl.parse(lab.mariadb.meta_url_with_password))
    stores = (lab.old_store, lab.new_store)
    old, new = (S3Bucket.from_storage(_storage(store)) for store in stores)

    def put(number: int, key: str, content: bytes) -> None:
        stores[number].client().put_object(Bucket=stores[number].bucket, Key=f"{FOLDER}{key}", Body=content)

    before = metadata.read_setting()
    engine = NativeEngine(old.store, new.store)
    yield Side(
        metadata,
        KubernetesCluster(core.api_client, "juicefs"),
        FileVault(Keyring(b"k" * 32, ()), ObjectStoragePath(f"file://{tmp_path_factory.mktemp('vault')}")),
        old,
        new,
        engine,
        "contract",
        lambda key: S3Bucket.from_storage(replace(_storage(lab.new_store), secret_key=key)),
        put,
    )
    engine.close()
    metadata.replace_setting(metadata.read_setting(), before)
    core.delete_namespaced_secret("contract", "juicefs")
    for store in stores:
        for key in store.objects(FOLDER):
            store.client().delete_object(Bucket=store.bucket, Key=key)


@pytest.fixture(params=["real", "simulated"])
def side(request: pytest.FixtureRequest) -> Side:
    return request.getfixturevalue("real") if request.param == "real" else _simulated()


def test_a_setting_is_replaced_where_it_is_as_expected_and_in_time(side: Side) -> None:
    metadata = side.metadata
    before = metadata.read_setting()
    other = Setting(json.dumps({**json.loads(before.raw), "TrashDays": 7}).encode())
    assert not metadata.replace_setting(other, before)
    assert not metadata.replace_setting(before, other, not_after=metadata.now() - 1)
    assert metadata.read_setting().raw == before.raw
    assert metadata.replace_setting(before, other, not_after=metadata.now() + 60)
    assert metadata.read_setting().raw == other.raw
    assert not metadata.replace_setting(before, other)
    assert metadata.replace_setting(other, before)


def test_every_mount_pod_has_a_session_that_has_not_expired(side: Side) -> None:
    pods, found = side.cluster.pods(MOUNT_POD_SELECTOR), side.metadata.sessions()
    assert len(found) == len(pods) > 0
    for session in found:
        assert session.expires.timestamp() > side.metadata.now()
        assert any(session.mount_point in command for pod in pods for command in pod.commands)
        assert session.version.startswith("1.")


def test_no_slice_is_as_high_as_the_next_one(side: Side) -> None:
    metadata = side.metadata
    found, after = list(metadata.slices()), metadata.next_slice()
    assert found == sorted(found)
    assert list(metadata.slices(after)) == []
    assert list(metadata.slices(0, after)) == found
    assert metadata.still_needed([*(number for number, _ in found), after + 1_000]) == {number for number, _ in found}


def test_an_object_is_found_under_its_key_alone(side: Side) -> None:
    for key in ("b", "a", "c/d"):
        side.put(1, key, b"12345")
    new = side.new
    found = new.head(f"{FOLDER}a")
    assert (found.key, found.size_bytes) == (f"{FOLDER}a", 5)
    assert found.modified.endswith(" GMT")
    assert new.head(f"{FOLDER}x") is None
    assert new.exists(f"{FOLDER}c/d")
    assert not new.exists(f"{FOLDER}c")
    assert new.read(f"{FOLDER}b") == b"12345"
    assert new.read(f"{FOLDER}x") is None
    assert [item.key for item in new.list(FOLDER)] == [f"{FOLDER}{key}" for key in ("a", "b", "c/d")]
    assert new.first_after(f"{FOLDER}a") == f"{FOLDER}b"


def test_a_listing_begins_after_its_start_and_has_its_end(side: Side) -> None:
    for key in ("p1", "p2", "p3"):
        side.put(1, key, b"1")
    pages = list(side.new.pages(KeyRange(after=f"{FOLDER}p1", until=f"{FOLDER}p3")))
    assert [key for page in pages for key in page.keys] == [f"{FOLDER}p2", f"{FOLDER}p3"]
    assert [size for page in pages for size in page.sizes] == [1, 1]


def test_a_store_refuses_keys_that_it_does_not_know_for_good(side: Side) -> None:
    wrong = side.store_with(WRONG)
    assert side.new.knows_keys()
    assert not wrong.knows_keys()
    for ask in (wrong.check, lambda: wrong.head("a"), lambda: wrong.probe("probe")):
        with pytest.raises(PermanentError):
            ask()


def test_a_copy_overwrites_nothing(side: Side) -> None:
    side.put(0, "copied", b"old")
    side.put(0, "differs", b"old")
    side.put(1, "differs", b"new")
    rows = [(f"{FOLDER}{key}", 3, "") for key in ("copied", "differs", "gone")]
    assert [side.engine.copy([row])[0].outcome for row in rows[::2]] == [ObjectOutcome.COPIED, ObjectOutcome.VANISHED]
    side.engine.copy([rows[1]])
    assert side.new.read(rows[1][0]) == b"new"
    assert side.new.read(rows[0][0]) == b"old"
    assert side.engine.copy([rows[0]])[0].outcome == ObjectOutcome.SAME


def test_a_secret_is_patched_where_it_is_as_it_was_read(side: Side) -> None:
    cluster = side.cluster
    read = cluster.secret(side.secret)
    cluster.patch_secret(read, {"bucket": "c"})
    after = cluster.secret(side.secret)
    assert dict(after.data) == {"bucket": "c", "name": "b"}
    assert after.resource_version != read.resource_version
    with pytest.raises(TransientError):
        cluster.patch_secret(read, {"bucket": "d"})
    assert cluster.secret(side.secret).data["bucket"] == "c"
    cluster.patch_secret(after, {"bucket": "a"})


def test_a_lease_is_written_where_it_is_as_it_was_read(side: Side) -> None:
    cluster, name, now = side.cluster, "contract", datetime.now(UTC).replace(microsecond=0)
    assert cluster.lease(name) is None
    new = Lease(name, "dag/one", 60, now, now)
    assert cluster.write_lease(new)
    assert not cluster.write_lease(new)
    read = cluster.lease(name)
    assert (read.holder, read.duration_s, read.renewed_at) == ("dag/one", 60, now)
    assert cluster.write_lease(replace(read, renewed_at=now + timedelta(seconds=1)))
    assert not cluster.write_lease(replace(read, holder="dag/two", transitions=1))
    assert cluster.lease(name).holder == "dag/one"


def test_a_backup_is_read_as_it_was_saved(side: Side) -> None:
    vault = side.vault
    assert vault.load("myjfs.run") is None
    vault.save("myjfs.run", b"1")
    vault.save("myjfs.run.switched", b"2")
    vault.save("myjfs.run", b"3")
    assert vault.load("myjfs.run") == b"3"
    assert list(vault.ids()) == ["myjfs.run", "myjfs.run.switched"]
    vault.check_room(1_000)

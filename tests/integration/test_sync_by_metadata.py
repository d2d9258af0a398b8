"""`juicefs_storage_sync` with plan=metadata: a copy, deltas, the proof, what is lost, a bucket of several."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.sdk.exceptions import AirflowFailException

from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.switch.checks import check_volume
from include.juicefs_storage.tasks import registry
from include.juicefs_storage.tasks.sync.folder import MANIFESTS_ENV
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.needed import ID_BATCH, needed_objects
from lab.environment import Lab
from lab.keys import random_part
from lab.mariadb import MariaDB
from lab.process import binary, run
from lab.seaweed import Store
from lab.volume import STORAGE, fresh_mount
from tests.support.sync_run import SyncRun

LEAKED = "chunks/0/0/0_7_5"
Start = Callable[..., SyncRun]


@pytest.fixture
def start(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A run on the volume's own prefix, with the new store empty there; the metadata through a connection."""
    prefix = f"{lab.volume.name}/"
    before = lab.new_store.objects(prefix)
    for name, store in (("OLD", lab.old_store), ("NEW", lab.new_store)):
        extra = {"endpoint_url": store.endpoint_url, "config_kwargs": {"s3": {"addressing_style": "path"}}}
        connection = {"conn_type": "aws", "login": store.access_key, "password": store.secret_key, "extra": extra}
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
    monkeypatch.setenv("AIRFLOW_CONN_META", connection_to(lab.mariadb))
    cluster = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(lab.kube.kubeconfig)}}
    monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", json.dumps(cluster))
    monkeypatch.setenv(MANIFESTS_ENV, tmp_path.as_uri())
    volumes = tmp_path / "volumes.yaml"
    volumes.write_text(yaml.safe_dump({"theirs": {"kubernetes_conn_id": "cluster"}}))
    monkeypatch.setattr(registry, "REGISTRY", volumes)

    def started(run_id: str, **params: Any) -> SyncRun:
        given = {
            "source_conn_id": "old", "source_bucket": lab.old_store.bucket, "source_prefix": prefix,
            "target_conn_id": "new", "target_bucket": lab.new_store.bucket, "target_prefix": prefix,
            "exclude": ["testing/*"], "plan": "metadata", "dry_run": False,
        }  # fmt: skip
        if "volume" not in params:
            given["meta_conn_id"] = "meta"
        airflow = SyncRun(run_id, given | params)
        airflow.install(monkeypatch)
        return airflow

    yield started
    for key in lab.new_store.objects(prefix).keys() - before.keys():
        lab.new_store.client().delete_object(Bucket=lab.new_store.bucket, Key=key)
    # Blocks of deleted files may have been on the new store alone.
    kept = lab.old_store.objects(prefix).keys()
    for key in before.keys() & kept - lab.new_store.objects(prefix).keys():
        body = lab.old_store.client().get_object(Bucket=lab.old_store.bucket, Key=key)["Body"].read()
        lab.new_store.client().put_object(Bucket=lab.new_store.bucket, Key=key, Body=body)


def connection_to(mariadb: MariaDB) -> str:
    return json.dumps(
        {
            "conn_type": "mysql", "host": mariadb.host, "port": mariadb.port, "login": mariadb.user,
            "password": mariadb.password, "schema": mariadb.database,
        }
    )  # fmt: skip


Formatted = Callable[..., MariaDB]


@pytest.fixture
def formatted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[Formatted]:
    """Makes a volume of a test's own on the old store, without a client yet; connection `own` leads to its metadata."""
    names = []

    def made(name: str, bucket_url: str, *options: str) -> MariaDB:
        names.append(name)
        mariadb = lab.mariadb.add_database(name)
        keys = {"ACCESS_KEY": lab.old_store.access_key, "SECRET_KEY": lab.old_store.secret_key}
        run(
            [
                binary("juicefs"), "format", "--no-update", "--trash-days=0", "--block-size=64K",
                f"--storage={STORAGE}", f"--bucket={bucket_url}", *options, mariadb.meta_url, name,
            ],
            env={"META_PASSWORD": mariadb.password, **keys},
        )  # fmt: skip
        monkeypatch.setenv("AIRFLOW_CONN_OWN", connection_to(mariadb))
        return mariadb

    yield made
    for store in (lab.old_store, lab.new_store):
        for bucket in store.client().list_buckets()["Buckets"]:
            own = dataclasses.replace(store, bucket=bucket["Name"])
            for key in [key for name in names for key in own.objects(f"{name}/")]:
                own.client().delete_object(Bucket=own.bucket, Key=key)
            if any(own.bucket.startswith(f"{name}-") for name in names):
                own.client().delete_bucket(Bucket=own.bucket)


@pytest.fixture
def files(lab: Lab) -> Iterator[Path]:
    folder = lab.mounts()[0] / "by-metadata"
    folder.mkdir()
    for number in range(12):
        write(folder / f"{number}", 10_000 + number)
    yield folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def write(file: Path, size: int) -> None:
    with file.open("wb") as stream:
        stream.write(os.urandom(size))
        os.fsync(stream.fileno())


def objects(report: dict[str, Any], phase: int = 0) -> dict[str, int]:
    """`outcome` -> objects."""
    found: dict[str, int] = {}
    for name, (count, _) in report["phases"][phase]["totals"].items():
        found[name.partition("/")[0]] = found.get(name.partition("/")[0], 0) + count
    return found


@pytest.mark.slow
def test_a_copy_then_deltas_then_the_proof(lab: Lab, files: Path, start: Start) -> None:
    source, bucket, prefix = lab.old_store.client(), lab.old_store.bucket, f"{lab.volume.name}/"
    for key in lab.new_store.objects(f"{prefix}chunks/"):
        lab.new_store.client().delete_object(Bucket=lab.new_store.bucket, Key=key)
    source.put_object(Bucket=bucket, Key=prefix + LEAKED, Body=b"12345")
    before = lab.old_store.objects(f"{prefix}chunks/")

    run = start("first", partitions=3)
    report = run.whole()
    assert (report["outcome"], report["problems"], report["partitions"]) == ("proven", [], 3)
    needed = run.xcoms["plan_partitions", "summary"]["objects"]
    assert needed >= 12
    assert objects(report)["skipped"] >= 1
    assert sum(objects(report).get(outcome, 0) for outcome in ("copied", "same")) >= needed
    there = lab.new_store.objects(prefix)
    assert len([key for key in there if key.startswith(f"{prefix}chunks/")]) == needed
    assert prefix + LEAKED not in there
    assert f"{prefix}juicefs_uuid" in there
    assert "Every block that files referred to" in report["meaning"]
    assert report["next_since_id"] is not None

    # The lab's ids are fewer than two clients may hold back: the delta begins behind the last one, with a new client's.
    (first,) = lab.mariadb.query("SELECT MAX(chunkid) + 1 FROM jfs_chunk_ref")[0]
    with lab.fresh_mount(read_only=False) as mount:
        for number in range(2):
            write(mount / files.name / f"later-{number}", 5_000)
    lists = lab.old_store.requests()["LIST", "200"]
    delta = start("second", since_id=int(first)).whole()
    assert (delta["outcome"], objects(delta), objects(delta, 1)) == ("proven", {"copied": 2}, {"same": 2})
    # Two to check, the bucket and the prefix, and one in each phase: its two blocks are neighbours.
    assert lab.old_store.requests()["LIST", "200"] - lists == 4
    assert f"of slices from id {first} on" in delta["meaning"]
    (first,) = lab.mariadb.query("SELECT MAX(chunkid) + 1 FROM jfs_chunk_ref")[0]
    nothing = start("third", since_id=int(first)).whole()
    assert (nothing["outcome"], nothing["objects"], nothing["phases"][0]["totals"]) == ("proven", 0, {})

    proof = start("proof", mode="verify").whole()
    assert (proof["outcome"], proof["objects"]) == ("proven", needed + 2)
    after = lab.old_store.objects(f"{prefix}chunks/")
    assert before.items() <= after.items(), "the source is only read"
    assert len(after) == len(before) + 2


def test_what_is_lost_is_red_and_names_the_files(lab: Lab, files: Path, start: Start, tmp_path: Path) -> None:
    """The registry says where the volume's Secret is, and that says where the metadata is."""
    prefix, client, bucket = f"{lab.volume.name}/", lab.old_store.client(), lab.old_store.bucket
    info = {str(files / name): lab_keys(lab, files / name)[0] for name in ("3", "5")}
    lost, cut = info.values()
    lab.copy_to_new_store()
    bodies = {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in (lost, cut)}
    try:
        client.delete_object(Bucket=bucket, Key=lost)
        lab.new_store.client().delete_object(Bucket=lab.new_store.bucket, Key=lost)
        client.put_object(Bucket=bucket, Key=cut, Body=bodies[cut][:-1])
        run = start("red", volume="theirs", partitions=2)
        with pytest.raises(AirflowFailException, match="not proven"):
            run.whole()
        report = run.xcoms["reconcile", "return_value"]
        assert (objects(report)["lost"], objects(report)["damaged"]) == (1, 1)
        assert "2 files have lost or damaged blocks" in " ".join(report["problems"])
        folder = tmp_path / "red" / run.xcoms["plan_partitions", "summary"]["plan_id"]
        rows = (folder / "lost_files.csv").read_text().split()
        assert rows[0] == "file,key"
        assert sorted(rows[1:]) == sorted(
            f"/by-metadata/{Path(path).name},{key.removeprefix(prefix)}" for path, key in info.items()
        )
        assert lab.new_store.objects(cut)[cut][0] == len(bodies[cut]), "what is cut replaces nothing"
        assert random_part(lab.mariadb.password) not in str(run.xcoms)
    finally:
        for key, body in bodies.items():
            for store in (lab.old_store, lab.new_store):
                store.client().put_object(Bucket=store.bucket, Key=key, Body=body)


def test_deltas_from_the_watermark_of_the_run_before(
    lab: Lab, start: Start, formatted: Formatted, tmp_path: Path
) -> None:
    mariadb = formatted("deltas", lab.old_store.bucket_url)
    names = iter(range(1_000))

    def more(mount: Path, count: int) -> None:
        for _ in range(count):
            write(mount / f"{next(names)}", 30_000)

    def go(run_id: str, **params: Any) -> dict[str, Any]:
        run = start(run_id, source_prefix="deltas/", target_prefix="deltas/", meta_conn_id="own", **params)
        report = run.whole()
        assert report["outcome"] == "proven"
        said = f"; copied: {objects(report).get('copied', 0)} objects, "
        assert said in run.xcoms["finalize", "note"]
        return report

    with fresh_mount(tmp_path, mariadb, read_only=False) as mount:
        more(mount, 12)
    with fresh_mount(tmp_path, mariadb, read_only=False) as mount:
        more(mount, 4)
        everything = go("everything")
        # And `juicefs_uuid`; `testing/` is left out.
        assert objects(everything) == {"copied": 17}
        # The client that is gone used up its batch of ids; the one that lives may use the whole of its own.
        assert everything["next_since_id"] == ID_BATCH + 1

        more(mount, 6)
        first = go("first", since_id=everything["next_since_id"])
        assert objects(first) == {"same": 4, "copied": 6}
        assert objects(first, 1) == {"same": 10}
        assert first["next_since_id"] == ID_BATCH + 1

        more(mount, 3)
        second = go("second", since_id=first["next_since_id"])
        assert objects(second) == {"same": 10, "copied": 3}
    # One that begins after another has gone: the next delta leaves out all that the other wrote.
    with fresh_mount(tmp_path, mariadb, read_only=False) as mount:
        more(mount, 1)
        third = go("third", since_id=second["next_since_id"])
        assert objects(third) == {"same": 13, "copied": 1}
        assert third["next_since_id"] == 2 * ID_BATCH + 1
        nothing = go("nothing", since_id=third["next_since_id"])
        assert objects(nothing) == {"same": 1}
    copied = [report["phases"][0]["totals"]["copied/etag"] for report in (first, second, third)]
    assert copied == [[count, 30_000 * count] for count in (6, 3, 1)], "each is smaller than the last"

    last = go("last")
    assert objects(last) == {"same": 27}
    assert blocks(lab.new_store, "deltas") == needed(mariadb)


@pytest.mark.parametrize("layout", [[], ["--hash-prefix"]], ids=["plain", "hashed"])
def test_a_run_for_each_bucket_of_a_sharded_volume(
    lab: Lab, start: Start, formatted: Formatted, tmp_path: Path, layout: list[str]
) -> None:
    name = f"sharded{len(layout)}"
    template = f"{name}-%d"
    mariadb = formatted(name, f"{lab.old_store.endpoint_url}/{template}", "--shards=3", *layout)
    with fresh_mount(tmp_path, mariadb, read_only=False) as mount:
        for number in range(12):
            write(mount / f"{number}", 150_000 + number)
    sources, targets = (
        [dataclasses.replace(store, bucket=template % shard) for shard in range(3)]
        for store in (lab.old_store, lab.new_store)
    )
    for target in targets:
        target.client().create_bucket(Bucket=target.bucket)
    lists = [blocks(source, name) for source in sources]
    assert [needed(mariadb, shard) for shard in range(3)] == lists
    assert all(lists)
    metadata = MySqlMetadata.from_metaurl(Metaurl.parse(mariadb.meta_url_with_password))
    (refused,) = check_volume(metadata.read_setting(), [], [], metadata, 60)
    assert refused.level == "refusal"
    assert f"names them all by one pattern, {lab.old_store.endpoint_url}/{template}." in refused.message
    assert sum(map(len, lists)) == len(needed(mariadb)) == 36

    def go(run_id: str, shard: int, **params: Any) -> SyncRun:
        given = {
            "source_bucket": template % shard, "source_prefix": f"{name}/",
            "target_bucket": template % shard, "target_prefix": f"{name}/", "meta_conn_id": "own",
        }  # fmt: skip
        return start(run_id, **(given | params))

    for shard in range(3):
        run = go(f"copy {shard}", shard)
        report = run.whole()
        assert report["outcome"] == "proven"
        assert run.xcoms["plan_partitions", "summary"]["objects"] == len(lists[shard])
        assert f"in bucket {template % shard}, one of 3, is on the target" in report["meaning"]
        assert blocks(targets[shard], name) == lists[shard]
    assert sum(f"{name}/juicefs_uuid" in target.objects() for target in targets) == 1

    # The old store lost a block of shard 1, which another bucket has: there no client looks for it.
    lost, missing, cut, *_ = lists[1]
    body = sources[1].client().get_object(Bucket=sources[1].bucket, Key=lost)["Body"].read()
    sources[0].client().put_object(Bucket=sources[0].bucket, Key=lost, Body=body)
    sources[1].client().delete_object(Bucket=sources[1].bucket, Key=lost)
    for key in (lost, missing):
        targets[1].client().delete_object(Bucket=targets[1].bucket, Key=key)
    targets[1].client().put_object(Bucket=targets[1].bucket, Key=cut, Body=b"cut")
    for shard, skipped in ((0, {"skipped": 1}), (2, {})):
        found = objects(go(f"verify {shard}", shard, mode="verify").whole())
        found.pop("same")
        assert found == skipped
    run = go("verify 1", 1, mode="verify")
    with pytest.raises(AirflowFailException, match="not proven"):
        run.whole()
    found = objects(run.xcoms["reconcile", "return_value"])
    found.pop("same")
    assert found == {"lost": 1, "missing": 1, "different": 1}

    expected = ", ".join(f"`{template % shard}`" for shard in range(3))
    with pytest.raises(AirflowFailException, match=f"expected {expected}; found `{lab.old_store.bucket}`"):
        go("refused", 0, source_bucket=lab.old_store.bucket).run("check")


def needed(mariadb: MariaDB, shard: int | None = None) -> dict[str, int]:
    metadata = MySqlMetadata.from_metaurl(Metaurl.parse(mariadb.meta_url_with_password))
    return dict(needed_objects(metadata, metadata.read_setting(), shard=shard))


def blocks(store: Store, name: str) -> dict[str, int]:
    return {key: size for key, (size, _) in store.objects(f"{name}/chunks/").items()}


def lab_keys(lab: Lab, file: Path) -> list[str]:
    """The objects of a file, by the metadata."""
    from include.juicefs_storage.volume.layout import slice_of

    metadata = MySqlMetadata.from_metaurl(Metaurl.parse(lab.mariadb.meta_url_with_password))
    keys = {slice_of(key): key for key, _ in needed_objects(metadata, metadata.read_setting())}
    return [keys[slice_id] for slice_id, path in metadata.files_of(keys) if path == f"/by-metadata/{file.name}"]


def test_check_refuses_the_metadata_of_another_volume(lab: Lab, start: Start) -> None:
    for change, said in (
        ({"source_prefix": "other/"}, "Param `source_prefix`"),
        ({"volume": "nobody"}, "is not in include/volumes.yaml"),
        ({"meta_conn_id": "nowhere"}, "make the connection in Airflow"),
    ):
        with pytest.raises(AirflowFailException, match=said):
            start("refused", **change).run("check")
    client, key = lab.old_store.client(), f"{lab.volume.name}/juicefs_uuid"
    uuid = client.get_object(Bucket=lab.old_store.bucket, Key=key)["Body"].read()
    try:
        client.put_object(Bucket=lab.old_store.bucket, Key=key, Body=b"99999999-0000-0000-0000-000000000000")
        with pytest.raises(AirflowFailException, match="names another volume"):
            start("refused").run("check")
    finally:
        client.put_object(Bucket=lab.old_store.bucket, Key=key, Body=uuid)

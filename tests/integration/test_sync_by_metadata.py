"""`juicefs_storage_sync` with plan=metadata on the lab's volume: a copy, deltas, the proof, and what is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from airflow.sdk.exceptions import AirflowFailException

from include.juicefs_storage.tasks import runtime, sync
from lab.environment import Lab
from tests.integration.test_sync_dag_parts import Airflow

LEAKED = "chunks/0/0/0_7_5"
Start = Callable[..., Airflow]


@pytest.fixture
def start(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A run on the volume's own prefix, with the new store empty there; the metadata through a connection."""
    prefix = f"{lab.volume.name}/"
    before = lab.new_store.objects(prefix)
    for name, store in (("OLD", lab.old_store), ("NEW", lab.new_store)):
        extra = {"endpoint_url": store.endpoint_url, "config_kwargs": {"s3": {"addressing_style": "path"}}}
        connection = {"conn_type": "aws", "login": store.access_key, "password": store.secret_key, "extra": extra}
        monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(connection))
    mariadb = lab.mariadb
    connection = {
        "conn_type": "mysql", "host": mariadb.host, "port": mariadb.port, "login": mariadb.user,
        "password": mariadb.password, "schema": mariadb.database,
    }  # fmt: skip
    monkeypatch.setenv("AIRFLOW_CONN_META", json.dumps(connection))
    cluster = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(lab.kube.kubeconfig)}}
    monkeypatch.setenv("AIRFLOW_CONN_CLUSTER", json.dumps(cluster))
    monkeypatch.setenv(sync.MANIFESTS_ENV, tmp_path.as_uri())
    registry = tmp_path / "volumes.yaml"
    registry.write_text(yaml.safe_dump({"theirs": {"kubernetes_conn_id": "cluster"}}))
    monkeypatch.setattr(runtime, "REGISTRY", registry)

    def started(run_id: str, **params: Any) -> Airflow:
        given = {
            "source_conn_id": "old", "source_bucket": lab.old_store.bucket, "source_prefix": prefix,
            "target_conn_id": "new", "target_bucket": lab.new_store.bucket, "target_prefix": prefix,
            "exclude": ["testing/*"], "plan": "metadata", "dry_run": False,
        }  # fmt: skip
        if "volume" not in params:
            given["meta_conn_id"] = "meta"
        airflow = Airflow(run_id, given | params)
        context = {"params": airflow.params, "run_id": run_id, "ti": airflow, "dag": airflow}
        for module in (runtime, sync):
            monkeypatch.setattr(module, "get_current_context", lambda: context)
        return airflow

    yield started
    for key in lab.new_store.objects(prefix).keys() - before.keys():
        lab.new_store.client().delete_object(Bucket=lab.new_store.bucket, Key=key)
    for key in before.keys() - lab.new_store.objects(prefix).keys():
        body = lab.old_store.client().get_object(Bucket=lab.old_store.bucket, Key=key)["Body"].read()
        lab.new_store.client().put_object(Bucket=lab.new_store.bucket, Key=key, Body=body)


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
    # One to check, and one in each phase: its two blocks are neighbours.
    assert lab.old_store.requests()["LIST", "200"] - lists == 3
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
        assert lab.mariadb.password not in str(run.xcoms)
    finally:
        for key, body in bodies.items():
            for store in (lab.old_store, lab.new_store):
                store.client().put_object(Bucket=store.bucket, Key=key, Body=body)


def lab_keys(lab: Lab, file: Path) -> list[str]:
    """The objects of a file, by the metadata."""
    from include.juicefs_storage.adapters.metadata import MySqlMetadata
    from include.juicefs_storage.core.blocks import slice_of
    from include.juicefs_storage.core.needed import needed_objects

    metadata = MySqlMetadata.from_metaurl(lab.mariadb.meta_url_with_password)
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

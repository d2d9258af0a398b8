"""Backups and manifests in an object store, where Kubernetes needs them: nothing but a connection is added."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import pytest
from airflow.sdk import ObjectStoragePath

from include.juicefs_storage.adapters.manifests import ManifestReader, ParquetManifest
from include.juicefs_storage.adapters.vault import FileVault, Keyring
from include.juicefs_storage.objects.comparison import Rows
from include.juicefs_storage.objects.model import Comparison, ObjectOutcome
from lab.environment import Lab


@pytest.fixture
def folder(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStoragePath]:
    store = lab.new_store
    connection = {
        "conn_type": "aws",
        "login": store.access_key,
        "password": store.secret_key,
        "extra": {"endpoint_url": store.endpoint_url, "region_name": "us-east-1"},
    }
    # Filesystems are kept by connection id for the life of the process.
    conn_id = f"folder_{uuid.uuid4().hex[:8]}"
    monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(connection))
    yield ObjectStoragePath(f"s3://{conn_id}@{store.bucket}/folders")
    client = store.client()
    for key in store.objects("folders/"):
        client.delete_object(Bucket=store.bucket, Key=key)


def test_backups(folder: ObjectStoragePath) -> None:
    vault = FileVault(Keyring(b"k" * 32), folder / "backups")
    assert vault.ids() == []
    vault.save("myjfs.run-1", b"the row")
    vault.save("myjfs.run-1.switched", b"2026-01-01")
    assert vault.load("myjfs.run-1") == b"the row"
    assert vault.load("myjfs.run-2") is None
    assert vault.ids() == ["myjfs.run-1", "myjfs.run-1.switched"]


def test_what_another_worker_wrote_is_seen(folder: ObjectStoragePath, lab: Lab) -> None:
    vault, client = FileVault(Keyring(b"k" * 32), folder / "backups"), lab.new_store.client()
    vault.save("myjfs.run-1", b"the row")
    (key,) = lab.new_store.objects("folders/")
    sealed = client.get_object(Bucket=lab.new_store.bucket, Key=key)["Body"].read()
    client.delete_object(Bucket=lab.new_store.bucket, Key=key)
    assert vault.ids() == []
    assert vault.load("myjfs.run-1") is None
    client.put_object(Bucket=lab.new_store.bucket, Key=key, Body=sealed)
    assert vault.load("myjfs.run-1") == b"the row"
    assert vault.ids() == ["myjfs.run-1"]


def test_manifests(folder: ObjectStoragePath, lab: Lab) -> None:
    def manifest() -> ParquetManifest:
        return ParquetManifest(folder / "plan", "000", {"plan": "p", "partition": "0"})

    def rows(first: int) -> Rows:
        keys = [f"{number:03}" for number in range(first, first + 10)]
        found = Rows()
        found.add(keys, [7] * 10, ["a"] * 10, ["a"] * 10, ObjectOutcome.COPIED, Comparison.ETAG)
        return found

    manifest().append(rows(0))
    again = manifest()
    last, totals = again.resume()
    assert (last, totals.objects()) == ("009", 10)
    again.append(rows(10))
    again.finish()

    found = ManifestReader(again.file)
    assert [key for keys, _ in found.listed() for key in keys] == [f"{number:03}" for number in range(20)]
    assert [key.rpartition("folders/")[2] for key in lab.new_store.objects("folders/")] == ["plan/000.parquet"]

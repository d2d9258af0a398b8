"""Patch the Secrets: every copy of the volume's values, no other volume's, and back."""

from __future__ import annotations

import pytest

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.volume.clusters import FIRST, Clusters
from tests.support.fakes import METAURL, NEW, OLD, FakeCluster


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster()
    cluster.add(
        "juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket=OLD.bucket,
        access_key="OLDKEY", secret_key="old-secret-value", token="",
    )  # fmt: skip
    driver = {"juicefs/secret": "true"}
    cluster.add("juicefs-pvc-1-secret", driver, metaurl="mysql://other@(db:3306)/jfs?x=1", secretkey="old-secret-value")
    cluster.add("juicefs-pvc-2-secret", driver, metaurl="mysql://jfs:pw@(db:3306)/another", secretkey="not-ours")
    return cluster


def test_every_copy_of_the_values_is_patched_and_no_other_volumes(cluster: FakeCluster) -> None:
    step = PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "myjfs", NEW)
    assert step.apply() == ["juicefs/juicefs-sc-secret", "juicefs/juicefs-pvc-1-secret"]
    assert cluster.store["juicefs-sc-secret"].data["bucket"] == NEW.bucket
    assert cluster.store["juicefs-sc-secret"].data["secret-key"] == "new-secret-value"
    assert cluster.store["juicefs-sc-secret"].data["token"] == ""
    assert cluster.store["juicefs-pvc-1-secret"].data["secretkey"] == "new-secret-value"
    assert cluster.store["juicefs-pvc-2-secret"].data["secretkey"] == "not-ours"
    assert step.apply() == []


def test_a_secret_without_storage_and_bucket_does_not_get_them(cluster: FakeCluster) -> None:
    cluster.add("juicefs-sc-secret", metaurl=METAURL, name="myjfs")
    assert PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "myjfs", NEW).apply() == [
        "juicefs/juicefs-pvc-1-secret"
    ]
    assert "bucket" not in cluster.store["juicefs-sc-secret"].data


def test_a_patch_that_does_not_last_is_reported(cluster: FakeCluster) -> None:
    cluster.refuse_patches = True
    with pytest.raises(TransientError, match="do not hold the values"):
        PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "myjfs", NEW).apply()


def test_going_back_gives_the_backed_up_values_and_old_keys_where_there_were_none(cluster: FakeCluster) -> None:
    cluster.add(
        "juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket="http://old.alias:9000/data"
    )
    PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "myjfs", NEW).apply()
    assert cluster.store["juicefs-sc-secret"].data["access-key"] == "NEWKEY"
    exact = {FIRST: {"juicefs-sc-secret": {"storage": "minio", "bucket": "http://old.alias:9000/data"}}}
    PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "myjfs", OLD, exact=exact).apply()
    data = cluster.store["juicefs-sc-secret"].data
    assert (data["bucket"], data["access-key"]) == ("http://old.alias:9000/data", "OLDKEY")


def test_the_secret_of_another_volume_is_refused(cluster: FakeCluster) -> None:
    with pytest.raises(PermanentError, match="name='another'"):
        PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "another", NEW).apply()

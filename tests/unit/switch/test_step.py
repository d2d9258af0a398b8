"""No step writes without the volume's Lease."""

from __future__ import annotations

import pytest

from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.volume.clusters import Clusters
from tests.support.fakes import METAURL, NEW, OLD, FakeCluster, FakeJuiceFS, FakeMetadata, setting


class LostError(Exception):
    pass


def lost() -> None:
    raise LostError


def test_no_step_writes_without_the_lease() -> None:
    metadata = FakeMetadata(setting(OLD))
    step = WriteSetting(metadata, FakeJuiceFS(metadata), metadata.row, NEW, confirm_lease=lost)
    with pytest.raises(LostError):
        step.apply()
    metadata.row = setting(NEW)
    with pytest.raises(LostError):
        step.undo()
    assert metadata.row.uses(NEW)
    cluster = FakeCluster()
    cluster.add("juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket=OLD.bucket)
    before = dict(cluster.store)
    with pytest.raises(LostError):
        PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "myjfs", NEW, confirm_lease=lost).apply()
    assert cluster.store == before


def test_a_lease_that_is_lost_between_two_writes_stops_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster()
    driver = {"juicefs/secret": "true"}
    cluster.add("juicefs-sc-secret", metaurl=METAURL, name="myjfs", bucket=OLD.bucket)
    cluster.add("juicefs-pvc-1-secret", driver, metaurl=METAURL, bucket=OLD.bucket)
    left = [None]

    def confirm() -> None:
        if not left:
            raise LostError
        left.pop()

    with pytest.raises(LostError):
        PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "myjfs", NEW, confirm_lease=confirm).apply()
    assert [secret.data["bucket"] for secret in cluster.store.values()] == [NEW.bucket, OLD.bucket]

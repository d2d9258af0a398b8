"""Going back from a backup alone: Secrets, then the setting; nothing else in either."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.ports import PersistentVolume, Pod
from include.juicefs_storage.switch.way_back import WayBack
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.setting import Setting
from tests.support.fakes import METAURL, NEW, OLD, FakeCluster, FakeMetadata, backup, setting

STORED = {"storage": "minio", "bucket": OLD.bucket, "access-key": "OLDKEY", "secret-key": "old-secret-value"}
BACKUP = backup(
    "myjfs.run", datetime(2026, 1, 1, tzinfo=UTC), secrets={"s": {**STORED, "metaurl": "mysql://then", "envs": "{}"}}
)


@dataclass
class Cluster(FakeCluster):
    """A cluster without mount pods, on the new store."""

    order: list[str] = field(default_factory=list)

    def pods(self, label_selector: str = "", namespace: str | None = None) -> Sequence[Pod]:
        return []

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        return []


def way(row: Setting | None = None) -> WayBack:
    cluster = Cluster()
    cluster.add("s", name="myjfs", metaurl=METAURL, storage="minio", bucket=NEW.bucket, access_key="NEWKEY")
    return WayBack(BACKUP, Clusters(cluster), FakeMetadata(row or setting(NEW, TrashDays=9)), "s")


def test_the_plan_says_what_would_be_written_and_no_key() -> None:
    plan = way().plan()
    assert plan.setting
    assert not plan.unexpected
    assert plan.secrets == ("juicefs/s: access-key, bucket, secret-key",)
    text = "\n".join(plan.lines)
    assert OLD.bucket in text
    assert NEW.bucket in text
    assert not [secret for secret in ("OLDKEY", "NEWKEY", "old-secret-value", "meta-pw") if secret in text]


def test_only_the_storage_goes_back() -> None:
    back = way()
    done = back.apply(restart=False, stamp="now")
    assert done == ["patched Secret juicefs/s", f"wrote the setting: {OLD.bucket}"]
    now = back.metadata.read_setting()
    assert now.config == OLD
    assert now._fields["TrashDays"] == 9
    data = back.clusters.first.secret("s").data
    assert {key: data[key] for key in STORED} == STORED
    # The password of the metadata may have changed since for good reasons.
    assert data["metaurl"] == METAURL
    assert back.apply(restart=False, stamp="now") == []
    assert not back.plan().setting


def test_another_volume_is_never_touched() -> None:
    back = way(setting(NEW, UUID="99999999-2222-3333-4444-555555555555"))
    with pytest.raises(NeedsHumanError, match="The metadata database holds volume myjfs"):
        back.plan()


def test_a_setting_that_nobody_expects_is_named() -> None:
    third = setting(NEW, AccessKey="THIRD")
    assert way(third).plan().unexpected


def test_a_setting_that_changes_meanwhile_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    back = way()
    monkeypatch.setattr(back.metadata, "replace_setting", lambda expected, new: False)
    with pytest.raises(TransientError, match="changed between"):
        back.apply(restart=False, stamp="now")


def test_no_client_is_waited_for_where_none_is_behind() -> None:
    assert list(way().await_clients(timeout_s=1, clock=lambda: 0.0, sleep=lambda _: None)) == []

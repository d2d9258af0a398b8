"""Guard the setting and the Secrets: what is put right, what is waited for, when it gives up."""

from __future__ import annotations

import pytest

from include.juicefs_storage.errors import NeedsHumanError, TransientError
from include.juicefs_storage.ports import Pod
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.settle import guard_setting
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.setting import Setting
from tests.support.fakes import METAURL, NEW, OLD, FakeCluster, FakeJuiceFS, FakeMetadata, setting


@pytest.fixture
def metadata() -> FakeMetadata:
    return FakeMetadata(setting(OLD))


@pytest.fixture
def write(metadata: FakeMetadata) -> WriteSetting:
    return WriteSetting(metadata, FakeJuiceFS(metadata), metadata.row, NEW)


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def agreeing(cluster: FakeCluster) -> PatchSecrets:
    """Secrets that hold the new values and stay so."""
    cluster.add("juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket=NEW.bucket)
    step = PatchSecrets(Clusters(cluster), "juicefs-sc-secret", "myjfs", NEW)
    step.apply()
    return step


class Clock:
    """Time that passes by sleeping."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def stale_pod(*, ready: bool) -> Pod:
    return Pod(
        namespace="juicefs", name="late", uid="9", node="n", ready=ready, restarts=0, problem="", labels={},
        commands=(), claims=(),
    )  # fmt: skip


def test_settle_puts_the_setting_right_and_watches_again(
    write: WriteSetting, agreeing: PatchSecrets, metadata: FakeMetadata
) -> None:
    write.apply()
    now = [0.0]
    moves_back_at = [3.0, 12.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if moves_back_at and now[0] >= moves_back_at[0]:
            moves_back_at.pop(0)
            metadata.row = setting(OLD)

    settled = guard_setting(write, agreeing, list, for_s=10, clock=lambda: now[0], sleep=sleep)
    assert len(settled.repaired) == 2
    assert (settled.wrote, settled.waiting) == ((), ())
    assert metadata.row.uses(NEW)
    assert now[0] == 22.0  # ten quiet seconds after the last repair


def test_settle_waits_for_a_pod_that_has_not_started(
    write: WriteSetting, agreeing: PatchSecrets, metadata: FakeMetadata
) -> None:
    write.apply()
    clock = Clock()

    def stale_pods() -> list[Pod]:
        if clock.now == 60:
            metadata.row = setting(OLD)  # it starts at last
        return [stale_pod(ready=clock.now >= 60)]

    settled = guard_setting(write, agreeing, stale_pods, for_s=10, clock=clock, sleep=clock.sleep)
    assert len(settled.repaired) == 1
    assert settled.wrote == ("late",)
    assert settled.waiting == ()
    assert metadata.row.uses(NEW)


def test_settle_does_not_wait_forever_and_names_the_pod(write: WriteSetting, agreeing: PatchSecrets) -> None:
    write.apply()
    clock = Clock()
    settled = guard_setting(write, agreeing, lambda: [stale_pod(ready=False)], for_s=10, clock=clock, sleep=clock.sleep)
    assert settled.waiting == ("late",)
    assert clock.now == 310


def test_settle_patches_secrets_that_were_put_back(
    write: WriteSetting, agreeing: PatchSecrets, cluster: FakeCluster
) -> None:
    write.apply()
    clock = Clock()

    def stale_pods() -> list[Pod]:
        if clock.now == 5:
            cluster.add("juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket=OLD.bucket)
        return []

    settled = guard_setting(write, agreeing, stale_pods, for_s=10, clock=clock, sleep=clock.sleep)
    assert settled.repaired == ("Secret juicefs/juicefs-sc-secret held other values",)
    assert agreeing.plan() == []


def test_settle_gives_up_on_what_keeps_writing(
    write: WriteSetting, agreeing: PatchSecrets, metadata: FakeMetadata
) -> None:
    write.apply()
    clock = Clock()

    def stale_pods() -> list[Pod]:
        metadata.row = setting(OLD)
        return [stale_pod(ready=True)]

    with pytest.raises(NeedsHumanError, match="keeps writing"):
        guard_setting(write, agreeing, stale_pods, for_s=10, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize(("failing_s", "ends"), [(30, True), (90, False)])
def test_settle_retries_a_database_that_is_away(
    write: WriteSetting,
    agreeing: PatchSecrets,
    failing_s: int,
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
    metadata: FakeMetadata,
) -> None:
    write.apply()
    clock, read = Clock(), metadata.read_setting

    def read_setting() -> Setting:
        if 5 <= clock.now < 5 + failing_s:
            raise TransientError("gone")
        return read()

    monkeypatch.setattr(metadata, "read_setting", read_setting)
    if ends:
        assert guard_setting(write, agreeing, list, for_s=10, clock=clock, sleep=clock.sleep).repaired == ()
        assert clock.now >= 5 + failing_s + 9  # it could not be seen meanwhile: quiet seconds count from then on
    else:
        with pytest.raises(TransientError, match="gone"):
            guard_setting(write, agreeing, list, for_s=10, clock=clock, sleep=clock.sleep)

"""The steps that change something: already done, read back, guarded, undone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from include.juicefs_storage.errors import LostAnswerError, NeedsHumanError, PermanentError, TransientError
from include.juicefs_storage.ports import Pod
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.settle import guard_setting
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import METAURL, NEW, OLD, FakeCluster, FakeJuiceFS, FakeMetadata, setting

OTHER = StorageConfig("minio", "http://elsewhere:9000/data", OLD.access_key, OLD.secret_key)


@pytest.fixture
def write():
    metadata = FakeMetadata(setting(OLD))
    return WriteSetting(metadata, FakeJuiceFS(metadata), metadata.row, NEW)


def test_write_then_already_written(write):
    assert write.apply() is True
    assert write.metadata.read_setting().uses(NEW)
    assert write.apply() is False
    assert write.juicefs.calls == 1


def test_a_success_that_the_row_does_not_show_is_no_success(write):
    write.juicefs.lies = True
    with pytest.raises(TransientError, match="still shows bucket http://old:9000/data"):
        write.apply()


@pytest.mark.parametrize("written_after_s", [0, 3])
def test_a_write_whose_answer_is_lost_is_looked_up_and_waited_for(write, monkeypatch, written_after_s):
    """The command may still be under way when the line is cut: a verdict before its end would be wrong."""
    slept = []

    def lose(config):
        if not written_after_s:
            write.metadata.row = setting(config)
        raise LostAnswerError("the connection was lost")

    def sleep(seconds):
        slept.append(seconds)
        if sum(slept) == written_after_s:
            write.metadata.row = setting(NEW)

    monkeypatch.setattr(write.juicefs, "write_storage", lose)
    assert replace(write, sleep=sleep).apply() is True
    assert sum(slept) == written_after_s


def test_a_write_whose_answer_is_lost_and_that_was_not_made_fails(write, monkeypatch):
    slept = []

    def lose(config):
        raise LostAnswerError("the connection was lost")

    monkeypatch.setattr(write.juicefs, "write_storage", lose)
    with pytest.raises(LostAnswerError):
        replace(write, sleep=slept.append).apply()
    assert sum(slept) >= 12  # as long as `juicefs config` tries a store that does not answer


@pytest.mark.parametrize("verb", ["apply", "undo"])
def test_a_row_that_somebody_else_changed_is_left_alone(write, verb):
    write.metadata.row = setting(OTHER)
    with pytest.raises(NeedsHumanError, match="http://elsewhere:9000/data"):
        getattr(write, verb)()
    assert write.metadata.row.uses(OTHER)
    assert write.juicefs.calls == 0


def test_a_rewrite_changes_the_bytes_alone_and_only_where_the_target_stands(write):
    write.rewrite()
    assert write.metadata.row == write.before
    write.apply()
    row = write.metadata.row
    write.rewrite()
    assert write.metadata.row.raw != row.raw
    assert write.metadata.row.uses(NEW)
    assert write.juicefs.calls == 1


def test_undo_gives_the_exact_bytes_back_and_then_has_nothing_to_do(write):
    write.apply()
    assert write.undo() is True
    assert write.metadata.row.raw == write.before.raw
    assert write.undo() is False


def test_undo_that_loses_a_race_changes_nothing(write, monkeypatch):
    write.apply()
    monkeypatch.setattr(write.metadata, "replace_setting", lambda expected, new: False)
    with pytest.raises(TransientError, match="changed between"):
        write.undo()
    assert write.metadata.row.uses(NEW)


@pytest.fixture
def agreeing():
    """Secrets that hold the new values and stay so."""
    cluster = FakeCluster()
    cluster.add("juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket=NEW.bucket)
    step = PatchSecrets(cluster, "juicefs-sc-secret", "myjfs", NEW)
    step.apply()
    return step


def test_settle_puts_the_setting_right_and_watches_again(write, agreeing):
    write.apply()
    now = [0.0]
    moves_back_at = [3.0, 12.0]

    def sleep(seconds):
        now[0] += seconds
        if moves_back_at and now[0] >= moves_back_at[0]:
            moves_back_at.pop(0)
            write.metadata.row = setting(OLD)

    settled = guard_setting(write, agreeing, list, for_s=10, clock=lambda: now[0], sleep=sleep)
    assert len(settled.repaired) == 2
    assert (settled.wrote, settled.waiting) == ((), ())
    assert write.metadata.row.uses(NEW)
    assert now[0] == 22.0  # ten quiet seconds after the last repair


@pytest.fixture
def cluster():
    cluster = FakeCluster()
    cluster.add(
        "juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket=OLD.bucket,
        access_key="OLDKEY", secret_key="old-secret-value", token="",
    )  # fmt: skip
    driver = {"juicefs/secret": "true"}
    cluster.add("juicefs-pvc-1-secret", driver, metaurl="mysql://other@(db:3306)/jfs?x=1", secretkey="old-secret-value")
    cluster.add("juicefs-pvc-2-secret", driver, metaurl="mysql://jfs:pw@(db:3306)/another", secretkey="not-ours")
    return cluster


def test_every_copy_of_the_values_is_patched_and_no_other_volumes(cluster):
    step = PatchSecrets(cluster, "juicefs-sc-secret", "myjfs", NEW)
    assert step.apply() == ["juicefs/juicefs-sc-secret", "juicefs/juicefs-pvc-1-secret"]
    assert cluster.store["juicefs-sc-secret"].data["bucket"] == NEW.bucket
    assert cluster.store["juicefs-sc-secret"].data["secret-key"] == "new-secret-value"
    assert cluster.store["juicefs-sc-secret"].data["token"] == ""
    assert cluster.store["juicefs-pvc-1-secret"].data["secretkey"] == "new-secret-value"
    assert cluster.store["juicefs-pvc-2-secret"].data["secretkey"] == "not-ours"
    assert step.apply() == []


def test_a_secret_without_storage_and_bucket_does_not_get_them(cluster):
    cluster.add("juicefs-sc-secret", metaurl=METAURL, name="myjfs")
    assert PatchSecrets(cluster, "juicefs-sc-secret", "myjfs", NEW).apply() == ["juicefs/juicefs-pvc-1-secret"]
    assert "bucket" not in cluster.store["juicefs-sc-secret"].data


def test_a_patch_that_does_not_last_is_reported(cluster):
    cluster.refuse_patches = True
    with pytest.raises(TransientError, match="do not hold the values"):
        PatchSecrets(cluster, "juicefs-sc-secret", "myjfs", NEW).apply()


def test_going_back_gives_the_backed_up_values_and_old_keys_where_there_were_none(cluster):
    cluster.add(
        "juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket="http://old.alias:9000/data"
    )
    PatchSecrets(cluster, "juicefs-sc-secret", "myjfs", NEW).apply()
    assert cluster.store["juicefs-sc-secret"].data["access-key"] == "NEWKEY"
    exact = {"juicefs-sc-secret": {"storage": "minio", "bucket": "http://old.alias:9000/data"}}
    PatchSecrets(cluster, "juicefs-sc-secret", "myjfs", OLD, exact=exact).apply()
    data = cluster.store["juicefs-sc-secret"].data
    assert (data["bucket"], data["access-key"]) == ("http://old.alias:9000/data", "OLDKEY")


def test_the_secret_of_another_volume_is_refused(cluster):
    with pytest.raises(PermanentError, match="name='another'"):
        PatchSecrets(cluster, "juicefs-sc-secret", "another", NEW).apply()


class Clock:
    """Time that passes by sleeping."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def stale_pod(*, ready):
    return Pod(
        namespace="juicefs", name="late", uid="9", node="n", ready=ready, restarts=0, problem="", labels={},
        commands=(), claims=(),
    )  # fmt: skip


def test_settle_waits_for_a_pod_that_has_not_started(write, agreeing):
    write.apply()
    clock = Clock()

    def stale_pods():
        if clock.now == 60:
            write.metadata.row = setting(OLD)  # it starts at last
        return [stale_pod(ready=clock.now >= 60)]

    settled = guard_setting(write, agreeing, stale_pods, for_s=10, clock=clock, sleep=clock.sleep)
    assert len(settled.repaired) == 1
    assert settled.wrote == ("late",)
    assert settled.waiting == ()
    assert write.metadata.row.uses(NEW)


def test_settle_does_not_wait_for_ever_and_names_the_pod(write, agreeing):
    write.apply()
    clock = Clock()
    settled = guard_setting(write, agreeing, lambda: [stale_pod(ready=False)], for_s=10, clock=clock, sleep=clock.sleep)
    assert settled.waiting == ("late",)
    assert clock.now == 310


def test_settle_patches_secrets_that_were_put_back(write, agreeing):
    write.apply()
    clock = Clock()

    def stale_pods():
        if clock.now == 5:
            agreeing.cluster.add("juicefs-sc-secret", metaurl=METAURL, name="myjfs", storage="minio", bucket=OLD.bucket)
        return []

    settled = guard_setting(write, agreeing, stale_pods, for_s=10, clock=clock, sleep=clock.sleep)
    assert settled.repaired == ("Secret juicefs/juicefs-sc-secret held other values",)
    assert agreeing.plan() == []


def test_settle_gives_up_on_what_goes_on_writing(write, agreeing):
    write.apply()
    clock = Clock()

    def stale_pods():
        write.metadata.row = setting(OLD)
        return [stale_pod(ready=True)]

    with pytest.raises(NeedsHumanError, match="goes on writing"):
        guard_setting(write, agreeing, stale_pods, for_s=10, clock=clock, sleep=clock.sleep)


@pytest.mark.parametrize(("failing_s", "ends"), [(30, True), (90, False)])
def test_settle_lives_through_a_database_that_is_gone_for_a_moment(write, agreeing, failing_s, ends):
    write.apply()
    clock, read = Clock(), write.metadata.read_setting

    def read_setting():
        if 5 <= clock.now < 5 + failing_s:
            raise TransientError("gone")
        return read()

    write.metadata.read_setting = read_setting
    if ends:
        assert guard_setting(write, agreeing, list, for_s=10, clock=clock, sleep=clock.sleep).repaired == ()
        assert clock.now >= 5 + failing_s + 9  # it could not be seen meanwhile: quiet seconds count from then on
    else:
        with pytest.raises(TransientError, match="gone"):
            guard_setting(write, agreeing, list, for_s=10, clock=clock, sleep=clock.sleep)


def test_a_third_value_that_a_secret_held_is_put_right(write):
    step = replace(write, stale=[OTHER])
    step.metadata.row = setting(OTHER)
    assert step.apply() is True
    assert step.metadata.row.uses(NEW)
    step.metadata.row = setting(OTHER)
    assert step.undo() is True
    assert step.metadata.row.uses(OLD)

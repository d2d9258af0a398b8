"""The setting's write on a real database by a real `juicefs config`: too late, and beside another administrator."""

# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from kubernetes import config
from pydantic import SecretStr

from include.juicefs_storage.adapters.juicefs_command import JuiceFSCommand, in_controller_pod
from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.ports import ExecResult
from include.juicefs_storage.switch import write_setting
from include.juicefs_storage.switch.write_setting import WriteSetting, Written
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.mount_pods import MOUNT_POD_SELECTOR, read_config
from include.juicefs_storage.volume.setting import StorageConfig
from lab.environment import Lab
from lab.process import binary, wait_for
from tests.support.s3_proxy import Request, S3Proxy


@pytest.fixture
def cluster(lab: Lab) -> KubernetesCluster:
    return KubernetesCluster(config.new_client_from_config(str(lab.kube.kubeconfig)), "juicefs")


@pytest.fixture
def metadata(lab: Lab) -> MySqlMetadata:
    return MySqlMetadata.from_metaurl(Metaurl.parse(lab.mariadb.meta_url_with_password))


@pytest.fixture
def juicefs(lab: Lab, cluster: KubernetesCluster) -> JuiceFSCommand:
    return in_controller_pod(cluster, Metaurl.parse(lab.mariadb.meta_url_with_password))


@pytest.fixture
def target(lab: Lab) -> Iterator[tuple[StorageConfig, S3Proxy]]:
    """The new store behind a proxy."""
    store = lab.new_store
    before = store.objects()
    with S3Proxy(store.endpoint_url) as proxy:
        keys = SecretStr(store.access_key), SecretStr(store.secret_key)
        yield StorageConfig("minio", f"{proxy.url}/{store.bucket}", *keys), proxy
    for key in store.objects().keys() - before.keys():
        store.client().delete_object(Bucket=store.bucket, Key=key)


@pytest.fixture
def restored(metadata: MySqlMetadata, cluster: KubernetesCluster, target: object) -> Iterator[None]:
    """Put the setting back, and wait until every mount has followed."""
    before = metadata.read_setting()
    yield
    assert metadata.replace_setting(metadata.read_setting(), before)
    pods = cluster.pods(MOUNT_POD_SELECTOR)
    wait_for(
        "the mounts are back",
        lambda: {read_config(cluster, pod)["Format"]["Bucket"] for pod in pods} == {before.bucket},
        deadline_s=60,
    )


@pytest.mark.usefixtures("restored")
def test_a_command_that_comes_late_is_not_started(
    metadata: MySqlMetadata,
    juicefs: JuiceFSCommand,
    target: tuple[StorageConfig, S3Proxy],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The task was paused after it had confirmed the Lease; the clock of the pod decides when it wakes."""
    monkeypatch.setattr(write_setting, "BEGIN_WITHIN_S", 1)

    def paused(run: Callable[[Sequence[str], str, float], ExecResult]) -> JuiceFSCommand:
        def late(command: Sequence[str], stdin: str, timeout_s: float) -> ExecResult:
            if any(" config " in part for part in command):
                deadline = juicefs.now() + 2
                wait_for("the deadline is over", lambda: juicefs.now() > deadline, deadline_s=30)
            return run(command, stdin, timeout_s)

        return replace(juicefs, run=late)

    before = metadata.read_setting()
    step = WriteSetting(metadata, paused(juicefs.run), before, target[0])
    with pytest.raises(TransientError, match="`juicefs config` was not started"):
        step.apply()
    assert metadata.read_setting().raw == before.raw
    monkeypatch.undo()
    assert replace(step, juicefs=juicefs).apply() == Written(written=True)


@pytest.mark.usefixtures("restored")
def test_an_update_that_comes_late_changes_nothing(metadata: MySqlMetadata) -> None:
    before = metadata.read_setting()
    new, now = before.reencrypted(), metadata.now()
    assert metadata.replace_setting(before, new, not_after=now - 1) is False
    assert metadata.read_setting().raw == before.raw
    assert metadata.replace_setting(before, new, not_after=now + 60) is True
    assert metadata.read_setting().raw == new.raw


@pytest.mark.usefixtures("restored")
def test_what_another_administrator_sets_meanwhile_is_kept(
    lab: Lab, metadata: MySqlMetadata, juicefs: JuiceFSCommand, target: tuple[StorageConfig, S3Proxy]
) -> None:
    config_of_target, proxy = target
    others: list[int] = []
    step = WriteSetting(metadata, juicefs, metadata.read_setting(), config_of_target)

    def other_administrator(request: Request) -> None:
        """By the first PUT that tests the store `juicefs config` has read the setting."""
        if request.method != "PUT" or others:
            return
        others.append(1)
        subprocess.run(
            [binary("juicefs"), "config", lab.mariadb.meta_url, "--yes", "--trash-days", "7"],
            env=os.environ | {"META_PASSWORD": lab.mariadb.password},
            check=True,
            capture_output=True,
            timeout=60,
        )
        # As long as a store takes to answer from another place: the watch polls ten times a second.
        proxy.delay_s = 0.5

    proxy.before = other_administrator
    assert step.apply() == Written(written=True, put_right=("TrashDays",))
    after = metadata.read_setting()
    assert others
    assert after.uses(config_of_target)
    assert after.other_fields["TrashDays"] == 7

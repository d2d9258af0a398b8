"""The write fence on the old store: the policy on a real MinIO front end, and a switch behind a fence."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from pydantic import SecretStr

from include.juicefs_storage.adapters.minio_fence import MinioFence
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.tools.mc_mirror import find
from include.juicefs_storage.errors import PermanentError
from lab.environment import Lab
from lab.process import run, wait_for
from tests.support import s3_servers
from tests.support.fenced import fenced, old_store_behind_proxy, switch
from tests.support.harness import REVERT_ID, Run
from tests.support.labs import lacking, up
from tests.support.s3_proxy import S3Proxy
from tests.support.worker import Fault
from tests.support.world import assert_nothing_lost, writing

USER, USER_KEY = "volumeuser", "volume-user-secret"


@pytest.fixture(scope="module")
def minio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store]:
    with s3_servers.minio(tmp_path_factory.mktemp("gateway"), "vol") as store:
        yield store


def s3(store: S3Store, access_key: str, secret_key: str) -> Any:
    return boto3.client(
        "s3", endpoint_url=store.endpoint, region_name="us-east-1", aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
    )  # fmt: skip


@pytest.fixture
def user(minio: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A client of an ordinary user who may read and write."""
    try:
        mc = find()
    except PermanentError as error:
        lacking(str(error))
    monkeypatch.setenv("MC_HOST_lab", minio.endpoint.replace("://", f"://{minio.access_key}:{minio.secret_key}@"))
    monkeypatch.setenv("MC_CONFIG_DIR", str(tmp_path))
    run([mc, "admin", "user", "add", "lab", USER, USER_KEY])
    MinioFence(minio, SecretStr(USER), "myjfs")._call(
        "PUT", "set-user-or-group-policy", policyName="readwrite", userOrGroup=USER, isGroup="false"
    )
    return s3(minio, USER, USER_KEY)


def denied(call: Any, **what: Any) -> bool:
    try:
        call(**what)
    except ClientError as error:
        return bool(error.response["Error"]["Code"] == "AccessDenied")
    return False


def own_policies(fence: MinioFence) -> str:
    """Those of the user, which a fence leaves as they are."""
    found: str = json.loads(fence._call("GET", "user-info", accessKey=USER))["policyName"]
    return found


def test_the_fence_denies_one_user_the_writes_below_one_volume(minio: S3Store, user: Any) -> None:
    fence = MinioFence(minio, SecretStr(USER), "myjfs")
    mine = {"Bucket": minio.bucket, "Key": "myjfs/chunks/0/0/1_0_1"}
    assert not fence.is_up()
    assert not denied(user.put_object, Body=b"x", **mine)
    for _ in range(2):
        fence.up()
        assert fence.is_up()
        assert denied(user.put_object, Body=b"y", **mine)
        assert denied(user.delete_object, **mine)
        assert user.get_object(**mine)["Body"].read() == b"x"
        assert not denied(user.put_object, Bucket=minio.bucket, Key="another/volume", Body=b"z")
    for _ in range(2):
        fence.down()
        assert not fence.is_up()
        assert not denied(user.put_object, Body=b"y", **mine)
    assert own_policies(fence) == "readwrite"


def test_the_old_key_is_denied_everything_until_a_moment_whatever_becomes_of_the_worker(
    minio: S3Store, user: Any
) -> None:
    mine = {"Bucket": minio.bucket, "Key": "myjfs/chunks/0/0/2_0_1"}
    user.put_object(Body=b"x", **mine)
    ends_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=4)
    off, fence = (MinioFence(minio, SecretStr(USER), "myjfs", until) for until in (ends_at, None))
    off.up()
    assert (off.is_up(), fence.is_up()) == (True, False)
    assert denied(user.get_object, **mine)
    assert denied(user.put_object, Body=b"y", **mine)
    assert not denied(user.put_object, Bucket=minio.bucket, Key="another/volume", Body=b"z")
    wait_for("the denial ends by itself", lambda: not denied(user.get_object, **mine), deadline_s=10)
    assert datetime.now(UTC) >= ends_at
    off = MinioFence(minio, SecretStr(USER), "myjfs", datetime.now(UTC) + timedelta(hours=1))
    off.up()
    assert denied(user.get_object, **mine)
    off.down()
    assert not denied(user.get_object, **mine)


def test_whether_a_key_may_write_is_asked_without_a_write(minio: S3Store, user: Any) -> None:
    fence, key = MinioFence(minio, SecretStr(USER), "myjfs"), "myjfs/.storage-switch-door"
    old = S3Bucket(replace(minio, access_key=USER, secret_key=USER_KEY))
    before = [item.key for item in S3Bucket(minio).list("")]
    assert old.takes_writes(key) is True
    fence.up()
    assert old.takes_writes(key) is False
    fence.down()
    assert S3Bucket(replace(minio, access_key="nobody")).takes_writes(key) is False
    assert [item.key for item in S3Bucket(minio).list("")] == before


def test_volumes_with_one_key_are_fenced_side_by_side(minio: S3Store, user: Any) -> None:
    names = [f"vol{number}" for number in range(8)]
    fences = [MinioFence(minio, SecretStr(USER), name) for name in names]

    def writes() -> list[str]:
        return [name for name in names if not denied(user.put_object, Bucket=minio.bucket, Key=f"{name}/x", Body=b"x")]

    with ThreadPoolExecutor(len(fences)) as pool:
        list(pool.map(MinioFence.up, fences))
        assert writes() == []
        assert own_policies(fences[0]) == "readwrite"
        list(pool.map(MinioFence.down, fences[::2]))
        assert writes() == names[::2]
        list(pool.map(MinioFence.down, fences))
    assert writes() == names


def test_a_user_that_cannot_be_fenced_off_is_reported(minio: S3Store) -> None:
    with pytest.raises(PermanentError, match="no user there"):
        MinioFence(minio, SecretStr(minio.access_key), "myjfs").is_up()
    with pytest.raises(PermanentError, match="answered 403"):
        MinioFence(replace(minio, secret_key="of-another"), SecretStr(USER), "myjfs").is_up()


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A lab of its own: a whole run leaves its Lease and blocks on both stores."""
    yield from up(tmp_path_factory.mktemp("fence"), airflow=False, heartbeat_s=1)


@pytest.fixture
def proxied(lab: Lab) -> Iterator[S3Proxy]:
    lab.seed(5)
    lab.copy_to_new_store()
    with old_store_behind_proxy(lab) as proxy:
        yield proxy


@pytest.mark.timeout(900)
def test_behind_a_fence_no_block_lands_on_the_old_store_and_no_write_fails(
    lab: Lab, proxied: S3Proxy, tmp_path: Path
) -> None:
    seen: list[set[str]] = []

    def look() -> None:
        seen.append({key for key in lab.old_store.objects() if "/chunks/" in key})

    with writing(lab, "fenced") as writer:
        broken = Fault("prove_blocks", "after", error="ordered", tries=9)
        made = fenced(switch(lab, tmp_path / "fenced", broken), proxied)
        raised: list[bool] = []
        made.before |= {"patch_secret": look, "decide": look, "prove_clients": lambda: raised.append(proxied.read_only)}
        assert made.go() == "rolled back", made.errors
        acknowledged = writer.summary().written
        wait_for("the writer continues", lambda: writer.summary().written > acknowledged + 3, deadline_s=60)
    assert raised == [True]
    in_force, judged = seen
    assert judged - in_force == set()
    # Down before the clients came back, and nothing else of the user's rights has changed.
    assert proxied.groups == set()
    assert set(proxied.policies) == {"juicefs-storage-fence-myjfs"}
    assert made.xcom("write_setting")["fenced"] is True
    assert writer.summary().write_errors == []
    assert_nothing_lost(lab, writer)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_revert_puts_its_fence_on_the_store_that_the_volume_leaves(lab: Lab, tmp_path: Path) -> None:
    lab.seed(5)
    lab.copy_to_new_store()
    with S3Proxy(lab.new_store.endpoint_url) as proxy, writing(lab, "reverted") as writer:
        moved = switch(lab, tmp_path / "there", target_endpoint=proxy.url)
        assert moved.go() == "switched", moved.errors
        backup = {"backup_id": moved.xcom("finalize", "report")["backup_id"], "dry_run": False}
        back = fenced(
            Run(lab, tmp_path / "back", "back", {**backup, "require_approval": False}, dag_id=REVERT_ID), proxy
        )
        back.states["choose_backup"] = "success"  # there is nothing to choose
        seen: list[bool] = []
        back.before["prove_clients"] = lambda: seen.append(proxy.read_only)
        assert back.go() == "reverted", back.errors
        # No mount pod was started with the values of that store: nothing would write them back.
        assert (seen, proxy.read_only) == ([True], False)
    assert writer.summary().write_errors == []
    assert_nothing_lost(lab, writer)

"""Finishing a move on the lab: a container that restarts, the door, switching off, a writer that nobody sees."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from include.juicefs_storage.finish.certificate import verify
from include.juicefs_storage.switch.moved_back import check_setting
from include.juicefs_storage.volume.setting import Setting
from lab.environment import Lab
from lab.process import wait_for
from tests.support.fenced import fenced, old_store_behind_proxy, switch
from tests.support.harness import FINISH_ID, Run, vault
from tests.support.labs import up
from tests.support.s3_proxy import S3Proxy
from tests.support.second_cluster import EAST, second_cluster
from tests.support.worker import Fault
from tests.support.world import assert_nothing_lost, row, writing

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MINIO_FENCE = "include.juicefs_storage.adapters.minio_fence:MinioFence"
#: A block that a `juicefs gc --compact` may write: no session shows it, and no file refers to it yet.
STRAY = "myjfs/chunks/0/0/999_0_4"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """With a driver that upgrades smoothly."""
    for lab in up(tmp_path_factory.mktemp("finish"), airflow=False, heartbeat_s=1, keeps_fuse=True):
        lab.seed(10)
        lab.copy_to_new_store()
        yield lab


def finish(lab: Lab, folder: Path, *faults: Fault, **params: object) -> Run:
    given = {"dry_run": False, "require_approval": False, "pause_s": 0, **params}
    made = Run(lab, folder, f"finish__{folder.name}", given, faults, dag_id=FINISH_ID)
    key = {"conn_type": "generic", "password": base64.b64encode(bytes(range(32))).decode()}
    made.environment["AIRFLOW_CONN_JUICEFS_CERTIFICATE"] = json.dumps(key)
    return made


def kill_container(lab: Lab) -> None:
    """Kill the mount that the writer does not use, as the out-of-memory killer would; wait until it is back."""
    pod = pod_of(lab, lab.mounts()[1])
    before = restarts(lab, pod)
    lab.kube.order_fault({"kill": pod})
    wait_for("the container is back", lambda: restarts(lab, pod) == before + 1, deadline_s=60)


def pod_of(lab: Lab, mount: Path) -> str:
    pods = json.loads(lab.kubectl("get", "pods", "-n", "juicefs", "-o", "json"))["items"]
    (name,) = [
        pod["metadata"]["name"]
        for pod in pods
        if any(f"/jfs/{mount.name} " in f"{line} " for c in pod["spec"]["containers"] for line in c.get("command", []))
    ]
    return str(name)


def restarts(lab: Lab, pod: str) -> int:
    status = json.loads(lab.kubectl("get", "pod", "-n", "juicefs", pod, "-o", "json"))["status"]["containerStatuses"][0]
    return int(status["restartCount"]) if status["ready"] else -1


def bucket(lab: Lab) -> str:
    return str(lab.mariadb.setting()["Bucket"])


def test_a_container_that_restarts_is_warned_of_detected_and_after_finishing_harmless(lab: Lab, tmp_path: Path) -> None:
    moved = switch(lab, tmp_path / "there")
    assert moved.go() == "switched", moved.errors
    # Both stores take the same keys, as is ordinary where MinIO is moved.
    lab.old_store.take_only(lab.old_store.with_keys(lab.old_store.access_key, lab.new_store.secret_key))
    try:
        look = finish(lab, tmp_path / "look", dry_run=True)
        assert look.go() == "planned", look.errors
        assert "Restarted, 2 pods made with the old values would write" in look.xcom("plan", "markdown")

        began = time.monotonic()
        kill_container(lab)
        wait_for("the old bucket is back", lambda: bucket(lab) == lab.old_store.bucket_url, deadline_s=30)
        (found,) = check_setting(vault(lab), Setting(row(lab)))
        assert (found.level, time.monotonic() - began < 60) == ("refusal", True)
        assert f"back to {lab.old_store.bucket_url}" in found.message
        refused = finish(lab, tmp_path / "refused")
        assert refused.go() == "failed"
        assert "moved since the last switch" in refused.errors["plan"]
        print(f"killed, brought back and detected within {time.monotonic() - began:.1f} s")

        lab.old_store.take_only(lab.old_store)
        again = switch(lab, tmp_path / "again")
        assert again.go() == "switched", again.errors
        lab.old_store.take_only(lab.old_store.with_keys(lab.old_store.access_key, lab.new_store.secret_key))
        with writing(lab, "finished") as writer:
            done = finish(lab, tmp_path / "done", refresh_mount_pods=True, most_pods=0)
            assert done.go() == "refreshed", done.errors
            kill_container(lab)
            assert bucket(lab) == lab.new_store.bucket_url
            acknowledged = writer.summary().written
            wait_for("the writer continues", lambda: writer.summary().written > acknowledged + 3, deadline_s=60)
        assert writer.summary().write_errors == []
        assert_nothing_lost(lab, writer)
    finally:
        lab.old_store.take_only(lab.old_store)


def go_back(lab: Lab) -> None:
    """Have the volume on the old store."""
    if bucket(lab) == lab.old_store.bucket_url:
        return
    back = switch(lab, lab.state / f"back-{time.monotonic_ns()}")
    back.params |= {"target_conn_id": "minio_old", "target_bucket": lab.old_store.bucket}
    assert back.go() == "switched", back.errors


@pytest.fixture
def proxied(lab: Lab) -> Iterator[S3Proxy]:
    """The volume was moved away from a store with an administrator."""
    go_back(lab)
    with old_store_behind_proxy(lab) as proxy:
        moved = switch(lab, lab.state / f"moved-{time.monotonic_ns()}")
        assert moved.go() == "switched", moved.errors
        yield proxy


def while_off(proxy: S3Proxy, do: Callable[[], None]) -> float:
    """Do something while the old key is denied everything; return how many seconds later it was allowed again."""
    off = "juicefs-storage-off-myjfs"
    wait_for("the old key is denied", lambda: off in proxy.groups, deadline_s=120)
    began = time.monotonic()
    do()
    wait_for("it is allowed again", lambda: off not in proxy.groups, deadline_s=60)
    return time.monotonic() - began


def test_a_move_is_finished_while_an_application_goes_on(lab: Lab, proxied: S3Proxy, tmp_path: Path) -> None:
    made = finish(
        lab, tmp_path / "all", refresh_mount_pods=True, most_pods=0, close_door=True, rehearse_off_s=10, watch=True,
        watch_every_s=10, certify=True, idle_s=60,
    )  # fmt: skip
    seen: list[set[str]] = []

    def write_stray() -> None:
        seen.append(set(proxied.groups))
        lab.old_store.client().put_object(Bucket=lab.old_store.bucket, Key=STRAY, Body=b"gone")

    made.before["watch"] = write_stray
    with writing(lab, "all") as writer:
        outcome = fenced(made, proxied).go()
    assert outcome == "certified", (made.errors, made.xcom("finalize", "markdown"))
    assert seen == [{"juicefs-storage-fence-myjfs"}]
    assert proxied.groups == seen[0], "the door stays closed"
    assert made.xcom("rehearse_off")["errors"] == 0
    print(made.xcom("rehearse_off")["line"])
    assert STRAY in lab.new_store.objects()
    report = made.xcom("finalize", "markdown")
    assert f"1 block came to {lab.old_store.bucket}" in report
    assert "refuses the old key's writes: the fence is up, and stays up" in report
    said = [claim.seen for claim in verify(made.xcom("certify", "certificate"), public_key(made)).claims]
    assert any("refuses its writes" in line for line in said)
    assert any(line.startswith("quiet since") for line in said)
    assert writer.summary().write_errors == []
    assert_nothing_lost(lab, writer)


def public_key(made: Run) -> str:
    return str(made.xcom("certify")["public_key"])


def test_a_rehearsal_of_switching_off_is_undone_at_the_first_error_and_after_a_kill(
    lab: Lab, proxied: S3Proxy, tmp_path: Path
) -> None:
    made = fenced(finish(lab, tmp_path / "errors", rehearse_off_s=120), proxied)
    with writing(lab, "errors") as writer, ThreadPoolExecutor(1) as pool:
        undone = pool.submit(while_off, proxied, lab.new_store.refuse_writes)
        assert made.go() == "failed"
        lab.new_store.allow_writes()
        took_s = undone.result()
        acknowledged = writer.summary().written
        wait_for("the writer continues", lambda: writer.summary().written > acknowledged + 3, deadline_s=60)
    print(f"allowed again {took_s:.1f} s after the store refused the first write")
    assert took_s < 5
    assert "the old store was missed" in made.errors["rehearse_off"]
    assert writer.summary().write_errors == []

    killed = Fault("rehearse_off", "after", f"{MINIO_FENCE}.up")
    made = fenced(finish(lab, tmp_path / "killed", killed, rehearse_off_s=120), proxied)
    seen: list[bool] = []
    made.before["finalize"] = lambda: seen.append("juicefs-storage-off-myjfs" in proxied.groups)
    assert made.go() == "failed"
    assert made.struck == {killed: 1}
    assert seen == [True], "it was denied when the worker was killed"
    assert proxied.groups == set()
    assert_nothing_lost(lab, writer)


def test_mount_pods_of_another_cluster_are_replaced_there(
    lab: Lab, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    go_back(lab)
    both = {"more_kubernetes_conn_ids": [EAST]}
    with second_cluster(lab, lab.old_store, tmp_path_factory.mktemp("east"), keeps_fuse=True) as east:
        moved = switch(lab, tmp_path / "moved")
        moved.params |= both
        moved.environment |= east.connection
        assert moved.go() == "switched", moved.errors
        made = finish(lab, tmp_path / "both", refresh_mount_pods=True, most_pods=0, **both)
        made.environment |= east.connection
        with writing(lab, "both") as writer:
            assert made.go() == "refreshed", made.errors
        replaced = {row["old"]: row["new"] for row in made.xcom("refresh_mount_pods")}
        assert [old.startswith(f"{EAST}/") and new.startswith(f"{EAST}/") for old, new in replaced.items()].count(True)
        assert made.xcom("finalize", "report")["carriers"] == []
        assert "Cluster kubernetes_east: all" in made.xcom("plan", "markdown")
        assert writer.summary().write_errors == []
    assert_nothing_lost(lab, writer)

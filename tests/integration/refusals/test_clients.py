"""What is refused of the volume and its clients: those that would not follow, or cannot be proven."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Callable, Iterator

import pytest
from kubernetes import client

from lab.environment import Lab
from lab.process import binary, run, wait_for
from tests.support.mounted import mount_of, mounted
from tests.support.refusals import MOUNT_PODS, NS, Look, refusals, warnings


def test_a_heartbeat_longer_than_the_timeout(core: client.CoreV1Api, look: Look) -> None:
    with mounted(core, "heartbeat=30") as pod:
        (refused,) = refusals(look("check_volume", client_timeout_s=10))
        assert f"{pod.metadata.name} has a heartbeat of 30 s" in refused
        assert "client_timeout_s to more than 60" in refused
        assert refusals(look("check_volume", client_timeout_s=60)) == []


def test_a_bucket_of_its_own_among_the_mount_options(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    """Also where it is the bucket in use, which `.config` cannot tell from following the setting."""
    option = f"bucket={lab.old_store.bucket_url}"
    with mounted(core, option) as pod:
        refused = refusals(look("check_volume"))
        assert any(pod.metadata.name in line and f"({option})" in line for line in refused)
        assert any(line.startswith("PersistentVolume extra-") and option in line for line in refused)
        assert len(refused) == 2


def test_a_kind_of_storage_of_its_own_among_the_mount_options(core: client.CoreV1Api, look: Look) -> None:
    with mounted(core, "storage=minio"):
        refused = refusals(look("check_volume"))
    assert len(refused) == 2
    assert all("storage=minio" in line for line in refused)


def test_a_bucket_of_its_own_in_the_storage_class_is_a_warning(core: client.CoreV1Api, look: Look) -> None:
    """No volume has it yet; the next one that is provisioned would."""
    storage, name = client.StorageV1Api(core.api_client), "juicefs-sc"
    storage.patch_storage_class(name, {"mountOptions": ["cache-size=1", "bucket=http://elsewhere/b"]})
    try:
        findings = look("check_secrets")
    finally:
        storage.patch_storage_class(name, {"mountOptions": None})
    assert refusals(findings) == []
    (warned,) = warnings(findings)
    assert f"StorageClass {name} has mountOptions bucket=http://elsewhere/b" in warned
    assert warnings(look("check_secrets")) == []


def test_a_bucket_in_the_configuration_of_the_driver_is_a_warning(core: client.CoreV1Api, look: Look) -> None:
    name = "juicefs-csi-driver-config"
    before = core.read_namespaced_config_map(name, NS).data
    patches = "mountPodPatch:\n- labels: {a: b}\n- mountOptions: [cache-size=1, storage=s3]\n"
    core.patch_namespaced_config_map(name, NS, {"data": {"config.yaml": patches}})
    try:
        findings = look("check_secrets")
    finally:
        core.patch_namespaced_config_map(name, NS, {"data": before})
    assert refusals(findings) == []
    (warned,) = warnings(findings)
    assert f"ConfigMap {NS}/{name} has mountOptions storage=s3" in warned


def test_a_read_only_mount_is_no_refusal(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    """It has no session: found by its `.config` alone."""
    with mounted(core, "ro") as pod:
        findings = look("check_volume", dry_run=False)
        assert json.loads((mount_of(lab, pod) / ".config").read_text())["Meta"]["ReadOnly"]
    assert (refusals(findings), warnings(findings)) == ([], [])
    assert "3 mount pods" in next(finding.message for finding in findings if finding.level == "ok")


@contextlib.contextmanager
def session_version(lab: Lab, version: str) -> Iterator[str]:
    """A client of the volume that says in its session that it is of another version; its mount point."""
    sid, info = lab.mariadb.query("SELECT sid, info FROM jfs_session2")[0]
    said = json.loads(info)
    query = "UPDATE jfs_session2 SET info = %s WHERE sid = %s"
    lab.mariadb.query(query, (json.dumps(said | {"Version": version}), sid))
    try:
        yield said["MountPoint"]
    finally:
        lab.mariadb.query(query, (info, sid))


@contextlib.contextmanager
def broken_mount_pod(core: client.CoreV1Api, volume_id: str, command: str) -> Iterator[None]:
    name = f"juicefs-node-1-{volume_id}-broken"
    labels = {"app.kubernetes.io/name": "juicefs-mount", "volume-id": volume_id}
    container = {
        "name": "jfs-mount",
        "image": "juicefs/mount:ce-v1.4.2",
        "command": ["sh", "-c", f"{command}; exec juicefs mount mysql://x /jfs/{volume_id}-broken"],
    }
    spec = {"nodeName": "node-1", "restartPolicy": "Never", "containers": [container]}
    core.create_namespaced_pod(NS, {"metadata": {"name": name, "labels": labels}, "spec": spec})
    wanted = "Failed" if "exit" in command else "Running"
    try:
        wait_for(wanted, lambda: core.read_namespaced_pod(name, NS).status.phase == wanted, deadline_s=40)
        yield
    finally:
        core.delete_namespaced_pod(name, NS, grace_period_seconds=0)


@pytest.mark.parametrize("command", ["exit 1", "sleep 600"], ids=["Failed", "without a mount"])
def test_a_broken_mount_pod_of_another_volume_is_left_alone(core: client.CoreV1Api, look: Look, command: str) -> None:
    with broken_mount_pod(core, "pvc-of-another", command):
        findings = look("check_volume", "check_secrets", "check_target_bucket")
    assert refusals(findings) == []


def test_a_broken_mount_pod_of_this_volume_is_a_refusal(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    own = core.list_namespaced_pod(NS, label_selector=MOUNT_PODS).items[0].metadata.labels["volume-id"]
    with broken_mount_pod(core, own, "sleep 600"):
        (refused,) = refusals(look("check_volume"))
    assert "broken: " in refused
    assert ".config cannot be read" in refused


def test_a_mount_with_prefix_internal(core: client.CoreV1Api, look: Look) -> None:
    with mounted(core, "prefix-internal"):
        findings = look("check_volume")
    assert refusals(findings) == []
    assert "3 mount pods" in next(finding.message for finding in findings if finding.level == "ok")


@pytest.mark.parametrize("version", ["1.0.4+2023-04-06.f1c475d", "0.17.5"])
def test_a_client_that_is_too_old_to_follow(lab: Lab, look: Look, version: str) -> None:
    with session_version(lab, version) as mount_point:
        (refused,) = refusals(look("check_volume"))
    assert f"at {mount_point} runs JuiceFS {version}, needs 1.1" in refused


def test_writeback_is_a_warning_and_staged_blocks_a_refusal(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    with mounted(core, "writeback") as pod:
        findings = look("check_volume")
        assert refusals(findings) == []
        assert any(pod.metadata.name in line and "writeback" in line for line in warnings(findings))
        mount = lab.kube.state / "jfs" / f"{pod.metadata.labels['volume-id']}-{pod.metadata.name[-6:]}"
        lab.old_store.refuse_writes()
        try:
            (mount / "staged").write_bytes(secrets.token_bytes(100_000))
            wait_for("it is refused", lambda: refusals(look("check_volume")), deadline_s=20)
            (refused,) = refusals(look("check_volume"))
            assert "1 blocks wait in its cache" in refused
            assert "juicefs_staging_blocks" in refused
        finally:
            lab.old_store.allow_writes()
        wait_for("the block was uploaded", lambda: not refusals(look("check_volume")), deadline_s=90)
        (mount / "staged").unlink()


def test_writeback_with_delayed_uploads(core: client.CoreV1Api, look: Look) -> None:
    with mounted(core, "writeback", "upload-delay=1h"):
        (refused,) = refusals(look("check_volume"))
    assert "its options delay uploads" in refused


def test_a_session_that_is_no_mount_pod(lab: Lab, look: Look) -> None:
    with lab.fresh_mount(read_only=False) as mount:
        (refused,) = refusals(look("check_volume"))
        assert f"at {mount} is no mount pod" in refused


def test_a_session_that_has_expired_is_a_warning(lab: Lab, look: Look) -> None:
    """As of a client that is suspended. The other clients remove it within a heartbeat."""

    def warned() -> list[str]:
        info = json.dumps({"Version": "1.4.2", "HostName": "vm", "MountPoint": "/mnt/suspended"})
        row = "REPLACE INTO jfs_session2 VALUES (999, UNIX_TIMESTAMP() - 1, %s)"
        lab.mariadb.query(row, (info,))
        return [line for line in warnings(look("check_volume")) if "Session 999 on vm" in line]

    wait_for("it is named", lambda: bool(warned()), deadline_s=40)
    lab.mariadb.query("DELETE FROM jfs_session2 WHERE sid = 999")


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_metadata_account_that_may_only_read(
    lab: Lab, connections: Callable[..., None], look: Look, dry_run: bool
) -> None:
    user = f"reader{dry_run}"
    password = lab.mariadb.add_reader(user)
    server = {"host": lab.mariadb.host, "port": lab.mariadb.port, "schema": lab.mariadb.database}
    connections("meta_reader", conn_type="mysql", login=user, password=password, **server)
    before = lab.mariadb.setting()
    (refused,) = refusals(look("check_volume", meta_conn_id="meta_reader", dry_run=dry_run))
    assert "cannot be updated, which a way back needs. The metadata database answered: 1142" in refused
    assert lab.mariadb.setting() == before


def test_a_metadata_server_that_takes_no_writes(lab: Lab, look: Look) -> None:
    lab.mariadb.set_read_only(on=True)
    try:
        found = refusals(look("check_volume"))
    finally:
        lab.mariadb.set_read_only(on=False)
    assert [line for line in found if "cannot be updated, which a way back needs" in line and "1290" in line]


def test_trying_the_update_leaves_the_setting_and_the_clients_alone(lab: Lab, look: Look) -> None:
    before = lab.mariadb.query("SELECT value FROM jfs_setting")
    lab.mariadb.start_general_log()
    findings = look("check_volume")
    lab.mariadb.stop_general_log()
    assert refusals(findings) == []
    executed = [line for line in lab.mariadb.general_log_statements("jfs") if line.startswith(("UPDATE", "ROLLBACK"))]
    tried = [number for number, line in enumerate(executed) if "value = value" in line]
    assert len(tried) == 1
    assert "ROLLBACK" in executed[tried[0] + 1 :]
    assert lab.mariadb.query("SELECT value FROM jfs_setting") == before


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("option", ["--inodes", "--capacity"])
def test_a_volume_at_its_quota(lab: Lab, look: Look, option: str, dry_run: bool) -> None:
    files = int(lab.mariadb.query("SELECT value FROM jfs_counter WHERE name = 'totalInodes'")[0][0])
    large = lab.mounts()[0] / "refusals" / f"large{option}{dry_run}"
    with large.open("wb") as sparse:
        sparse.truncate(1 << 30)
    quota = {"--inodes": str(files + 2), "--capacity": "1"}[option]  # capacity is in GiB
    juicefs_config(lab, option, quota)
    try:
        wait_for("it is refused", lambda: bool(refusals(look("check_volume"))), deadline_s=40)
        found = refusals(look("check_volume", dry_run=dry_run))
    finally:
        juicefs_config(lab, option, "0")
        wait_for("all is well again", lambda: not refusals(look("check_volume")), deadline_s=40)
    assert [line for line in found if "a quota of the volume or of a directory is met" in line]


def juicefs_config(lab: Lab, *options: str) -> None:
    run(
        [binary("juicefs"), "config", lab.mariadb.meta_url, "--yes", *options],
        env={"META_PASSWORD": lab.mariadb.password},
    )


def test_a_real_run_tries_every_mount_and_leaves_nothing(lab: Lab, look: Look) -> None:
    dry, real = (look("check_volume", dry_run=dry_run) for dry_run in (True, False))
    assert [finding.message for finding in dry if finding.check == "canaries"] == []
    (finding,) = [finding for finding in real if finding.check == "canaries"]
    assert finding.message == f"a block was written through each of 2 mounts to {lab.old_store.bucket_url}"
    assert list(lab.mounts()[0].glob(".storage-switch-*")) == []


def test_a_kind_in_capitals_is_no_other_kind(lab: Lab, look: Look) -> None:
    def kinds() -> set[str]:
        return {json.loads((mount / ".config").read_text())["Format"]["Storage"] for mount in lab.mounts()}

    juicefs_config(lab, "--storage", "MINIO")
    try:
        wait_for("the clients follow", lambda: kinds() == {"MINIO"}, deadline_s=40)
        findings = look("check_volume", "check_secrets", "check_target_bucket", dry_run=False)
    finally:
        juicefs_config(lab, "--storage", "minio")
    assert refusals(findings) == []
    assert not [line for line in warnings(findings) if "storage" in line or "minio" in line.lower()]


def test_a_juicefs_that_is_older_than_a_client(lab: Lab, look: Look) -> None:
    with session_version(lab, "1.99.0+2030-01-01.abcdef0"):
        (refused,) = refusals(look("check_volume"))
    assert "juicefs is version 1." in refused
    assert "a client of the volume 1.99.0" in refused
    assert "juicefs_runner=worker" in refused

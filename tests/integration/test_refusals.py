"""What a switch refuses, and what it warns of: each provoked in the lab, and found by the checks of the DAG's tasks.

The tasks' own code runs, without a scheduler: connections come from the environment, as Airflow offers.
"""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import base64
import contextlib
import json
import re
import secrets
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from kubernetes import client, config

from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.ports import Right
from include.juicefs_storage.switch.checks import check_csi, needed_rights
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.switch.params import resolve_switch_params
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.metaurl import Metaurl
from lab.environment import Lab
from lab.process import LabError, binary, free_ports, run, wait_for

if TYPE_CHECKING:
    from pathlib import Path

NS, APPS, SECRET = "juicefs", "apps", "juicefs-sc-secret"
MOUNT_PODS = "app.kubernetes.io/name=juicefs-mount"
UUID_KEY = "myjfs/juicefs_uuid"
Look = Callable[..., list[Finding]]


@pytest.fixture(scope="module")
def core(lab: Lab) -> client.CoreV1Api:
    return client.CoreV1Api(config.new_client_from_config(str(lab.kube.kubeconfig)))


@pytest.fixture(scope="module")
def apps(core: client.CoreV1Api) -> client.AppsV1Api:
    return client.AppsV1Api(core.api_client)


@pytest.fixture(scope="module", autouse=True)
def copied(lab: Lab) -> Iterator[None]:
    """A volume with some files and a copy of it; afterwards the new store is as empty as it was."""
    before = set(lab.new_store.objects())
    folder = lab.mounts()[0] / "refusals"
    folder.mkdir()
    for number in range(20):
        (folder / str(number)).write_bytes(secrets.token_bytes(5000))
    lab.copy_to_new_store()
    yield
    for key in set(lab.new_store.objects()) - before:
        lab.new_store.client().delete_object(Bucket=lab.new_store.bucket, Key=key)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.fixture
def connections(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set a connection, as an environment variable."""

    def connect(conn_id: str, **values: object) -> None:
        monkeypatch.setenv(f"AIRFLOW_CONN_{conn_id.upper()}", json.dumps(values))

    connect("kubernetes_default", conn_type="kubernetes", extra={"kube_config_path": str(lab.kube.kubeconfig)})
    connect("minio_new", **new_store(lab))
    key = base64.b64encode(secrets.token_bytes(32)).decode()
    connect("juicefs_backup", conn_type="generic", password=key, extra={"path": tmp_path.as_uri()})
    return connect


def new_store(lab: Lab, *, secret_key: str = "", endpoint_url: str = "") -> dict[str, object]:
    return {
        "conn_type": "aws",
        "login": lab.new_store.access_key,
        "password": secret_key or lab.new_store.secret_key,
        "extra": {
            "endpoint_url": endpoint_url or lab.new_store.endpoint_url,
            "region_name": "us-east-1",
            "config_kwargs": {"s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 1}},
        },
    }


@pytest.fixture
def look(lab: Lab, connections: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Look:
    """Run checks of the DAG and return their findings."""
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    from airflow.sdk.exceptions import AirflowFailException

    from include.juicefs_storage.errors import TransientError
    from include.juicefs_storage.switch.checks import consistency
    from include.juicefs_storage.tasks import context, runtime
    from include.juicefs_storage.tasks.switch import check

    # Whatever other tests have left in the volume: a sample that is all of it meets the block that a test changes.
    monkeypatch.setattr(consistency, "SAMPLE_BLOCKS", 10**6)

    def run(*names: str, **params: object) -> list[Finding]:
        given = {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket, "consistency": "off"}
        made = runtime.Runtime(resolve_switch_params(given | params, {}))
        pushed: dict[str, list[Any]] = {}
        kept = SimpleNamespace(
            xcom_push=lambda key, value: pushed.setdefault(key, []).append(value), xcom_pull=lambda **_: None
        )
        current = {"ti": kept, "dag": SimpleNamespace(dag_id="juicefs_storage_switch"), "run_id": "manual__test"}
        for module in (context.__name__, "include.juicefs_storage.tasks.switch.run"):
            monkeypatch.setattr(f"{module}.get_current_context", lambda: current)
        monkeypatch.setattr(runtime.Runtime, "of_run", lambda: made)
        made_by = names or tuple(check.CHECK_FUNCTIONS)
        for name in made_by:
            with contextlib.suppress(AirflowFailException, TransientError):
                getattr(check, name).function()
        assert len(pushed["findings"]) == len(made_by)
        return [Finding.model_validate(row) for rows in pushed["findings"] for row in rows]

    return run


def of_level(level: str, findings: list[Finding]) -> list[str]:
    assert all(finding.remedy for finding in findings if finding.level != "ok")
    return [f"{finding.message} | {finding.remedy}" for finding in findings if finding.level == level]


def refusals(findings: list[Finding]) -> list[str]:
    return of_level("refusal", findings)


def warnings(findings: list[Finding]) -> list[str]:
    return of_level("warning", findings)


@contextlib.contextmanager
def mounted(core: client.CoreV1Api, *options: str) -> Iterator[client.V1Pod]:
    """Another mount pod of the volume, whose PV has these mountOptions as well."""
    name = f"extra-{uuid.uuid4().hex[:8]}"
    claim = core.read_namespaced_persistent_volume_claim("data", APPS)
    volume = core.read_persistent_volume(claim.spec.volume_name)
    spec = core.api_client.sanitize_for_serialization(volume.spec)
    spec["csi"]["volumeHandle"] = name
    spec["claimRef"] = {"kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": APPS, "name": name}
    spec["mountOptions"] = [*(option for option in spec["mountOptions"] if "heartbeat" not in option), *options]
    if not any("heartbeat" in option for option in options):
        spec["mountOptions"].append("heartbeat=3")
    core.create_persistent_volume({"metadata": {"name": name}, "spec": spec})
    bound = {"volumeName": name, "accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    core.create_namespaced_persistent_volume_claim(APPS, {"metadata": {"name": name}, "spec": bound})
    container = {"name": "app", "image": "busybox", "volumeMounts": [{"name": "d", "mountPath": "/data"}]}
    volumes = [{"name": "d", "persistentVolumeClaim": {"claimName": name}}]
    pod = {"nodeName": "node-1", "containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 2}
    core.create_namespaced_pod(APPS, {"metadata": {"name": name}, "spec": pod})

    def mount_pods() -> list[client.V1Pod]:
        return list(core.list_namespaced_pod(NS, label_selector=f"{MOUNT_PODS},volume-id={name}").items)

    try:
        wait_for("the pod runs", lambda: ready(core.read_namespaced_pod(name, APPS)), deadline_s=40)
        yield mount_pods()[0]
    finally:
        core.delete_namespaced_pod(name, APPS)
        wait_for("its mount pod is gone", lambda: not mount_pods(), deadline_s=40)
        core.delete_namespaced_persistent_volume_claim(name, APPS)
        core.delete_persistent_volume(name)
        with contextlib.suppress(client.ApiException):
            core.delete_namespaced_secret(f"juicefs-{name}-secret", NS)


def ready(pod: client.V1Pod) -> bool:
    return any(row.type == "Ready" and row.status == "True" for row in pod.status.conditions or [])


@contextlib.contextmanager
def new_object(lab: Lab, key: str, body: bytes | None) -> Iterator[None]:
    """An object on the new store is another one, or gone; put back afterwards."""
    s3, bucket = lab.new_store.client(), lab.new_store.bucket
    had = s3.get_object(Bucket=bucket, Key=key)["Body"].read() if key in lab.new_store.objects() else None

    def put(content: bytes | None) -> None:
        if content is None:
            s3.delete_object(Bucket=bucket, Key=key)
        else:
            s3.put_object(Bucket=bucket, Key=key, Body=content)

    put(body)
    try:
        yield
    finally:
        put(had)


def some_block(lab: Lab) -> str:
    """A block that both stores have and some file refers to: of the slices, the newest one copied."""
    metadata = MySqlMetadata.from_metaurl(Metaurl.parse(lab.mariadb.meta_url_with_password))
    row, copied = metadata.read_setting(), lab.new_store.objects("myjfs/chunks/")
    keys = [key for one in metadata.slices() for key, _ in block_objects(row, *one)]
    return next(key for key in reversed(keys) if key in copied)


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_volume_that_can_move_is_not_refused(lab: Lab, look: Look, dry_run: bool) -> None:
    findings = look(dry_run=dry_run, consistency="listing")
    assert (refusals(findings), warnings(findings)) == ([], [])
    assert {finding.check for finding in findings} >= {
        "rights", "csi", "volume", "runner", "secrets", "vault", "target", "reach", "consistency",
    }  # fmt: skip
    assert "3 pods that will use it" in next(finding.message for finding in findings if finding.check == "reach")
    assert not [key for key in lab.new_store.objects() if "probe" in key]


@pytest.mark.parametrize("right", needed_rights(NS), ids=str)
def test_a_missing_right(lab: Lab, look: Look, right: Right) -> None:
    resource = "/".join(part for part in (right.resource, right.subresource) if part)
    lab.kube.order_fault({"deny": {"verb": right.verb, "group": right.group, "resource": resource}})
    try:
        refused = refusals(look("check_rights"))
    finally:
        lab.kube.clear_faults()
    assert any(f"may not {right}." in line for line in refused)
    assert all(f" {right.verb} {resource}" in line and "deploy/rbac.yaml" in line for line in refused)


@contextlib.contextmanager
def arguments(lab: Lab, apps: client.AppsV1Api, *more: str) -> Iterator[None]:
    """The CSI node plugin runs with more arguments."""
    before = apps.read_namespaced_daemon_set("juicefs-csi-node", NS).spec.template.spec.containers[0].args

    def roll_out(args: list[str]) -> None:
        patch = [{"op": "replace", "path": "/spec/template/spec/containers/0/args", "value": args}]
        apps.patch_namespaced_daemon_set("juicefs-csi-node", NS, patch)
        lab.kubectl("rollout", "status", "daemonset/juicefs-csi-node", "-n", NS, "--timeout=60s")

    roll_out([*before, *more])
    try:
        yield
    finally:
        roll_out(before)


@pytest.mark.parametrize("flag", ["--by-process=true", "--by-process"])
def test_process_mode(lab: Lab, apps: client.AppsV1Api, look: Look, flag: str) -> None:
    with arguments(lab, apps, flag):
        (refused,) = refusals(look("check_csi"))
    assert "DaemonSet/juicefs-csi-node runs in process mode" in refused
    assert "mount-pod mode" in refused


def test_a_driver_for_sidecars_alone(lab: Lab, core: client.CoreV1Api) -> None:
    """The namespace stands for an installation by webhook.yaml: no DaemonSet in it."""
    (finding,) = check_csi(KubernetesCluster(core.api_client, APPS), rollout_timeout_s=60, now=datetime.now(UTC))
    assert finding.level == "refusal"
    assert "DaemonSet/juicefs-csi-node does not exist in namespace apps: the driver is installed for" in finding.message


def test_process_mode_that_is_off(lab: Lab, apps: client.AppsV1Api, look: Look) -> None:
    with arguments(lab, apps, "--by-process=false"):
        assert refusals(look("check_csi")) == []


def restarted(lab: Lab, workload: str) -> bool:
    """Restart a workload; `kubectl` refuses a second restart within the same second."""
    try:
        lab.kubectl("rollout", "restart", workload, "-n", NS)
    except LabError:
        return False
    return True


@contextlib.contextmanager
def rolling_out(lab: Lab, workload: str, fault: str) -> Iterator[None]:
    """A restart of a workload that does not come to its end; afterwards it is as healthy as before."""
    lab.kube.order_fault({"rollout": fault, "name": workload.split("/")[1]})
    try:
        wait_for("a restart is accepted", lambda: restarted(lab, workload), deadline_s=10)
        yield
    finally:
        lab.kube.clear_faults()
        if workload.startswith("statefulset"):  # as in a cluster: a pod that never became ready blocks its own update
            lab.kubectl("delete", "pod", "juicefs-csi-controller-1", "-n", NS)
        lab.kubectl("rollout", "status", workload, "-n", NS, "--timeout=90s")


@pytest.mark.parametrize("workload", ["StatefulSet/juicefs-csi-controller", "DaemonSet/juicefs-csi-node"])
def test_a_rollout_in_progress_is_waited_for(lab: Lab, look: Look, workload: str) -> None:
    with rolling_out(lab, workload.lower(), "never-ready"):
        wait_for("it is refused", lambda: refusals(look("check_csi")), deadline_s=30)
        (refused,) = refusals(look("check_csi"))
    assert f"{workload} is in the middle of a rollout: " in refused
    assert f"wait, then trigger again: kubectl -n {NS} rollout status {workload.lower()}" in refused
    assert refusals(look("check_csi")) == []


@pytest.mark.parametrize(
    ("fault", "trouble"), [("never-ready", "has not been ready for 1"), ("crash-loop", "is in CrashLoopBackOff")]
)
def test_a_workload_that_does_not_get_healthy_must_be_repaired(lab: Lab, look: Look, fault: str, trouble: str) -> None:
    """It differs from a rollout in why its pod waits, and in how long the pod has not been ready."""

    def broken() -> list[str]:
        return [line for line in refusals(look("check_csi", rollout_timeout_s=10)) if "is not healthy" in line]

    with rolling_out(lab, "daemonset/juicefs-csi-node", fault):
        wait_for("it is refused", broken, deadline_s=40)
        (refused,) = broken()
    assert re.match(rf"DaemonSet/juicefs-csi-node is not healthy: pod juicefs-csi-node-\w+ {trouble}", refused)
    assert "repair it first" in refused


def test_another_run_on_the_volume(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    leases, name = client.CoordinationV1Api(core.api_client), f"juicefs-storage-{lab.volume.uuid}"
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    spec = {"holderIdentity": "juicefs_storage_revert/manual__other", "leaseDurationSeconds": 3600}
    spec |= {"acquireTime": now, "renewTime": now}
    leases.create_namespaced_lease(NS, {"metadata": {"name": name}, "spec": spec})
    try:
        (refused,) = refusals(look("check_csi"))
    finally:
        leases.delete_namespaced_lease(name, NS)
    assert "juicefs_storage_revert/manual__other" in refused
    assert refusals(look("check_csi")) == []


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


def test_a_read_only_mount(core: client.CoreV1Api, look: Look) -> None:
    """It has no session: found by its `.config` alone."""
    with mounted(core, "ro") as pod:
        (refused,) = refusals(look("check_volume"))
    assert f"{pod.metadata.name} is mounted read-only" in refused


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


def test_a_bucket_that_does_not_exist_is_not_created(lab: Lab, look: Look) -> None:
    (refused,) = refusals(look("check_target_bucket", target_bucket="no-such-bucket", dry_run=False))
    assert "no-such-bucket" in refused
    assert "never created" in refused
    assert [row["Name"] for row in lab.new_store.client().list_buckets()["Buckets"]] == [lab.new_store.bucket]


@pytest.mark.parametrize("dry_run", [True, False])
def test_wrong_keys(lab: Lab, connections: Callable[..., None], look: Look, dry_run: bool) -> None:
    connections("minio_new", **new_store(lab, secret_key="not the secret key"))
    (refused,) = refusals(look("check_target_bucket", dry_run=dry_run))
    assert "403" in refused
    assert "correct the secret key" in refused
    assert "not the secret key" not in refused


def test_keys_that_may_only_read(lab: Lab, look: Look) -> None:
    lab.new_store.refuse_writes()
    try:
        (refused,) = refusals(look("check_target_bucket", dry_run=False))
    finally:
        lab.new_store.allow_writes()
    assert f"the store answered PUT {lab.volume.name}/" in refused
    assert "AccessDenied" in refused


def test_an_endpoint_that_nobody_reaches(lab: Lab, connections: Callable[..., None], look: Look) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    connections("minio_new", **new_store(lab, endpoint_url=nowhere))
    refused = refusals(look("check_target_bucket"))
    assert any("the Airflow workers reach it" in line for line in refused)
    assert len([line for line in refused if ": pod " in line and f"cannot use {nowhere}" in line]) == 3


def test_an_endpoint_that_the_pods_do_not_reach(lab: Lab, look: Look) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    refused = refusals(look("check_target_bucket", target_endpoint=nowhere))
    assert len(refused) == 3
    assert all(line.startswith("The new store, by connection 'minio_new': pod juicefs-") for line in refused)
    assert all("target_endpoint" in line for line in refused)
    assert sum("csi-controller" in line for line in refused) == 1


def test_a_certificate_that_the_pods_do_not_trust(lab: Lab, look: Look) -> None:
    """The cluster's own API stands in for a store: HTTPS, by an authority that no image knows."""
    refused = refusals(look("check_target_bucket", target_endpoint=lab.kube.url))
    assert len(refused) == 3
    assert all(f"does not trust the certificate of {lab.kube.url}" in line for line in refused)
    assert all("extra.verify=false in connection 'minio_new'" in line for line in refused)


@pytest.mark.parametrize("suffix", ["/prefix", "/bucket/"])
def test_an_endpoint_with_a_path(lab: Lab, connections: Callable[..., None], look: Look, suffix: str) -> None:
    connections("minio_new", **new_store(lab, endpoint_url=lab.new_store.endpoint_url + suffix))
    (refused,) = refusals(look("check_target_bucket"))
    assert "http(s)://host[:port]" in refused


def test_an_endpoint_without_scheme(lab: Lab, connections: Callable[..., None], look: Look) -> None:
    connections("minio_new", **new_store(lab, endpoint_url=f"127.0.0.1:{lab.new_store.ports[3]}"))
    (refused,) = refusals(look("check_target_bucket"))
    assert "http(s)://host[:port]" in refused


def test_the_copy_of_another_volume(lab: Lab, look: Look) -> None:
    with new_object(lab, UUID_KEY, b"99999999-0000-0000-0000-000000000000"):
        (refused,) = refusals(look("check_target_bucket"))
    assert "names volume '99999999-" in refused
    assert lab.volume.uuid in refused


def test_no_uuid_is_a_warning(lab: Lab, look: Look) -> None:
    with new_object(lab, UUID_KEY, None):
        findings = look("check_target_bucket")
    assert refusals(findings) == []
    assert UUID_KEY in warnings(findings)[0]


def test_blocks_that_this_volume_never_wrote(lab: Lab, look: Look) -> None:
    foreign = "myjfs/chunks/77/77000/77000123_0_4096"
    with new_object(lab, foreign, b"x" * 4096):
        (refused,) = refusals(look("check_consistency", consistency="listing"))
    assert foreign in refused
    assert "no slice 77000123" in refused


def test_blocks_of_deleted_files_are_harmless(lab: Lab, look: Look) -> None:
    with new_object(lab, "myjfs/chunks/0/0/1_9_4096", b"x" * 4096):
        findings = look("check_consistency", consistency="listing")
    assert (refusals(findings), warnings(findings)) == ([], [])


@pytest.mark.parametrize("mode", ["sample", "listing", "metadata", "content"])
def test_a_missing_block(lab: Lab, look: Look, mode: str) -> None:
    key = some_block(lab)
    with new_object(lab, key, None):
        findings = look("check_consistency", consistency=mode, catch_up=True)
        (refused,) = refusals(look("check_consistency", consistency=mode, catch_up=False))
    assert refusals(findings) == []
    assert f"not on the new store yet, such as {key}." in warnings(findings)[0]
    assert re.match(rf"1 of \d+ blocks are not on the new store, such as {key}\.", refused)
    assert "copy the volume" in refused


@pytest.mark.parametrize("mode", ["sample", "listing", "metadata", "content"])
def test_a_block_with_another_length(lab: Lab, look: Look, mode: str) -> None:
    key = some_block(lab)
    with new_object(lab, key, b"cut"):
        (refused,) = refusals(look("check_consistency", consistency=mode))
    assert f"differ on the new store, such as {key}" in refused
    assert "overwrites" in refused


@pytest.mark.parametrize(("mode", "seen"), [("sample", True), ("listing", False), ("content", True)])
def test_a_block_with_other_content_of_the_same_length(lab: Lab, look: Look, mode: str, seen: bool) -> None:
    key = some_block(lab)
    with new_object(lab, key, b"x" * lab.new_store.objects()[key][0]):
        refused = refusals(look("check_consistency", consistency=mode))
    assert [f"such as {key} (content)" in line for line in refused] == ([True] if seen else [])


@contextlib.contextmanager
def marked(core: client.CoreV1Api, **metadata: Any) -> Iterator[None]:
    core.patch_namespaced_secret(SECRET, NS, {"metadata": metadata})
    try:
        yield
    finally:
        gone = {kind: dict.fromkeys(marks) if isinstance(marks, dict) else None for kind, marks in metadata.items()}
        core.patch_namespaced_secret(SECRET, NS, {"metadata": gone})


@pytest.mark.parametrize(
    ("metadata", "source"),
    [
        (
            {
                "labels": {"app.kubernetes.io/managed-by": "Helm"},
                "annotations": {"meta.helm.sh/release-name": "juicefs-csi"},
            },
            "Helm release juicefs-csi",
        ),
        (
            {"annotations": {"argocd.argoproj.io/tracking-id": "storage:/Secret:juicefs/juicefs-sc-secret"}},
            "Argo CD application storage",
        ),
        ({"labels": {"kustomize.toolkit.fluxcd.io/name": "infra"}}, "Flux Kustomization infra"),
        ({"labels": {"app.kubernetes.io/managed-by": "our-tool"}}, "source our-tool"),
        (
            {
                "ownerReferences": [
                    {
                        "apiVersion": "external-secrets.io/v1",
                        "kind": "ExternalSecret",
                        "name": "storage",
                        "uid": "1",
                        "controller": True,
                    }
                ]
            },
            "ExternalSecret/storage",
        ),
    ],
)
def test_a_secret_that_something_renders_is_a_warning(
    core: client.CoreV1Api, look: Look, metadata: Any, source: str
) -> None:
    with marked(core, **metadata):
        findings = look("check_secrets")
    assert refusals(findings) == []
    (warned,) = warnings(findings)
    assert f"is managed by {source}, which puts the old values back" in warned


def test_an_immutable_secret(core: client.CoreV1Api, look: Look) -> None:
    with another_secret(core, NS, immutable=True):
        (refused,) = refusals(look("check_secrets"))
    assert f"Secret {NS}/another is immutable" in refused


def test_a_secret_that_its_pv_owns_is_managed_by_nobody(core: client.CoreV1Api, look: Look) -> None:
    """The driver makes its copies so; the owner reference shows a controller such as External Secrets."""
    owned = {"apiVersion": "v1", "kind": "PersistentVolume", "name": "pv", "uid": "1"}
    rendered: dict[str, object] = {
        "apiVersion": "external-secrets.io/v1",
        "kind": "ExternalSecret",
        "name": "jfs",
        "uid": "2",
    }
    rendered |= {"controller": True}
    with another_secret(core, NS, metadata={"ownerReferences": [owned]}):
        assert warnings(look("check_secrets")) == []
    with another_secret(core, NS, metadata={"ownerReferences": [owned, rendered]}):
        (warned,) = warnings(look("check_secrets"))
    assert "is managed by ExternalSecret/jfs, which" in warned


@contextlib.contextmanager
def deployment(
    apps: client.AppsV1Api,
    annotations: dict[str, str],
    *,
    uses: bool,
    name: str = "dashboard",
    namespace: str = NS,
    args: tuple[str, ...] = (),
) -> Iterator[None]:
    container: dict[str, Any] = {"name": "app", "image": "busybox", "args": list(args)}
    if uses:
        container["envFrom"] = [{"secretRef": {"name": SECRET}}]
    template = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container]}}
    spec = {"selector": {"matchLabels": {"app": name}}, "template": template}
    body = {"metadata": {"name": name, "annotations": annotations}, "spec": spec}
    apps.create_namespaced_deployment(namespace, body)
    try:
        yield
    finally:
        apps.delete_namespaced_deployment(name, namespace)


@pytest.mark.parametrize(
    ("annotations", "uses", "hit"),
    [
        ({"reloader.stakater.com/auto": "true"}, True, True),
        ({"reloader.stakater.com/auto": "true"}, False, False),
        ({"reloader.stakater.com/auto": "false"}, True, False),
        ({"secret.reloader.stakater.com/reload": f"other, {SECRET}"}, False, True),
        ({"secret.reloader.stakater.com/reload": "other"}, True, False),
        ({"wave.pusher.com/update-on-config-change": "true"}, True, True),
    ],
)
def test_a_workload_that_a_patch_would_restart(
    apps: client.AppsV1Api, look: Look, annotations: dict[str, str], uses: bool, hit: bool
) -> None:
    with deployment(apps, annotations, uses=uses):
        refused = refusals(look("check_secrets"))
    assert len(refused) == (1 if hit else 0)
    if hit:
        assert "Deployment/dashboard is annotated" in refused[0]
        assert SECRET in refused[0]


@pytest.mark.parametrize("namespace", [NS, "kube-system"])
@pytest.mark.parametrize(
    ("flag", "annotations", "uses", "hit"),
    [
        ("--auto-reload-all=true", {}, True, True),
        ("--auto-reload-all", {}, True, True),
        ("--auto-reload-all=true", {}, False, False),
        ("--auto-reload-all=true", {"reloader.stakater.com/auto": "false"}, True, False),
        ("--auto-reload-all=false", {}, True, False),
    ],
)
def test_a_reloader_that_asks_for_no_annotation(
    apps: client.AppsV1Api, look: Look, namespace: str, flag: str, annotations: dict[str, str], uses: bool, hit: bool
) -> None:
    with (
        deployment(apps, {}, uses=False, name="reloader", namespace=namespace, args=("--log-format=json", flag)),
        deployment(apps, annotations, uses=uses),
    ):
        refused = refusals(look("check_secrets"))
    assert len(refused) == (1 if hit else 0)
    if hit:
        assert f"Deployment/dashboard is watched by Deployment {namespace}/reloader (--auto-reload-all)" in refused[0]
        assert "reloader.stakater.com/auto=false" in refused[0]


@contextlib.contextmanager
def another_secret(
    core: client.CoreV1Api,
    namespace: str,
    *,
    immutable: bool = False,
    metadata: dict[str, Any] | None = None,
    **changes: str,
) -> Iterator[None]:
    data = dict(core.read_namespaced_secret(SECRET, NS).data)
    data |= {key: base64.b64encode(value.encode()).decode() for key, value in changes.items()}
    body = {"metadata": {"name": "another", **(metadata or {})}, "data": data, "immutable": immutable}
    core.create_namespaced_secret(namespace, body)
    try:
        yield
    finally:
        core.delete_namespaced_secret("another", namespace)


def test_another_secret_of_the_volume_in_the_namespace_is_patched(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    other_password = f"mysql://other:pw@tcp({lab.mariadb.host}:{lab.mariadb.port})/{lab.mariadb.database}?x=1"
    with another_secret(core, NS, metaurl=other_password):
        findings = look("check_secrets")
        assert (refusals(findings), warnings(findings)) == ([], [])
        assert f"{NS}/another" in findings[-1].message
    assert f"{NS}/another" not in look("check_secrets")[-1].message


@pytest.mark.parametrize("changes", [{"name": "another"}, {"metaurl": "{url}?table_prefix=stag"}])
def test_the_secret_of_another_volume_is_left_alone(
    lab: Lab, core: client.CoreV1Api, look: Look, changes: dict[str, str]
) -> None:
    values: dict[str, Any] = {
        key: value.format(url=lab.mariadb.meta_url_with_password) for key, value in changes.items()
    }
    with another_secret(core, NS, **values):
        findings = look("check_secrets")
        assert warnings(findings) == []
        assert "another" not in findings[-1].message


def test_a_secret_whose_host_may_be_another_name_of_the_same_database_is_a_warning(
    core: client.CoreV1Api, look: Look
) -> None:
    with another_secret(core, NS, metaurl="mysql://jfs:x@(database.example:1)/jfs"):
        findings = look("check_secrets")
        assert "another names volume myjfs in a database of the same name on another host" in warnings(findings)[0]
        assert "another" not in findings[-1].message


def test_a_secret_of_the_volume_in_another_namespace_is_a_warning(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    with another_secret(core, APPS):
        (warned,) = warnings(look("check_secrets"))
        assert f"Secret {APPS}/another names the same metadata" in warned


def test_other_namespaces_that_may_not_be_read_are_left_out(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    """Nothing but the list of all Secrets is refused by deploy/rbac.yaml; the lab knows no namespaces in its faults."""
    with another_secret(core, APPS):
        lab.kube.order_fault({"deny": {"verb": "list", "resource": "secrets"}})
        try:
            assert KubernetesCluster(core.api_client, NS).secrets_everywhere() is None
        finally:
            lab.kube.clear_faults()


def test_a_persistent_volume_with_a_secret_elsewhere_is_a_warning(core: client.CoreV1Api, look: Look) -> None:
    """Found without the right to list Secrets of other namespaces."""
    claim = core.read_namespaced_persistent_volume_claim("data", APPS)
    name, path = claim.spec.volume_name, "/spec/csi/nodePublishSecretRef/namespace"
    core.patch_persistent_volume(name, [{"op": "replace", "path": path, "value": APPS}])
    try:
        (warned,) = warnings(look("check_secrets"))
    finally:
        core.patch_persistent_volume(name, [{"op": "replace", "path": path, "value": NS}])
    assert f"PersistentVolume {name} mounts this volume with Secret {APPS}/{SECRET}" in warned


def test_format_options_with_a_bucket(core: client.CoreV1Api, look: Look) -> None:
    value = base64.b64encode(b"trash-days=1,bucket=http://elsewhere/b").decode()
    core.patch_namespaced_secret(SECRET, NS, {"data": {"format-options": value}})
    try:
        (refused,) = refusals(look("check_secrets"))
    finally:
        core.patch_namespaced_secret(SECRET, NS, {"data": {"format-options": None}})
    assert "format-options bucket=http://elsewhere/b" in refused


def test_format_options_with_a_session_token(core: client.CoreV1Api, look: Look) -> None:
    value = base64.b64encode(b"trash-days=1, session-token=abc").decode()
    core.patch_namespaced_secret(SECRET, NS, {"data": {"format-options": value}})
    try:
        (refused,) = refusals(look("check_secrets"))
    finally:
        core.patch_namespaced_secret(SECRET, NS, {"data": {"format-options": None}})
    assert "session-token in its format-options" in refused
    assert "abc" not in refused


def test_a_secret_that_says_something_else_than_the_setting_is_a_warning(core: client.CoreV1Api, look: Look) -> None:
    before = core.read_namespaced_secret(SECRET, NS).data["bucket"]
    value = base64.b64encode(b"http://elsewhere/b").decode()
    core.patch_namespaced_secret(SECRET, NS, {"data": {"bucket": value}})
    try:
        (warned,) = warnings(look("check_secrets"))
    finally:
        core.patch_namespaced_secret(SECRET, NS, {"data": {"bucket": before}})
    assert "http://elsewhere/b" in warned


@pytest.mark.parametrize("password", ["", "dG9vIHNob3J0", "not base64!"])
def test_no_usable_key_for_backups(connections: Callable[..., None], look: Look, tmp_path: Path, password: str) -> None:
    connections("juicefs_backup", conn_type="generic", password=password, extra={"path": tmp_path.as_uri()})
    (refused,) = refusals(look("check_vault"))
    assert "openssl rand -base64 32" in refused
    assert password not in refused or not password


def test_no_folder_for_backups(connections: Callable[..., None], look: Look) -> None:
    connections("juicefs_backup", conn_type="generic", password=base64.b64encode(bytes(32)).decode())
    (refused,) = refusals(look("check_vault"))
    assert "a folder" in refused


def test_a_folder_that_takes_no_backup(connections: Callable[..., None], look: Look, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    password = base64.b64encode(bytes(32)).decode()
    connections("juicefs_backup", conn_type="generic", password=password, extra={"path": (tmp_path / "file").as_uri()})
    (refused,) = refusals(look("check_vault", dry_run=True))
    assert "writing _probe." in refused


def test_a_folder_with_files_of_another_key(connections: Callable[..., None], look: Look, tmp_path: Path) -> None:
    (tmp_path / "myjfs.run.switched.backup").write_bytes(b"JFSW1" + bytes(60))
    found = look("check_vault", dry_run=True)
    assert refusals(found) == []
    (warning,) = warnings(found)
    assert "myjfs.run.switched" in warning
    assert [file.name for file in tmp_path.glob("*_probe*")] == []


def test_no_connection_for_backups(look: Look, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AIRFLOW_CONN_JUICEFS_BACKUP")
    (refused,) = refusals(look("check_vault"))
    assert "juicefs_backup" in refused


def test_everything_that_is_wrong_is_found_at_once(lab: Lab, connections: Callable[..., None], look: Look) -> None:
    connections("juicefs_backup", conn_type="generic", password="")
    lab.kube.order_fault({"deny": {"verb": "patch", "resource": "secrets"}})
    try:
        refused = refusals(look(target_bucket="no-such-bucket", consistency="listing"))
    finally:
        lab.kube.clear_faults()
    words = ("may not patch secrets", "openssl rand", "no-such-bucket")
    assert [word for word in words if not any(word in line for line in refused)] == []

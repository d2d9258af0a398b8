"""What the CSI installation does, on a real volume: mount pods, stale Secrets, restarts, and real mounts everywhere."""
# ruff: noqa: S108, TID253 (/tmp is a pod's own; a test may import its client at once)

import base64
import json
import re
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from kubernetes import client, config

from lab.environment import Lab
from lab.keys import random_part
from lab.process import binary, wait_for

NS, APPS, SECRET = "juicefs", "apps", "juicefs-sc-secret"
CONTROLLER = "juicefs-csi-controller-0"
HEARTBEAT_S = 2
MOUNT_PODS = "app.kubernetes.io/name=juicefs-mount"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    lab = Lab.up(tmp_path_factory.mktemp("lab"), heartbeat_s=HEARTBEAT_S)
    yield lab
    lab.down(remove=True)


@pytest.fixture(scope="module")
def core(lab: Lab) -> client.CoreV1Api:
    return client.CoreV1Api(config.new_client_from_config(str(lab.kube.kubeconfig)))


@pytest.fixture(autouse=True)
def restored(lab: Lab, core: client.CoreV1Api) -> Iterator[None]:
    """Each test starts from the volume on the old store, its Secret saying so, and the two business pods."""
    value = lab.mariadb.query("SELECT value FROM jfs_setting WHERE name='format'")[0][0]
    data = core.read_namespaced_secret(SECRET, NS).data
    yield
    if not lab.kube.alive:
        return
    lab.kube.clear_faults()
    core.replace_namespaced_secret(SECRET, NS, {"metadata": {"name": SECRET}, "data": data})
    lab.mariadb.query("UPDATE jfs_setting SET value=%s WHERE name='format'", [value])
    for pod in core.list_namespaced_pod(APPS).items:
        if pod.metadata.name not in ("app-1", "app-2"):
            core.delete_namespaced_pod(pod.metadata.name, APPS)
    wait_for("only the two first mount pods", lambda: len(mount_pods(core)) == 2, deadline_s=30)


def kubectl(lab: Lab, *args: str, stdin: str | None = None, ok: bool = True) -> str:
    command = [str(binary("kubectl")), "--kubeconfig", str(lab.kube.kubeconfig), *args]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=90, check=False)
    assert not ok or done.returncode == 0, done.stderr
    return done.stdout


def mount_pods(core: client.CoreV1Api, node: str = "") -> list[client.V1Pod]:
    fields = f"spec.nodeName={node}" if node else ""
    return list(core.list_namespaced_pod(NS, label_selector=MOUNT_PODS, field_selector=fields).items)


def host_mount(lab: Lab, pod: client.V1Pod) -> Path:
    return lab.kube.state / "jfs" / path_of(pod).removeprefix("/jfs/")


def path_of(pod: client.V1Pod) -> str:
    found = re.search(r"/bin/mount\.juicefs \S+ (/jfs/\S+) ", pod.spec.containers[0].command[2])
    assert found
    return found[1]


def replaced(core: client.CoreV1Api, pod: client.V1Pod) -> client.V1Pod:
    """The mount pod that the driver made in the place of another one, when it is ready."""
    found: list[client.V1Pod] = []

    def is_there() -> bool:
        found[:] = mount_pods(core, pod.spec.node_name)
        return len(found) == 1 and found[0].metadata.uid != pod.metadata.uid and is_ready(found[0])

    wait_for("another mount pod", is_there, deadline_s=30)
    return found[0]


def is_ready(pod: client.V1Pod) -> bool:
    return any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or [])


def start_app(lab: Lab, core: client.CoreV1Api, name: str, node: str = "node-1", *, ready: bool = True) -> None:
    container = {"name": "app", "image": "busybox", "volumeMounts": [{"name": "d", "mountPath": "/data"}]}
    volumes = [{"name": "d", "persistentVolumeClaim": {"claimName": "data"}}]
    spec = {"nodeName": node, "containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 2}
    core.create_namespaced_pod(APPS, {"metadata": {"name": name}, "spec": spec})
    if ready:
        wait_for("the app pod", lambda: is_ready(core.read_namespaced_pod(name, APPS)), deadline_s=30)


def setting_in(mount: Path) -> dict[str, Any]:
    return dict(json.loads((mount / ".config").read_text())["Format"])


def follows(mount: Path, bucket_url: str) -> bool:
    return bool(setting_in(mount)["Bucket"] == bucket_url)


def mounting(lab: Lab) -> list[psutil.Process]:
    """The main processes of the mount pods; their argument list is one string, since the client masks it."""
    lines = ((p, " ".join(p.info["cmdline"] or [])) for p in psutil.process_iter(["cmdline"]))
    return [p for p, line in lines for m in lab.mounts() if line.startswith("/bin/mount.juicefs") and m.name in line]


def use_new_store(lab: Lab, core: client.CoreV1Api, *, secret: bool) -> None:
    """Writes the new store into the setting by exec, as the runbook does, and into the Secret where asked."""
    store = lab.new_store
    script = (
        "IFS= read -r META_PASSWORD; IFS= read -r SK; export META_PASSWORD; "
        'exec juicefs config --yes "$1" --bucket "$2" --access-key "$3" --secret-key "$SK"'
    )
    args = ("sh", lab.mariadb.meta_url, store.bucket_url, store.access_key)
    secrets = f"{lab.mariadb.password}\n{store.secret_key}\n"
    kubectl(lab, "exec", "-i", CONTROLLER, "--", "sh", "-c", script, *args, stdin=secrets)
    if secret:
        values = {"bucket": store.bucket_url, "access-key": store.access_key, "secret-key": store.secret_key}
        patch = [
            {"op": "add", "path": f"/data/{key}", "value": base64.b64encode(value.encode()).decode()}
            for key, value in values.items()
        ]
        core.patch_namespaced_secret(SECRET, NS, patch)


def test_the_installation_is_complete(lab: Lab, core: client.CoreV1Api) -> None:
    claim = core.read_namespaced_persistent_volume_claim("data", APPS)
    volume = core.read_persistent_volume(claim.spec.volume_name)
    assert volume.spec.csi.volume_handle == volume.metadata.name
    assert volume.spec.csi.node_publish_secret_ref.name == SECRET
    storage = client.StorageV1Api(core.api_client)
    parameters = storage.read_storage_class("juicefs-sc").parameters
    assert parameters["csi.storage.k8s.io/node-publish-secret-name"] == SECRET
    assert [d.metadata.name for d in storage.list_csi_driver().items] == ["csi.juicefs.com"]
    assert len(storage.list_csi_node().items) == 2
    for node in ("node-1", "node-2"):
        (pod,) = mount_pods(core, node)
        assert is_ready(pod)
        assert pod.metadata.name.startswith(f"juicefs-{node}-{volume.metadata.name}-")
        assert pod.spec.containers[0].name == "jfs-mount"
        per_volume = core.read_namespaced_secret(f"juicefs-{volume.metadata.name}-secret", NS)
        assert per_volume.metadata.labels == {"juicefs/secret": "true"}
        assert set(per_volume.data) == {"metaurl", "secretkey", "jfsSettings", "check_mount.sh"}
        (owner,) = per_volume.metadata.owner_references
        assert (owner.kind, owner.uid, owner.controller) == ("PersistentVolume", volume.metadata.uid, False)
        assert pod.metadata.finalizers == ["juicefs.com/finalizer"]
        (reference,) = (key for key, value in pod.metadata.annotations.items() if value.startswith("/var/lib/kubelet/"))
        assert re.fullmatch("juicefs-[0-9a-f]{55}", reference)
    controllers = core.list_namespaced_pod(NS, label_selector="app=juicefs-csi-controller").items
    assert [(p.metadata.name, is_ready(p)) for p in controllers] == [
        ("juicefs-csi-controller-0", True), ("juicefs-csi-controller-1", True),
    ]  # fmt: skip
    for pod in core.list_namespaced_pod(APPS).items:
        assert is_ready(pod)
        assert pod.status.container_statuses[0].restart_count == 0


def test_no_process_shows_a_secret_once_it_mounts(lab: Lab) -> None:
    lines = [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])]
    assert any("mount.juicefs" in line for line in lines)
    secrets = (lab.mariadb.password, lab.old_store.secret_key, lab.new_store.secret_key)
    assert not [line for line in lines if any(random_part(secret) in line for secret in secrets)]


def test_pods_see_the_mounts_as_on_a_cluster(lab: Lab, core: client.CoreV1Api) -> None:
    (pod,) = mount_pods(core, "node-1")
    mount = host_mount(lab, pod)
    inside = f"/jfs/{mount.name}"
    kubectl(lab, "exec", "-n", APPS, "app-1", "--", "sh", "-c", "echo from-app > /data/shared")
    assert kubectl(lab, "exec", "-n", APPS, "app-2", "--", "cat", "/data/shared") == "from-app\n"
    (shared,) = mount.glob("*/shared")
    assert shared.read_text() == "from-app\n"
    assert kubectl(lab, "exec", pod.metadata.name, "--", "cat", f"{inside}/{shared.relative_to(mount)}") == "from-app\n"
    bucket = json.loads(kubectl(lab, "exec", pod.metadata.name, "--", "cat", f"{inside}/.config"))["Format"]["Bucket"]
    assert bucket == lab.old_store.bucket_url
    assert "is ready at" in kubectl(lab, "logs", pod.metadata.name)
    sessions = lab.mariadb.query("SELECT info FROM jfs_session2")
    assert inside in {json.loads(row[0])["MountPoint"] for row in sessions}


def test_the_controller_mounts_by_itself_and_its_restart_ends_that(lab: Lab, core: client.CoreV1Api) -> None:
    script = (
        "IFS= read -r META_PASSWORD; export META_PASSWORD; mkdir -p /tmp/mnt && "
        'juicefs mount -d --no-usage-report --cache-dir /tmp/cache "$1" /tmp/mnt >&2 && '
        "echo canary > /tmp/mnt/canary && cat /tmp/mnt/canary"
    )
    args = ("exec", "-i", CONTROLLER, "--", "sh", "-c", script, "sh", lab.mariadb.meta_url)
    assert kubectl(lab, *args, stdin=f"{lab.mariadb.password}\n") == "canary\n"
    assert (host_mount(lab, mount_pods(core)[0]) / "canary").read_text() == "canary\n"
    assert "/tmp/mnt" not in Path("/proc/self/mountinfo").read_text()
    kubectl(lab, "exec", CONTROLLER, "--", "juicefs", "umount", "/tmp/mnt")
    kubectl(lab, *args, stdin=f"{lab.mariadb.password}\n")
    own = [p for p in psutil.process_iter(["cmdline"]) if "/tmp/mnt" in (p.info["cmdline"] or [])]
    assert own
    kubectl(lab, "rollout", "restart", "statefulset", "juicefs-csi-controller")
    kubectl(lab, "rollout", "status", "statefulset", "juicefs-csi-controller", "--timeout=60s")
    assert not [p for p in own if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_restart_of_the_driver_leaves_mount_pods_and_business_pods_alone(lab: Lab, core: client.CoreV1Api) -> None:
    def state() -> set[tuple[str, str, int]]:
        pods = [*mount_pods(core), *core.list_namespaced_pod(APPS).items]
        return {(p.metadata.name, p.metadata.uid, p.status.container_statuses[0].restart_count) for p in pods}

    before = state(), mounting(lab)
    for workload in ("daemonset/juicefs-csi-node", "statefulset/juicefs-csi-controller"):
        kubectl(lab, "rollout", "restart", workload)
        kubectl(lab, "rollout", "status", workload, "--timeout=60s")
    assert (state(), mounting(lab)) == before
    assert len(before[1]) == 2
    kubectl(lab, "exec", "-n", APPS, "app-1", "--", "ls", "/data")


def test_live_mounts_follow_the_setting_and_no_pod_restarts(lab: Lab, core: client.CoreV1Api) -> None:
    uids = {p.metadata.uid for p in mount_pods(core)}
    use_new_store(lab, core, secret=True)
    for pod in mount_pods(core):
        mount = host_mount(lab, pod)
        url = lab.new_store.bucket_url
        wait_for("the new bucket", partial(follows, mount, url), deadline_s=20)
        assert "found new configuration" in kubectl(lab, "logs", pod.metadata.name, "--since=30s")
    assert {p.metadata.uid for p in mount_pods(core)} == uids


def test_a_changed_secret_gives_the_next_app_pod_a_new_mount_pod(lab: Lab, core: client.CoreV1Api) -> None:
    (first,) = mount_pods(core, "node-1")
    start_app(lab, core, "same-secret")
    assert [p.metadata.uid for p in mount_pods(core, "node-1")] == [first.metadata.uid]
    use_new_store(lab, core, secret=True)
    start_app(lab, core, "changed-secret")
    second = next(p for p in mount_pods(core, "node-1") if p.metadata.uid != first.metadata.uid)
    assert second.metadata.labels["juicefs-hash"] != first.metadata.labels["juicefs-hash"]
    assert f"--bucket={lab.new_store.bucket_url}" in second.spec.containers[0].command[2]
    assert lab.mariadb.setting()["Bucket"] == lab.new_store.bucket_url
    per_volume = core.read_namespaced_secret(f"juicefs-{first.metadata.labels['volume-id']}-secret", NS)
    assert base64.b64decode(per_volume.data["secretkey"]).decode() == lab.new_store.secret_key
    mount = host_mount(lab, second)
    assert setting_in(mount)["Bucket"] == lab.new_store.bucket_url
    core.delete_namespaced_pod("changed-secret", APPS)
    wait_for("its mount pod to go", lambda: len(mount_pods(core, "node-1")) == 1, deadline_s=30)
    assert not mount.exists()
    assert str(mount) not in Path("/proc/self/mountinfo").read_text()


def test_a_stale_secret_reverts_the_switch(lab: Lab, core: client.CoreV1Api) -> None:
    use_new_store(lab, core, secret=False)
    assert lab.mariadb.setting()["Bucket"] == lab.new_store.bucket_url
    # Any change of the Secret makes the driver start a mount pod for the next app pod, with the old store's values.
    core.patch_namespaced_secret(SECRET, NS, {"data": {"trash-days": base64.b64encode(b"1").decode()}})
    start_app(lab, core, "reverting")
    assert lab.mariadb.setting()["Bucket"] == lab.old_store.bucket_url


def test_without_storage_and_bucket_the_setting_is_left_alone(lab: Lab, core: client.CoreV1Api) -> None:
    use_new_store(lab, core, secret=False)
    core.patch_namespaced_secret(SECRET, NS, {"data": {"storage": None, "bucket": None}})
    start_app(lab, core, "harmless")
    assert any("format --no-update" in p.spec.containers[0].command[2] for p in mount_pods(core))
    assert lab.mariadb.setting()["Bucket"] == lab.new_store.bucket_url


def test_a_container_that_restarts_formats_with_its_old_values(lab: Lab, core: client.CoreV1Api) -> None:
    (pod,) = mount_pods(core, "node-2")
    use_new_store(lab, core, secret=False)
    lab.kube.order_fault({"kill": pod.metadata.name})

    def restarted() -> bool:
        now = core.read_namespaced_pod(pod.metadata.name, NS)
        return now.status.container_statuses[0].restart_count == 1 and is_ready(now)

    wait_for("the restart", restarted, deadline_s=30)
    state = core.read_namespaced_pod(pod.metadata.name, NS).status.container_statuses[0]
    assert state.last_state.terminated.exit_code == 128 + signal.SIGKILL
    assert setting_in(host_mount(lab, pod))["UUID"] == lab.volume.uuid
    assert lab.mariadb.setting()["Bucket"] == lab.old_store.bucket_url, "whatever had moved the volume meanwhile"
    assert kubectl(lab, "logs", "--previous", pod.metadata.name)


def test_a_deleted_mount_pod_that_has_users_is_made_again_by_the_secret_as_it_is(
    lab: Lab, core: client.CoreV1Api
) -> None:
    (pod,) = mount_pods(core, "node-2")
    use_new_store(lab, core, secret=True)
    core.delete_namespaced_pod(pod.metadata.name, NS)
    new = replaced(core, pod)
    assert new.metadata.name != pod.metadata.name
    assert path_of(new) == path_of(pod), "the application's mount is of that path"
    assert f"--bucket={lab.new_store.bucket_url}" in new.spec.containers[0].command[2]
    assert lab.mariadb.setting()["Bucket"] == lab.new_store.bucket_url
    assert len(lab.mounts()) == 2


def test_a_mount_pod_that_completed_is_seen_for_seconds_and_replaced(lab: Lab, core: client.CoreV1Api) -> None:
    (pod,) = mount_pods(core, "node-2")
    kubectl(lab, "exec", pod.metadata.name, "--", "juicefs", "umount", path_of(pod))
    wait_for(
        "the pod to complete",
        lambda: core.read_namespaced_pod(pod.metadata.name, NS).status.phase == "Succeeded",
        deadline_s=20,
    )
    assert path_of(replaced(core, pod)) == path_of(pod)
    assert len(lab.mounts()) == 2


def test_without_its_secret_a_mount_pod_is_made_again_by_what_the_driver_remembers(
    lab: Lab, core: client.CoreV1Api
) -> None:
    (pod,) = mount_pods(core, "node-2")
    kept = core.read_namespaced_secret(SECRET, NS).data
    core.delete_namespaced_secret(SECRET, NS)
    try:
        core.delete_namespaced_pod(pod.metadata.name, NS)
        assert replaced(core, pod).spec.containers[0].command == pod.spec.containers[0].command
    finally:
        core.create_namespaced_secret(NS, {"metadata": {"name": SECRET}, "data": kept})


def test_the_secrets_envs_reach_the_client(lab: Lab, core: client.CoreV1Api) -> None:
    values = {"metaurl": lab.mariadb.meta_url, "envs": json.dumps({"META_PASSWORD": lab.mariadb.password})}
    data = {key: base64.b64encode(value.encode()).decode() for key, value in values.items()}
    core.patch_namespaced_secret(SECRET, NS, {"data": data})
    start_app(lab, core, "by-envs")
    (new,) = (p for p in mount_pods(core, "node-1") if "META_PASSWORD" in {e.name for e in p.spec.containers[0].env})
    assert setting_in(host_mount(lab, new))["UUID"] == lab.volume.uuid


def test_without_csi_node_nothing_gets_mounted(lab: Lab, core: client.CoreV1Api) -> None:
    lab.kube.order_fault({"rollout": "crash-loop", "name": "juicefs-csi-node"})
    kubectl(lab, "delete", "pod", "-l", "app=juicefs-csi-node", "--wait=true")
    start_app(lab, core, "stuck", ready=False)

    def looping() -> bool:
        pods = core.list_namespaced_pod(NS, label_selector="app=juicefs-csi-node").items
        return any(p.status.container_statuses and p.status.container_statuses[0].restart_count for p in pods)

    wait_for("csi-node in a crash loop", looping, deadline_s=20)
    assert core.read_namespaced_pod("stuck", APPS).status.container_statuses[0].state.waiting
    lab.kube.clear_faults()
    wait_for("the app pod", lambda: is_ready(core.read_namespaced_pod("stuck", APPS)), deadline_s=40)


def test_down_leaves_no_mount_and_no_process(lab: Lab, core: client.CoreV1Api) -> None:
    roots = mounting(lab)
    assert len(roots) == 2
    lab.kube.stop()
    assert not [p for p in roots if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert str(lab.kube.state) not in Path("/proc/self/mountinfo").read_text()
    with pytest.raises(Exception):  # noqa: B017, PT011
        core.list_node(_request_timeout=2)

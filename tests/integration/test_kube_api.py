"""The stand-in's API as `kubectl` and the Python client see it."""
# ruff: noqa: TID253 (a test may import its client at once)

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import psutil
import pytest
from kubernetes import client, config, watch
from kubernetes.client import ApiException

from lab.kube.client import KubeServer
from lab.process import binary, wait_for

NS = "juicefs"
NODE = "juicefs-csi-node"
CONTROLLER = "juicefs-csi-controller"


@pytest.fixture(autouse=True)
def no_faults(kube: KubeServer) -> Iterator[None]:
    yield
    kube.clear_faults()


@pytest.fixture(scope="module")
def api(kube: KubeServer) -> client.ApiClient:
    return config.new_client_from_config(str(kube.kubeconfig))


@pytest.fixture(scope="module")
def core(api: client.ApiClient) -> client.CoreV1Api:
    return client.CoreV1Api(api)


@pytest.fixture(scope="module")
def apps(api: client.ApiClient) -> client.AppsV1Api:
    return client.AppsV1Api(api)


Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def kubectl(kube: KubeServer) -> Kubectl:
    def run(*args: str, stdin: str | None = None, ok: bool = True) -> subprocess.CompletedProcess[str]:
        command = [str(binary("kubectl")), "--kubeconfig", str(kube.kubeconfig), *args]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)
        assert not ok or done.returncode == 0, done.stderr
        return done

    return run


def secret(core: client.CoreV1Api, name: str, **data: str) -> client.V1Secret:
    body = client.V1Secret(metadata=client.V1ObjectMeta(name=name), string_data=data)
    return core.create_namespaced_secret(NS, body)


def pod(name: str, **spec: Any) -> dict[str, Any]:
    container = {"name": "main", "image": "busybox"} | spec.pop("container", {})
    return {"metadata": {"name": name}, "spec": {"containers": [container], "terminationGracePeriodSeconds": 1} | spec}


def raises(code: int) -> Any:
    return pytest.raises(ApiException, check=lambda e: e.status == code and json.loads(e.body)["code"] == code)


def uids(core: client.CoreV1Api, app: str) -> dict[str, str]:
    pods = core.list_namespaced_pod(NS, label_selector=f"app={app}").items
    return {p.metadata.name: p.metadata.uid for p in pods}


# kubectl


def test_kubectl_get_and_describe(kubectl: Kubectl) -> None:
    line = next(x for x in kubectl("get", "pods").stdout.splitlines() if x.startswith(f"{CONTROLLER}-0"))
    assert line.split()[1:4] == ["1/1", "Running", "0"]
    everything = kubectl("get", "all,nodes,csidrivers,csinodes,sc,pv,pvc,leases,secrets,cm,jobs", "-A").stdout
    assert "csi.juicefs.com" in everything
    described = kubectl("describe", "pod", f"{CONTROLLER}-0").stdout
    assert "Started container juicefs-plugin" in described
    assert "Ready             True" in described
    assert "Pods Status:  2 Running" in kubectl("describe", "daemonset", NODE).stdout


def test_kubectl_waits_for_a_rollout_that_replaces_every_pod(kubectl: Kubectl, core: client.CoreV1Api) -> None:
    for kind, name in (("daemonset", NODE), ("statefulset", CONTROLLER)):
        before = uids(core, name)
        kubectl("rollout", "restart", kind, name)
        kubectl("rollout", "status", kind, name, "--timeout=30s")
        after = uids(core, name)
        assert len(before) == len(after)
        assert not set(before.values()) & set(after.values())
        # A StatefulSet keeps its pods' names, a DaemonSet does not.
        assert (set(before) == set(after)) == (kind == "statefulset")


def test_kubectl_patches_in_three_ways(kubectl: Kubectl, core: client.CoreV1Api) -> None:
    secret(core, "patched", a="1", b="2")
    kubectl("patch", "secret", "patched", "--type=json", "-p", '[{"op":"add","path":"/data/c","value":"Mw=="}]')
    kubectl("patch", "secret", "patched", "--type=merge", "-p", '{"data":{"a":null}}')
    kubectl("patch", "secret", "patched", "--type=strategic", "-p", '{"metadata":{"annotations":{"x":"y"}}}')
    now = core.read_namespaced_secret("patched", NS)
    assert now.data == {"b": "Mg==", "c": "Mw=="}
    assert now.metadata.annotations == {"x": "y"}


def test_kubectl_applies_twice_and_deletes(kubectl: Kubectl, core: client.CoreV1Api) -> None:
    manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "applied"}, "stringData": {"a": "1"}}
    assert "created" in kubectl("apply", "-f", "-", stdin=json.dumps(manifest)).stdout
    manifest["stringData"] = {"a": "2"}
    assert "configured" in kubectl("apply", "-f", "-", stdin=json.dumps(manifest)).stdout
    assert core.read_namespaced_secret("applied", NS).data == {"a": "Mg=="}
    kubectl("delete", "secret", "applied")
    with raises(404):
        core.read_namespaced_secret("applied", NS)


def test_kubectl_runs_logs_and_deletes_a_pod(kubectl: Kubectl) -> None:
    body = pod("worker", container={"command": ["sh", "-c", "echo one; echo two >&2; sleep 1000"]})
    kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "Pod"} | body))
    kubectl("wait", "--for=condition=Ready", "pod/worker", "--timeout=20s")
    assert sorted(kubectl("logs", "worker").stdout.split()) == ["one", "two"]
    assert len(kubectl("logs", "worker", "--tail=1").stdout.splitlines()) == 1
    assert "T" in kubectl("logs", "worker", "--timestamps").stdout.split(" ")[0]
    kubectl("delete", "pod", "worker")
    assert "NotFound" in kubectl("get", "pod", "worker", ok=False).stderr


def test_a_pod_that_ends_says_how(core: client.CoreV1Api, kubectl: Kubectl) -> None:
    core.create_namespaced_pod(NS, pod("failing", restartPolicy="Never", container={"command": ["sh", "-c", "exit 3"]}))
    kubectl("wait", "--for=jsonpath={.status.phase}=Failed", "pod/failing", "--timeout=20s")
    state = core.read_namespaced_pod("failing", NS).status.container_statuses[0].state
    assert state.terminated.exit_code == 3
    kubectl("delete", "pod", "failing")


def test_kubectl_auth_can_i_and_a_denied_right(kube: KubeServer, kubectl: Kubectl, core: client.CoreV1Api) -> None:
    assert kubectl("auth", "can-i", "patch", "secrets").stdout.strip() == "yes"
    kube.order_fault({"deny": {"verb": "patch", "group": "", "resource": "secrets"}})
    assert kubectl("auth", "can-i", "patch", "secrets", ok=False).stdout.strip() == "no"
    secret(core, "denied", a="1")
    with raises(403):
        core.patch_namespaced_secret("denied", NS, {"data": {}})
    kube.order_fault({"deny": {"verb": "create", "resource": "pods/exec"}})
    assert "forbidden" in kubectl("exec", f"{CONTROLLER}-0", "--", "true", ok=False).stderr
    attributes = client.V1ResourceAttributes(verb="create", resource="pods", subresource="exec", namespace=NS)
    spec = client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes)
    review = client.AuthorizationV1Api(core.api_client)
    body = client.V1SelfSubjectAccessReview(spec=spec)
    assert review.create_self_subject_access_review(body).status.allowed is False


# Conflicts and selectors


def test_errors_carry_a_status(core: client.CoreV1Api) -> None:
    made = secret(core, "once", a="1")
    with raises(409) as duplicate:
        secret(core, "once", a="1")
    assert json.loads(duplicate.value.body)["reason"] == "AlreadyExists"
    with raises(404) as missing:
        core.read_namespaced_secret("missing", NS)
    assert json.loads(missing.value.body)["details"] == {"name": "missing", "group": "", "kind": "secrets"}
    core.patch_namespaced_secret("once", NS, {"metadata": {"labels": {"a": "b"}}})
    with raises(409):
        core.replace_namespaced_secret("once", NS, made)
    test = {"op": "test", "path": "/metadata/resourceVersion", "value": made.metadata.resource_version}
    change = {"op": "add", "path": "/data/a", "value": "Mg=="}
    with raises(422):
        core.patch_namespaced_secret("once", NS, [test, change])
    with raises(404):
        core.create_namespaced_secret("nowhere", client.V1Secret(metadata=client.V1ObjectMeta(name="x")))
    newest = core.read_namespaced_secret("once", NS)
    test["value"] = newest.metadata.resource_version
    assert core.patch_namespaced_secret("once", NS, [test, change]).data == {"a": "Mg=="}


def test_a_write_without_change_keeps_the_version_and_a_dry_run_changes_nothing(core: client.CoreV1Api) -> None:
    made = secret(core, "same", a="1")
    again = core.patch_namespaced_secret("same", NS, {"data": {"a": "MQ=="}})
    assert again.metadata.resource_version == made.metadata.resource_version
    core.patch_namespaced_secret("same", NS, {"data": {"a": "Mg=="}}, dry_run="All")
    assert core.read_namespaced_secret("same", NS).data == {"a": "MQ=="}


def test_strategic_merge_patch_merges_lists_by_name(apps: client.AppsV1Api, kubectl: Kubectl) -> None:
    extra = {"name": "EXTRA", "value": "1"}
    template = {"spec": {"containers": [{"name": "juicefs-plugin", "env": [extra]}]}}
    generation = apps.read_namespaced_daemon_set(NODE, NS).metadata.generation
    patched = apps.patch_namespaced_daemon_set(NODE, NS, {"spec": {"template": template}})
    container = patched.spec.template.spec.containers[0]
    assert {"EXTRA", "NODE_NAME"} <= {e.name for e in container.env}
    assert container.image
    assert patched.metadata.generation == generation + 1
    kubectl("rollout", "status", "daemonset", NODE, "--timeout=30s")
    assert len(apps.list_namespaced_controller_revision(NS).items) >= 2


def test_selectors(core: client.CoreV1Api) -> None:
    def names(**selector: str) -> set[str]:
        return {p.metadata.name for p in core.list_namespaced_pod(NS, **selector).items}

    controller = {f"{CONTROLLER}-0", f"{CONTROLLER}-1"}
    assert names(label_selector=f"app={CONTROLLER}") == controller
    assert names(label_selector=f"app in ({CONTROLLER},other),!absent") == controller
    assert names(label_selector=f"app notin ({NODE})") & controller
    assert names(label_selector=f"app!={NODE}", field_selector=f"metadata.name={CONTROLLER}-0") == {f"{CONTROLLER}-0"}
    assert len(names(label_selector=f"app={NODE}", field_selector="spec.nodeName=node-2")) == 1
    events = core.list_namespaced_event(NS, field_selector=f"involvedObject.name={CONTROLLER}-0").items
    assert {e.involved_object.name for e in events} == {f"{CONTROLLER}-0"}
    with raises(400):
        core.list_namespaced_pod(NS, field_selector="spec.unknown=1")


def test_watch_from_a_version_sees_what_enters_and_leaves_the_selection(core: client.CoreV1Api) -> None:
    version = core.list_namespaced_config_map(NS).metadata.resource_version
    body = client.V1ConfigMap(metadata=client.V1ObjectMeta(name="seen", labels={"in": "yes"}))
    core.create_namespaced_config_map(NS, body)
    core.patch_namespaced_config_map("seen", NS, {"data": {"a": "1"}})
    core.patch_namespaced_config_map("seen", NS, {"metadata": {"labels": {"in": "no"}}})
    stream = watch.Watch().stream(
        core.list_namespaced_config_map, NS, label_selector="in=yes", resource_version=version, timeout_seconds=2
    )
    assert [event["type"] for event in stream] == ["ADDED", "MODIFIED", "DELETED"]


def test_a_watch_reports_changes_made_while_it_is_open(kube: KubeServer, core: client.CoreV1Api) -> None:
    events: list[tuple[str, str]] = []

    def follow() -> None:
        api = client.CoordinationV1Api(config.new_client_from_config(str(kube.kubeconfig)))
        stream = watch.Watch().stream(api.list_namespaced_lease, NS, timeout_seconds=20)
        for event in stream:
            events.append((event["type"], event["object"].metadata.name))
            if event["type"] == "DELETED":
                return

    leases = client.CoordinationV1Api(core.api_client)
    thread = threading.Thread(target=follow)
    thread.start()
    wait_for(
        "the watch", lambda: any(e.verb == "watch" and e.resource == "leases" for e in kube.audit()), deadline_s=20
    )
    lease = {"metadata": {"name": "lock"}, "spec": {"holderIdentity": "a", "leaseDurationSeconds": 15}}
    leases.create_namespaced_lease(NS, lease)
    held = leases.read_namespaced_lease("lock", NS)
    held.spec.holder_identity = "b"
    leases.replace_namespaced_lease("lock", NS, held)
    with raises(409):
        leases.replace_namespaced_lease("lock", NS, held)
    leases.delete_namespaced_lease("lock", NS)
    thread.join(20)
    assert events == [("ADDED", "lock"), ("MODIFIED", "lock"), ("DELETED", "lock")]


# Faults


def test_ordered_statuses(kube: KubeServer, core: client.CoreV1Api) -> None:
    made = secret(core, "faulty", a="1")
    match = {"verb": "patch", "resource": "secrets", "name": "faulty"}
    for status in (409, 429, 500):
        action = {"status": status, "retry_after": 7}
        kube.order_fault({"match": match, "times": 1, "action": action})
        with raises(status) as refused:
            core.patch_namespaced_secret("faulty", NS, {"data": {"a": "Mg=="}})
        assert status == 409 or refused.value.headers["Retry-After"] == "7"
        unchanged = core.read_namespaced_secret("faulty", NS)
        assert unchanged.metadata.resource_version == made.metadata.resource_version
    assert core.patch_namespaced_secret("faulty", NS, {"data": {"a": "Mg=="}}).data == {"a": "Mg=="}
    with pytest.raises(HTTPError):
        kube.order_fault({"nonsense": 1})


@pytest.mark.parametrize(("when", "value"), [("before", "MQ=="), ("after", "Mg==")])
def test_a_connection_dropped(kube: KubeServer, core: client.CoreV1Api, when: str, value: str) -> None:
    secret(core, f"dropped-{when}", a="1")
    kube.order_fault({"match": {"verb": "patch", "resource": "secrets"}, "times": 1, "action": {"drop": when}})
    no_retries = config.new_client_from_config(str(kube.kubeconfig))
    no_retries.configuration.retries = False
    no_retries.rest_client.pool_manager.connection_pool_kw["retries"] = False
    with pytest.raises(Exception, match=r"aborted|reset|closed"):
        client.CoreV1Api(no_retries).patch_namespaced_secret(f"dropped-{when}", NS, {"data": {"a": "Mg=="}})
    assert core.read_namespaced_secret(f"dropped-{when}", NS).data == {"a": value}


def test_a_delay(kube: KubeServer, core: client.CoreV1Api) -> None:
    kube.order_fault({"match": {"verb": "list", "resource": "nodes"}, "times": 1, "action": {"delay_s": 0.6}})
    start = time.monotonic()
    core.list_node()
    assert time.monotonic() - start >= 0.6


def test_rollouts_that_fail_and_recover(kube: KubeServer, kubectl: Kubectl, core: client.CoreV1Api) -> None:
    kube.order_fault({"rollout": "never-ready", "name": NODE})
    kubectl("rollout", "restart", "daemonset", NODE)
    assert "timed out" in kubectl("rollout", "status", "daemonset", NODE, "--timeout=3s", ok=False).stderr
    kube.clear_faults()
    kubectl("rollout", "status", "daemonset", NODE, "--timeout=30s")

    kube.order_fault({"rollout": "crash-loop", "name": CONTROLLER})
    kubectl("rollout", "restart", "statefulset", CONTROLLER)

    def looping() -> list[str]:
        found = core.list_namespaced_pod(NS, label_selector=f"app={CONTROLLER}").items
        states = [(p.metadata.name, s) for p in found for s in p.status.container_statuses or []]
        waiting = [(name, s) for name, s in states if s.state.waiting and s.restart_count]
        return [name for name, s in waiting if s.state.waiting.reason == "CrashLoopBackOff"]

    wait_for("a crash loop", looping, deadline_s=20)
    assert "panic" in kubectl("logs", "--previous", looping()[0]).stdout
    kube.clear_faults()
    kubectl("rollout", "status", "statefulset", CONTROLLER, "--timeout=30s")


def test_a_broken_stateful_set_pod_blocks_a_better_template_until_it_is_deleted(
    kube: KubeServer, kubectl: Kubectl
) -> None:
    kube.order_fault({"rollout": "never-ready", "name": CONTROLLER})
    kubectl("rollout", "restart", "statefulset", CONTROLLER)
    assert kubectl("rollout", "status", "statefulset", CONTROLLER, "--timeout=2s", ok=False).returncode
    kubectl("patch", "statefulset", CONTROLLER, "-p", '{"spec":{"template":{"metadata":{"annotations":{"good":"1"}}}}}')
    assert kubectl("rollout", "status", "statefulset", CONTROLLER, "--timeout=2s", ok=False).returncode
    kube.clear_faults()
    kubectl("rollout", "status", "statefulset", CONTROLLER, "--timeout=30s")


# The server itself


def test_a_token_is_needed(kube: KubeServer) -> None:
    settings = client.Configuration(host=kube.url)
    settings.ssl_ca_cert = str(kube.state / "ca.crt")
    with raises(401):
        client.CoreV1Api(client.ApiClient(settings)).list_node()


def test_the_audit_tells_reads_from_writes(kube: KubeServer, core: client.CoreV1Api, kubectl: Kubectl) -> None:
    start = len(kube.audit())
    core.list_node()
    kubectl("auth", "can-i", "get", "pods")
    kubectl("exec", f"{CONTROLLER}-0", "--", "true")
    secret(core, "audited", a="value-that-stays-out")
    with raises(404):
        core.delete_namespaced_secret("absent", NS)
    seen = [(e.verb, e.resource, e.subresource, e.code, e.mutating) for e in kube.audit()[start:]]
    assert ("list", "nodes", "", 200, False) in seen
    assert ("create", "selfsubjectaccessreviews", "", 201, False) in seen
    assert ("connect", "pods", "exec", 101, False) in seen
    assert ("create", "secrets", "", 201, True) in seen
    assert ("delete", "secrets", "", 404, True) in seen
    assert [e.command for e in kube.audit()[start:] if e.verb == "connect"] == [["true"]]
    assert "value-that-stays-out" not in (kube.state / "audit.jsonl").read_text()


def test_nothing_is_left_after_a_crash(tmp_path: Path) -> None:
    server = KubeServer.start(tmp_path / "kube", None, juicefs=binary("juicefs"))
    records = [json.loads(line) for line in (server.state / "processes.jsonl").read_text().splitlines()]
    pods = [psutil.Process(r["pid"]) for r in records]
    inside = [child for process in pods for child in process.children(recursive=True)]
    assert len(pods) == 4  # two controllers, two nodes
    assert inside
    psutil.Process(server.pid).kill()
    wait_for("the crash", lambda: not server.alive, deadline_s=5)
    again = KubeServer.load(tmp_path / "kube")
    assert again == server
    again.stop()
    again.stop()
    assert not [p for p in (*pods, *inside) if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_no_mount_of_a_pod_leaks_to_a_machine_whose_root_is_shared(tmp_path: Path) -> None:
    # As systemd has it; the child gives the mounts that a server with one more pod adds, and those it leaves.
    script = """
import json, subprocess, sys
from pathlib import Path
from lab.kube.client import KubeServer
from lab.process import binary
def mounts():
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
before = sorted(mounts())
server = KubeServer.start(Path(sys.argv[1]), None, juicefs=binary("juicefs"))
kubectl = [binary("kubectl"), "--kubeconfig", server.kubeconfig]
subprocess.run([*kubectl, "apply", "-f", "-"], input=sys.argv[2].encode(), check=True, capture_output=True)
subprocess.run([*kubectl, "wait", "--for=condition=Ready", "pod/p", "--timeout=20s"], check=True, capture_output=True)
more = [target for target in mounts() if target not in before]
server.stop()
print(json.dumps([more, sorted(mounts()) == before]))
"""
    manifest = json.dumps({"apiVersion": "v1", "kind": "Pod"} | pod("p"))
    command = ["unshare", "--mount", "--propagation", "shared", sys.executable, "-c", script, str(tmp_path), manifest]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True, cwd=root)
    assert json.loads(done.stdout) == [[str(tmp_path / "jfs")], True]

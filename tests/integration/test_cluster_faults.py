"""The cluster adapter and the steps on it when the API server, a pod or the line fails: each ends in time, clearly."""
# ruff: noqa: TID253 (a test may import its client at once)

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes import client, config
from pydantic import SecretStr

from include.juicefs_storage.adapters.juicefs_command import in_controller_pod
from include.juicefs_storage.adapters.kubernetes import KubernetesCluster, requests
from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.restart_csi import RestartCsi
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.csi import CSI_CONTROLLER_SELECTOR, CSI_WORKLOADS
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.setting import StorageConfig
from lab.kube.client import KubeServer
from lab.process import wait_for

NS, SECRET, POD = "juicefs", "faults-secret", "juicefs-csi-controller-0"
NODE = "juicefs-csi-node"
NEW = StorageConfig("minio", "http://new:9000/data", SecretStr("NEWKEY"), SecretStr("new-secret-value"))
ACTIONS = [{"status": 409}, {"status": 429, "retry_after": 1}, {"status": 500}, {"drop": "before"}, {"drop": "after"}]
actions = pytest.mark.parametrize("action", ACTIONS, ids=lambda action: "-".join(map(str, action.values())))


@pytest.fixture(scope="module")
def core(kube: KubeServer) -> client.CoreV1Api:
    return client.CoreV1Api(config.new_client_from_config(str(kube.kubeconfig)))


@pytest.fixture
def cluster(kube: KubeServer) -> Iterator[KubernetesCluster]:
    yield KubernetesCluster(config.new_client_from_config(str(kube.kubeconfig)), NS)
    kube.clear_faults()


@pytest.fixture
def secret(core: client.CoreV1Api) -> Iterator[None]:
    """A Secret with the old values, and nothing of another volume beside it."""
    data = {
        "metaurl": "mysql://u:p@(db:3306)/faults",
        "name": "faults",
        "storage": "minio",
        "bucket": "http://old/data",
    }
    core.create_namespaced_secret(NS, {"metadata": {"name": SECRET}, "stringData": data})
    yield
    core.delete_namespaced_secret(SECRET, NS)


def values(core: client.CoreV1Api) -> dict[str, str]:
    data = core.read_namespaced_secret(SECRET, NS).data
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def match(verb: str, resource: str, action: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"match": {"verb": verb, "resource": resource, **more.pop("match", {})}, "action": action, **more}


def count(kube: KubeServer, verb: str, resource: str) -> int:
    return sum((entry.verb, entry.resource) == (verb, resource) for entry in kube.audit())


class Limit:
    """Fails where the block took longer."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self.start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        took_s = time.monotonic() - self.start
        assert took_s < self.seconds, f"took {took_s:.1f} s"


# Reads: tried again for a while.


@pytest.mark.parametrize("action", ACTIONS[1:], ids=lambda action: "-".join(map(str, action.values())))
def test_a_read_outlives_some_trouble(kube: KubeServer, cluster: KubernetesCluster, action: dict[str, Any]) -> None:
    kube.order_fault(match("get", "statefulsets", action, times=2))
    before = count(kube, "get", "statefulsets")
    with Limit(15):
        assert cluster.workload("StatefulSet", "juicefs-csi-controller").rolled_out
    assert count(kube, "get", "statefulsets") - before == 3


def test_a_server_that_asks_for_an_hour_is_not_waited_for(
    kube: KubeServer, cluster: KubernetesCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "_READ_FOR_S", 2)
    kube.order_fault(match("list", "pods", {"status": 429, "retry_after": 3600}))
    with Limit(12), pytest.raises(TransientError, match=r"Kubernetes answered 429 .* to: list Pods in juicefs"):
        cluster.pods()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ({"status": 500}, "answered 500"),
        ({"drop": "before"}, "cannot be reached"),
        ({"delay_s": 60}, "cannot be reached"),
    ],
    ids=["500", "drop", "hang"],
)
def test_a_read_that_never_works_ends_in_time(
    kube: KubeServer,
    cluster: KubernetesCluster,
    monkeypatch: pytest.MonkeyPatch,
    action: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(requests, "_READ_FOR_S", 2)
    monkeypatch.setattr(requests, "REQUEST_TIMEOUT_S", 1)
    kube.order_fault(match("get", "secrets", action))
    with Limit(8), pytest.raises(TransientError, match=message):
        cluster.secret("juicefs-sc-secret")


def test_a_missing_right_is_not_tried_again(kube: KubeServer, cluster: KubernetesCluster) -> None:
    kube.order_fault({"deny": {"verb": "get", "resource": "secrets"}})
    before = count(kube, "get", "secrets")
    with Limit(3), pytest.raises(PermanentError, match="Kubernetes answered 403"):
        cluster.secret("juicefs-sc-secret")
    assert count(kube, "get", "secrets") - before == 1


def test_a_server_that_is_gone_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "_READ_FOR_S", 1)
    configuration = client.Configuration(host="https://127.0.0.1:1")
    gone = KubernetesCluster(client.ApiClient(configuration), NS)
    with Limit(5), pytest.raises(TransientError, match="cannot be reached for: list Pods"):
        gone.pods()
    with Limit(5), pytest.raises(TransientError, match="Could not start true"):
        gone.exec(POD, "juicefs-plugin", ["true"])


# Writes: never repeated blindly; the world is looked at again.


@actions
def test_a_secret_is_patched_once_whatever_happens_to_the_request(
    kube: KubeServer, cluster: KubernetesCluster, core: client.CoreV1Api, secret: None, action: dict[str, Any]
) -> None:
    kube.order_fault(match("patch", "secrets", action, times=1))
    before = count(kube, "patch", "secrets")
    with Limit(10):
        assert PatchSecrets(Clusters(cluster), SECRET, "faults", NEW).apply() == [f"{NS}/{SECRET}"]
    assert values(core)["bucket"] == NEW.bucket
    assert values(core)["secret-key"] == "new-secret-value"
    # What was applied although its answer was lost is not sent again.
    assert count(kube, "patch", "secrets") - before == (1 if action == {"drop": "after"} else 2)


def test_a_patch_that_never_comes_through_fails_and_leaves_the_secret(
    kube: KubeServer, cluster: KubernetesCluster, core: client.CoreV1Api, secret: None
) -> None:
    kube.order_fault(match("patch", "secrets", {"status": 500}))
    with Limit(10), pytest.raises(TransientError, match=f"Kubernetes answered 500 .* to: patch Secret {NS}/{SECRET}"):
        PatchSecrets(Clusters(cluster), SECRET, "faults", NEW).apply()
    assert values(core)["bucket"] == "http://old/data"


def test_a_secret_that_changes_between_read_and_patch_keeps_the_others_change(
    cluster: KubernetesCluster, core: client.CoreV1Api, secret: None
) -> None:
    read = cluster.secret(SECRET)
    core.patch_namespaced_secret(SECRET, NS, {"stringData": {"envs": "{}"}})
    with pytest.raises(TransientError, match="changed while it was being patched"):
        cluster.patch_secret(read, {"bucket": NEW.bucket})
    assert values(core)["bucket"] == "http://old/data"

    # Through the step: the first patch meets a change, the second is made from what was read then.
    def meddle(times: list[None] = [None]) -> None:  # noqa: B006  the list is the counter
        if times:
            times.pop()
            core.patch_namespaced_secret(SECRET, NS, {"stringData": {"token": "theirs"}})

    PatchSecrets(Clusters(cluster), SECRET, "faults", NEW, confirm_lease=meddle).apply()
    found = values(core)
    assert (found["bucket"], found["token"], found["envs"]) == (NEW.bucket, "theirs", "{}")


def generations(kube: KubeServer) -> list[int]:
    apps = client.AppsV1Api(config.new_client_from_config(str(kube.kubeconfig)))
    return [
        apps.read_namespaced_stateful_set("juicefs-csi-controller", NS).metadata.generation,
        apps.read_namespaced_daemon_set(NODE, NS).metadata.generation,
    ]


def rolled_out(cluster: KubernetesCluster) -> bool:
    return all(cluster.workload(kind, name).rolled_out for kind, name in CSI_WORKLOADS)


@actions
def test_a_workload_restarts_once_whatever_happens_to_the_request(
    kube: KubeServer, cluster: KubernetesCluster, action: dict[str, Any]
) -> None:
    before = generations(kube)
    for resource in ("statefulsets", "daemonsets"):
        kube.order_fault(match("patch", resource, action, times=1))
    step = RestartCsi(Clusters(cluster), f"once-{json.dumps(action)}")
    with Limit(15):
        assert len(step.apply()) == 2
    assert [after - generation for after, generation in zip(generations(kube), before, strict=True)] == [1, 1]
    assert step.apply() == []
    wait_for("both rollouts", lambda: rolled_out(cluster), deadline_s=60)


# Rollouts.


def test_a_rollout_that_never_becomes_ready_is_waited_for_and_said(
    kube: KubeServer, cluster: KubernetesCluster
) -> None:
    kube.order_fault({"rollout": "never-ready", "name": NODE})
    step = RestartCsi(Clusters(cluster), "never-ready")
    step.apply()
    wait_for("the pods are replaced", lambda: len(step.verify()) == 1, deadline_s=60)
    assert step.verify()[0].startswith(f"DaemonSet/{NODE}: ")
    # A way back is not held up by it: the trouble over, both rollouts end.
    kube.clear_faults()
    back = RestartCsi(Clusters(cluster), "never-ready rollback")
    back.apply()
    wait_for("both rollouts", lambda: not back.verify(), deadline_s=60)


def test_a_controller_that_never_becomes_ready_recovers_with_its_cause(
    kube: KubeServer, cluster: KubernetesCluster
) -> None:
    """What blocks a StatefulSet for good is a broken template; a restart changes an annotation only."""
    kube.order_fault({"rollout": "never-ready", "name": "juicefs-csi-controller"})
    RestartCsi(Clusters(cluster), "stuck").apply()
    wait_for(
        "a pod is replaced and not ready",
        lambda: not all(pod.ready for pod in cluster.pods(CSI_CONTROLLER_SELECTOR)),
        deadline_s=60,
    )
    wait_for("the node components", lambda: cluster.workload("DaemonSet", NODE).rolled_out, deadline_s=60)
    # juicefs can be run all the same, or nothing could be copied back.
    juicefs = in_controller_pod(cluster, Metaurl.parse("mysql://u@(db)/jfs"))
    done = juicefs.run(["/usr/local/bin/juicefs", "version"], "", 30)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["juicefs", "version"])
    back = RestartCsi(Clusters(cluster), "stuck rollback")
    back.apply()
    kube.clear_faults()
    wait_for("both rollouts", lambda: not back.verify(), deadline_s=60)


def test_a_crash_loop_fails_with_the_containers_last_words(kube: KubeServer, cluster: KubernetesCluster) -> None:
    kube.order_fault({"rollout": "crash-loop", "name": NODE})
    step = RestartCsi(Clusters(cluster), "crash-loop")
    step.apply()
    failures: list[PermanentError] = []

    def failed() -> bool:
        try:
            step.verify()
        except PermanentError as error:
            failures.append(error)
        return bool(failures)

    wait_for("the crash loop is seen", failed, deadline_s=60)
    assert "CrashLoopBackOff" in failures[0].problem
    assert "panic: ordered to crash" in failures[0].problem
    assert "existing mounts keep working" in failures[0].state
    # The way back is not failed by the pod that is to be replaced.
    kube.clear_faults()
    back = RestartCsi(Clusters(cluster), "crash-loop rollback")
    back.apply()
    wait_for("both rollouts", lambda: not back.verify(), deadline_s=90)


# Exec.


def test_an_exec_that_is_refused_says_which_right_is_missing(kube: KubeServer, cluster: KubernetesCluster) -> None:
    kube.order_fault({"deny": {"resource": "pods/exec"}})
    with pytest.raises(PermanentError, match="Kubernetes answered 403") as refused:
        cluster.exec(POD, "juicefs-plugin", ["true"])
    assert "deploy/rbac.yaml" in refused.value.next_step
    assert "Authorization" not in str(refused.value)


def test_an_exec_into_a_pod_that_is_gone_may_be_tried_again(cluster: KubernetesCluster) -> None:
    with pytest.raises(TransientError, match=r"Could not start true in pod juicefs/no-such-pod \(.* answered 404\)"):
        cluster.exec("no-such-pod", "juicefs-plugin", ["true"])


@pytest.mark.parametrize("action", [{"status": 429}, {"status": 500}, {"drop": "before"}, {"delay_s": 60}], ids=str)
def test_an_exec_that_does_not_start_ends_in_time(
    kube: KubeServer, cluster: KubernetesCluster, monkeypatch: pytest.MonkeyPatch, action: dict[str, Any]
) -> None:
    monkeypatch.setattr("include.juicefs_storage.adapters.kubernetes.exec.REQUEST_TIMEOUT_S", 2)
    kube.order_fault(match("connect", "pods", action, match={"subresource": "exec"}))
    with Limit(5), pytest.raises(TransientError, match="Could not start true in pod"):
        cluster.exec(POD, "juicefs-plugin", ["true"])


def test_a_line_that_is_cut_during_exec_is_no_exit_code(kube: KubeServer, cluster: KubernetesCluster) -> None:
    kube.order_fault({"exec": "drop"})
    with Limit(10), pytest.raises(TransientError, match="connection was lost") as lost:
        cluster.exec(POD, "juicefs-plugin", ["sleep", "5"])
    assert "may have done its work" in lost.value.state


def test_a_command_that_does_not_end_is_left(cluster: KubernetesCluster) -> None:
    with Limit(8), pytest.raises(TransientError, match="did not end within 1 s"):
        cluster.exec(POD, "juicefs-plugin", ["sleep", "20"], timeout_s=1)


def test_a_pod_that_is_deleted_during_exec_is_no_success(kube: KubeServer, cluster: KubernetesCluster) -> None:
    kube.order_fault({"exec": "delete-pod"})
    with Limit(30):
        assert cluster.exec(POD, "juicefs-plugin", ["sleep", "60"]).returncode == 137
    wait_for("the new pod", lambda: rolled_out(cluster), deadline_s=60)


# The connection.

IN_CLUSTER = """
import json, sys
from kubernetes.config import incluster_config
incluster_config.SERVICE_TOKEN_FILENAME, incluster_config.SERVICE_CERT_FILENAME = sys.argv[1:]
from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
print(json.dumps(sorted(pod.name for pod in KubernetesCluster.from_connection("k8s", "juicefs").pods())))
"""


@pytest.mark.parametrize("extra", [{"in_cluster": True}, {}], ids=["in_cluster", "default"])
def test_a_connection_in_the_cluster_works(kube: KubeServer, tmp_path: Path, extra: dict[str, Any]) -> None:
    token = tmp_path / "token"
    token.write_text(yaml.safe_load(kube.kubeconfig.read_text())["users"][0]["user"]["token"])
    host, port = kube.url.removeprefix("https://").rsplit(":", 1)
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW_CONN_K8S": json.dumps({"conn_type": "kubernetes", "extra": extra}),
        "KUBERNETES_SERVICE_HOST": host,
        "KUBERNETES_SERVICE_PORT": port,
    }
    command = [sys.executable, "-c", IN_CLUSTER, str(token), str(kube.state / "ca.crt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert POD in json.loads(done.stdout.splitlines()[-1])

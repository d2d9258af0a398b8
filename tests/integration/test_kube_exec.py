"""Exec into the stand-in's pods: streams, exit codes, and what the client sees when it breaks."""
# ruff: noqa: S108, TID253 (/tmp is the pod's own; a test may import its client at once)

import json
import subprocess

import pytest
from kubernetes import client, config
from kubernetes.client import ApiException
from kubernetes.stream import stream
from kubernetes.stream.ws_client import WSClient

from lab.kube.client import KubeServer
from lab.process import binary, wait_for

NS = "juicefs"
POD = "juicefs-csi-controller-0"


@pytest.fixture
def core(kube: KubeServer) -> client.CoreV1Api:
    # stream() changes its ApiClient: one for each test.
    return client.CoreV1Api(config.new_client_from_config(str(kube.kubeconfig)))


def start(core: client.CoreV1Api, *command: str, pod: str = POD, stdin: bool = False) -> WSClient:
    return stream(
        core.connect_get_namespaced_pod_exec,
        pod,
        NS,
        command=list(command),
        stdin=stdin,
        stdout=True,
        stderr=True,
        tty=False,
        _preload_content=False,
    )


def finish(socket: WSClient) -> tuple[int, str, str]:
    socket.run_forever(timeout=30)
    return socket.returncode, socket.read_stdout(0), socket.read_stderr(0)


def kubectl(kube: KubeServer, *args: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    command = [str(binary("kubectl")), "--kubeconfig", str(kube.kubeconfig), *args]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60, check=False)


def controller_ready(core: client.CoreV1Api, not_uid: str = "") -> bool:
    try:
        pod = core.read_namespaced_pod(POD, NS)
    except ApiException:
        return False
    ready = any(c.type == "Ready" and c.status == "True" for c in pod.status.conditions or [])
    return ready and pod.metadata.uid != not_uid and pod.metadata.deletion_timestamp is None


def test_streams_and_exit_code_stay_apart(core: client.CoreV1Api) -> None:
    assert finish(start(core, "sh", "-c", "echo out; echo err >&2; exit 5")) == (5, "out\n", "err\n")
    assert finish(start(core, "true")) == (0, "", "")


def test_the_python_client_writes_stdin_and_closes_it(core: client.CoreV1Api) -> None:
    socket = start(core, "sh", "-c", 'IFS= read -r first; cat; echo "first was $first"', stdin=True)
    socket.write_stdin("one\ntwo\n")
    socket.close_channel(0)
    assert finish(socket) == (0, "two\nfirst was one\n", "")


def test_kubectl_carries_binary_data_both_ways(kube: KubeServer) -> None:
    data = bytes(range(256)) * 4096
    assert kubectl(kube, "exec", "-i", POD, "--", "cat", stdin=data).stdout == data
    assert kubectl(kube, "exec", POD, "--", "sh", "-c", "exit 42").returncode == 42


def test_large_output_is_complete(core: client.CoreV1Api) -> None:
    code, out, _ = finish(start(core, "sh", "-c", "seq 1 200000"))
    assert (code, len(out.splitlines()), out.splitlines()[-1]) == (0, 200000, "200000")


def test_a_missing_binary_could_not_start(core: client.CoreV1Api, kube: KubeServer) -> None:
    socket = start(core, "no-such-binary")
    socket.run_forever(timeout=10)
    status = json.loads(socket.read_channel(3))
    assert status["status"] == "Failure"
    assert "executable file not found" in status["message"]
    assert "causes" not in status["details"]
    assert b"executable file not found" in kubectl(kube, "exec", POD, "--", "no-such-binary").stderr


def test_a_refused_handshake(core: client.CoreV1Api) -> None:
    # The client trips over its own error: the refusal is only in the exception's context.
    with pytest.raises(AttributeError) as refused:
        start(core, "true", pod="no-such-pod")
    assert isinstance(refused.value.__context__, ApiException)
    assert "Handshake status 404" in refused.value.__context__.reason


def test_each_pod_has_its_own_files_processes_and_name(core: client.CoreV1Api) -> None:
    assert finish(start(core, "sh", "-c", "echo x > /tmp/mine; cat /proc/sys/kernel/hostname"))[1] == f"{POD}\n"
    # A later exec into the same pod sees the file; another pod does not.
    assert finish(start(core, "cat", "/tmp/mine"))[1] == "x\n"
    node = core.list_namespaced_pod(NS, label_selector="app=juicefs-csi-node").items[0].metadata.name
    assert finish(start(core, "cat", "/tmp/mine", pod=node))[0] == 1
    _, out, _ = finish(start(core, "cat", "/proc/1/cmdline"))
    assert out.startswith("sh\0")
    code, out, _ = finish(start(core, "juicefs", "version"))
    assert (code, out.split()[:2]) == (0, ["juicefs", "version"])
    assert finish(start(core, "sh", "-c", "touch /usr/x /etc/x"))[0] != 0
    # Nothing of the machine is held in the pod, or a mount there could not end.
    _, out, _ = finish(start(core, "cat", "/proc/self/mountinfo"))
    targets = {line.split()[4] for line in out.splitlines()}
    assert {t.split("/")[1] for t in targets} == {"", "bin", "dev", "etc", "jfs", "proc", "usr"}


def test_a_process_in_the_background_outlives_its_exec_but_not_its_pod(core: client.CoreV1Api) -> None:
    start_it = "setsid sh -c 'echo here > /tmp/alive; exec sleep 987' >/dev/null 2>&1 & echo started"
    assert finish(start(core, "sh", "-c", start_it))[:2] == (0, "started\n")
    count = ("sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 987'")
    wait_for("the process", lambda: finish(start(core, *count))[1].strip() not in ("", "0"), deadline_s=10)
    uid = core.read_namespaced_pod(POD, NS).metadata.uid
    core.delete_namespaced_pod(POD, NS)
    wait_for("the new pod", lambda: controller_ready(core, uid), deadline_s=30)
    assert finish(start(core, "ls", "/tmp"))[1] == ""
    assert finish(start(core, "sh", "-c", "cat /proc/[0-9]*/cmdline | tr '\\0' ' '"))[1].count("sleep 987") == 0


def test_a_pod_deleted_during_exec(kube: KubeServer, core: client.CoreV1Api) -> None:
    uid = core.read_namespaced_pod(POD, NS).metadata.uid
    kube.order_fault({"exec": "delete-pod"})
    assert finish(start(core, "sleep", "60"))[0] == 137
    wait_for("the new pod", lambda: controller_ready(core, uid), deadline_s=30)


def test_a_connection_lost_during_exec_has_no_exit_code(kube: KubeServer, core: client.CoreV1Api) -> None:
    kube.order_fault({"exec": "drop"})
    socket = start(core, "sleep", "2")
    with pytest.raises(Exception):  # noqa: B017, PT011 (the client has no error of its own for it)
        finish(socket)


def test_two_execs_at_the_same_time(kube: KubeServer, core: client.CoreV1Api) -> None:
    waiting = start(core, "sh", "-c", "until [ -e /tmp/go ]; do sleep 0.05; done; echo gone")
    other = client.CoreV1Api(config.new_client_from_config(str(kube.kubeconfig)))
    assert finish(start(other, "touch", "/tmp/go"))[0] == 0
    assert finish(waiting) == (0, "gone\n", "")

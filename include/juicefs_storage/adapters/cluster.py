"""The Kubernetes cluster, through Airflow's KubernetesHook."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from include.juicefs_storage.core.errors import PermanentError, TransientError
from include.juicefs_storage.core.ports import (
    ExecResult,
    PersistentVolume,
    Pod,
    Right,
    SecretObject,
    Workload,
    WorkloadKind,
    WorkloadTemplate,
)
from include.juicefs_storage.core.steps import CSI_WORKLOADS

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_REQUEST_TIMEOUT_S = 30
_CSI_DRIVER = "csi.juicefs.com"
_PERMANENT_STATUS = frozenset({400, 401, 403, 404, 422})
_MERGE_PATCH = "application/merge-patch+json"


class KubernetesCluster:
    """`ports.Cluster`. Bodies of answers are left out of errors: they may hold secrets."""

    def __init__(self, api_client: ApiClient, namespace: str) -> None:
        from kubernetes import client

        self.namespace = namespace
        self._api = api_client
        self._core = client.CoreV1Api(api_client)
        self._apps = client.AppsV1Api(api_client)
        self._auth = client.AuthorizationV1Api(api_client)

    @classmethod
    def from_connection(cls, conn_id: str, namespace: str) -> KubernetesCluster:
        """Use an Airflow connection of type Kubernetes (in-cluster, kubeconfig, extras)."""
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
        from kubernetes.client import Configuration

        # A configuration of its own: without it two connections would share one global default.
        hook = KubernetesHook(kubernetes_conn_id=conn_id, client_configuration=Configuration())
        return cls(hook.api_client, namespace)

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        from kubernetes.client import ApiException
        from urllib3.exceptions import HTTPError

        try:
            yield
        except ApiException as error:
            kind = PermanentError if error.status in _PERMANENT_STATUS else TransientError
            raise kind(
                f"Kubernetes answered {error.status} {error.reason} to: {action}.",
                next_step=f"kubectl -n {self.namespace} get events; see docs/rights.md for 403",
            ) from None
        except HTTPError as error:
            raise TransientError(
                f"The Kubernetes API cannot be reached for: {action} ({type(error).__name__}).",
                next_step="test the Kubernetes connection in Airflow (Admin → Connections)",
            ) from None

    def allows(self, right: Right) -> bool:
        """SelfSubjectAccessReview."""
        attributes = {
            "verb": right.verb,
            "group": right.group,
            "resource": right.resource,
            "subresource": right.subresource,
            "namespace": right.namespace,
            "name": right.name,
        }
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {key: value for key, value in attributes.items() if value}},
        }
        with self._explained("ask for rights"):
            answer = self._auth.create_self_subject_access_review(body, _request_timeout=_REQUEST_TIMEOUT_S)
        return bool(answer.status.allowed)

    def secret(self, name: str) -> SecretObject:
        """Read one Secret of the namespace."""
        with self._explained(f"get Secret {self.namespace}/{name}"):
            found = self._core.read_namespaced_secret(name, self.namespace, _request_timeout=_REQUEST_TIMEOUT_S)
        return _secret(found)

    def secrets(self, label_selector: str = "") -> Sequence[SecretObject]:
        """Read the namespace's Secrets, where wanted those with a label."""
        with self._explained(f"list Secrets in {self.namespace}"):
            found = self._core.list_namespaced_secret(
                self.namespace, label_selector=label_selector, _request_timeout=_REQUEST_TIMEOUT_S
            )
        return [_secret(item) for item in found.items]

    def secrets_everywhere(self) -> Sequence[SecretObject] | None:
        """Read all Secrets of the cluster; None where RBAC forbids it, as deploy/rbac.yaml does."""
        if not self.allows(Right("list", "secrets")):
            return None
        with self._explained("list Secrets in all namespaces"):
            found = self._core.list_secret_for_all_namespaces(_request_timeout=_REQUEST_TIMEOUT_S)
        return [_secret(item) for item in found.items]

    def patch_secret(self, secret: SecretObject, values: Mapping[str, str]) -> None:
        """JSON patch that tests the resourceVersion; `add`, which also replaces, since keys may be absent."""
        patch: list[dict[str, str]] = [
            {"op": "test", "path": "/metadata/resourceVersion", "value": secret.resource_version}
        ]
        for key, value in values.items():
            path = "/data/" + key.replace("~", "~0").replace("/", "~1")
            patch.append({"op": "add", "path": path, "value": base64.b64encode(value.encode()).decode()})
        try:
            with self._explained(f"patch Secret {secret.namespace}/{secret.name}"):
                self._core.patch_namespaced_secret(
                    secret.name, secret.namespace, patch, _request_timeout=_REQUEST_TIMEOUT_S
                )
        except PermanentError as error:
            if " 422 " not in error.problem:
                raise
            raise TransientError(
                f"Secret {secret.namespace}/{secret.name} changed while it was being patched.",
                state="this Secret was left as somebody else wrote it",
                next_step="the task reads it again and tries once more",
            ) from None

    def _read_workload(self, kind: WorkloadKind, name: str) -> Any:
        read = {
            "StatefulSet": self._apps.read_namespaced_stateful_set,
            "DaemonSet": self._apps.read_namespaced_daemon_set,
        }[kind]
        with self._explained(f"get {kind} {self.namespace}/{name}"):
            return read(name, self.namespace, _request_timeout=_REQUEST_TIMEOUT_S)

    def workload(self, kind: WorkloadKind, name: str) -> Workload:
        """Read a StatefulSet or DaemonSet; "rolled out" is what `kubectl rollout status` waits for."""
        found = self._read_workload(kind, name)
        rolled_out, progress = _rollout(kind, found)
        template = found.spec.template
        return Workload(
            kind=kind,
            name=name,
            args=tuple(arg for box in template.spec.containers for arg in [*(box.command or []), *(box.args or [])]),
            annotations=dict((template.metadata and template.metadata.annotations) or {}),
            rolled_out=rolled_out,
            progress=progress,
        )

    def workload_templates(self) -> Sequence[WorkloadTemplate]:
        """Read the namespace's Deployments, StatefulSets and DaemonSets."""
        found = []
        for kind, read in (
            ("Deployment", self._apps.list_namespaced_deployment),
            ("StatefulSet", self._apps.list_namespaced_stateful_set),
            ("DaemonSet", self._apps.list_namespaced_daemon_set),
        ):
            with self._explained(f"list {kind}s in {self.namespace}"):
                answer = read(self.namespace, _request_timeout=_REQUEST_TIMEOUT_S)
            found += [_template(kind, item) for item in answer.items]
        return found

    def stamp_template(self, kind: WorkloadKind, name: str, annotations: Mapping[str, str]) -> None:
        """Merge-patch the annotations of the pod template, as `kubectl rollout restart` does."""
        patch = {"spec": {"template": {"metadata": {"annotations": dict(annotations)}}}}
        call = {
            "StatefulSet": self._apps.patch_namespaced_stateful_set,
            "DaemonSet": self._apps.patch_namespaced_daemon_set,
        }[kind]
        with self._explained(f"restart {kind} {self.namespace}/{name}"):
            call(name, self.namespace, patch, _content_type=_MERGE_PATCH, _request_timeout=_REQUEST_TIMEOUT_S)

    def templates(self) -> Mapping[str, Any]:
        """The pod templates of the CSI workloads, as the API server sends them."""
        return {
            f"{kind}/{name}": self._api.sanitize_for_serialization(self._read_workload(kind, name).spec.template)
            for kind, name in CSI_WORKLOADS
        }

    def pods(self, label_selector: str = "", namespace: str | None = None) -> Sequence[Pod]:
        """Read the pods of a namespace."""
        namespace = namespace or self.namespace
        with self._explained(f"list Pods in {namespace}"):
            found = self._core.list_namespaced_pod(
                namespace, label_selector=label_selector, _request_timeout=_REQUEST_TIMEOUT_S
            )
        return [_pod(item) for item in found.items]

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        """The PVs of the JuiceFS CSI driver."""
        with self._explained("list PersistentVolumes"):
            found = self._core.list_persistent_volume(_request_timeout=_REQUEST_TIMEOUT_S)
        volumes = []
        for item in found.items:
            source = item.spec.csi
            if not source or source.driver != _CSI_DRIVER:
                continue
            secret, claim = source.node_publish_secret_ref, item.spec.claim_ref
            volumes.append(
                PersistentVolume(
                    name=item.metadata.name,
                    volume_handle=source.volume_handle,
                    secret_namespace=secret.namespace if secret else "",
                    secret_name=secret.name if secret else "",
                    claim_namespace=claim.namespace if claim else "",
                    claim_name=claim.name if claim else "",
                    mount_options=tuple(item.spec.mount_options or ()),
                )
            )
        return volumes

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        """Run a command in a pod over a WebSocket of its own.

        Raises:
            TransientError: It could not be started, the connection was lost, or it did not end in time; in the
                last two cases it may still be running.
        """
        from kubernetes import client, stream
        from websocket import WebSocketException

        where = f"{command[0]} in pod {self.namespace}/{pod}"
        # stream() swaps the request method of its client: one client per call keeps threads apart.
        api = client.CoreV1Api(client.ApiClient(self._api.configuration))
        deadline = time.monotonic() + timeout_s
        try:
            socket = stream.stream(
                api.connect_get_namespaced_pod_exec,
                pod,
                self.namespace,
                container=container,
                command=list(command),
                stdin=bool(stdin),
                stdout=True,
                stderr=True,
                tty=False,
                binary=True,
                _preload_content=False,
                _request_timeout=_REQUEST_TIMEOUT_S,
            )
        except Exception as error:  # noqa: BLE001  the client raises ApiException, WebSocket and socket errors here
            raise TransientError(
                f"Could not start {where} ({type(error).__name__} {getattr(error, 'status', '')}).",
                state="the command was not run",
                next_step=f"kubectl -n {self.namespace} get pod {pod}",
            ) from None
        try:
            if stdin:
                socket.write_stdin(stdin.encode())
            while socket.is_open() and time.monotonic() < deadline:
                socket.update(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            if socket.is_open():
                raise TransientError(
                    f"{where} did not end within {timeout_s:g} s.",
                    state="it may still be running there",
                    next_step="the task tries again; every step observes before it acts",
                )
            stdout, stderr = (read().decode(errors="replace") for read in (socket.read_stdout, socket.read_stderr))
            return ExecResult(_exit_code(socket, where, stderr), stdout, stderr)
        except (WebSocketException, OSError):
            raise _connection_lost(where) from None
        finally:
            socket.close()

    def log_tail(self, pod: str, lines: int = 20) -> str:
        """The last lines of a pod's log; an explanation where it cannot be read."""
        try:
            with self._explained(f"read the log of Pod {self.namespace}/{pod}"):
                return str(
                    self._core.read_namespaced_pod_log(
                        pod, self.namespace, tail_lines=lines, _request_timeout=_REQUEST_TIMEOUT_S
                    )
                )
        except (PermanentError, TransientError) as error:
            return f"(no log: {error.problem})"


def _connection_lost(where: str) -> TransientError:
    return TransientError(
        f"The connection was lost during {where}.",
        state="the command may have done its work, or may still be running",
        next_step="the task observes and tries again",
    )


def _exit_code(socket: Any, where: str, stderr: str) -> int:
    try:
        return int(socket.returncode)
    except (TypeError, KeyError, IndexError, AttributeError):
        raise _connection_lost(where) from None
    except ValueError:
        # A Failure without an exit code: the runtime could not start the command.
        raise TransientError(
            f"Could not start {where}: {stderr[-300:]}", state="the command was not run", next_step="check the image"
        ) from None


def _secret(item: Any) -> SecretObject:
    return SecretObject(
        namespace=item.metadata.namespace,
        name=item.metadata.name,
        resource_version=item.metadata.resource_version,
        labels=dict(item.metadata.labels or {}),
        annotations=dict(item.metadata.annotations or {}),
        owners=tuple(f"{owner.kind}/{owner.name}" for owner in item.metadata.owner_references or ()),
        data={key: base64.b64decode(value).decode(errors="replace") for key, value in (item.data or {}).items()},
    )


def _template(kind: str, item: Any) -> WorkloadTemplate:
    template = item.spec.template
    boxes = [*(template.spec.containers or ()), *(template.spec.init_containers or ())]
    variables = [one.value_from.secret_key_ref for box in boxes for one in box.env or () if one.value_from]
    variables += [one.secret_ref for box in boxes for one in box.env_from or ()]
    volumes = [one.secret.secret_name for one in template.spec.volumes or () if one.secret]
    return WorkloadTemplate(
        kind=kind,
        name=item.metadata.name,
        annotations={
            **(item.metadata.annotations or {}),
            **((template.metadata and template.metadata.annotations) or {}),
        },
        secrets=frozenset([*(ref.name for ref in variables if ref), *volumes]),
    )


def _pod(item: Any) -> Pod:
    statuses = (item.status and item.status.container_statuses) or []
    waiting = [status.state.waiting.reason for status in statuses if status.state and status.state.waiting]
    conditions = (item.status and item.status.conditions) or []
    return Pod(
        namespace=item.metadata.namespace,
        name=item.metadata.name,
        uid=item.metadata.uid,
        node=item.spec.node_name or "",
        ready=any(row.type == "Ready" and row.status == "True" for row in conditions)
        and not item.metadata.deletion_timestamp,
        restarts=sum(status.restart_count for status in statuses),
        problem=next((reason for reason in waiting if reason), ""),
        labels=dict(item.metadata.labels or {}),
        commands=tuple(" ".join([*(box.command or []), *(box.args or [])]) for box in item.spec.containers),
        claims=tuple(
            volume.persistent_volume_claim.claim_name
            for volume in item.spec.volumes or []
            if volume.persistent_volume_claim
        ),
    )


def _rollout(kind: WorkloadKind, item: Any) -> tuple[bool, str]:
    """As kubectl decides it (polymorphichelpers/rollout_status.go)."""
    status = item.status
    observed = (status.observed_generation or 0) >= item.metadata.generation
    if kind == "DaemonSet":
        desired = status.desired_number_scheduled or 0
        updated, available = status.updated_number_scheduled or 0, status.number_available or 0
        done = observed and updated >= desired and available >= desired
    else:
        desired = item.spec.replicas if item.spec.replicas is not None else 1
        updated, available = status.updated_replicas or 0, status.ready_replicas or 0
        done = (
            observed
            and updated >= desired
            and available >= desired
            and status.update_revision == status.current_revision
        )
    return done, f"{updated} of {desired} updated, {available} ready{'' if observed else ', change not seen yet'}"

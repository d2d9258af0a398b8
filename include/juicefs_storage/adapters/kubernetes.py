"""The Kubernetes cluster, through Airflow's KubernetesHook."""

from __future__ import annotations

import base64
import queue
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any

from include.juicefs_storage.errors import LostAnswerError, PermanentError, TransientError
from include.juicefs_storage.ports import (
    DumpKind,
    ExecResult,
    Lease,
    PersistentVolume,
    Pod,
    Right,
    SecretObject,
    StorageClass,
    Workload,
    WorkloadKind,
    WorkloadTemplate,
)
from include.juicefs_storage.volume.csi import CSI_CONFIG_MAP, CSI_WORKLOADS

if TYPE_CHECKING:
    from kubernetes.client import ApiClient
    from tenacity import RetryCallState

#: One request, and all tries of one that changes nothing and got no useful answer, in seconds.
_REQUEST_TIMEOUT_S, _READ_FOR_S = 30, 20
_LONGEST_PAUSE_S = 5.0
_CSI_DRIVER = "csi.juicefs.com"
_PERMANENT_STATUS = frozenset({400, 401, 403, 404, 422})
_MERGE_PATCH = "application/merge-patch+json"


class KubernetesCluster:
    """`ports.Cluster`. Bodies of answers are left out of errors: they may hold secrets."""

    def __init__(self, api_client: ApiClient, namespace: str) -> None:
        from kubernetes import client

        # urllib3 would send a PUT again by itself, and wait for as long as a Retry-After says.
        api_client.configuration.retries = False
        self.namespace = namespace
        self._api = client.ApiClient(api_client.configuration)
        self._core = client.CoreV1Api(self._api)
        self._apps = client.AppsV1Api(self._api)
        self._auth = client.AuthorizationV1Api(self._api)
        self._coordination = client.CoordinationV1Api(self._api)

    @classmethod
    def from_connection(cls, conn_id: str, namespace: str) -> KubernetesCluster:
        """Use an Airflow connection of type Kubernetes (in-cluster, kubeconfig, extras)."""
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
        from kubernetes.client import Configuration
        from kubernetes.config import load_incluster_config

        # A configuration of its own: without it two connections would share one global default.
        configuration = Configuration()
        hook = KubernetesHook(kubernetes_conn_id=conn_id, client_configuration=configuration)
        api_client = hook.api_client
        if hook.is_in_cluster:
            # With extra in_cluster the hook fills in the global default instead.
            load_incluster_config(client_configuration=configuration)
        return cls(api_client, namespace)

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

    def _read(self, action: str, call: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Make a call that changes nothing; tried again for a while where the trouble may pass."""
        from tenacity import Retrying, retry_if_exception, stop_after_delay

        tries = Retrying(
            retry=retry_if_exception(_may_pass), wait=_pause_s, stop=stop_after_delay(_READ_FOR_S), reraise=True
        )
        with self._explained(action):
            return tries(call, *args, _request_timeout=_REQUEST_TIMEOUT_S, **more)

    def _find(self, action: str, call: Callable[..., Any], *args: Any) -> Any:
        """As `_read`; None where there is no such object."""
        from kubernetes.client import ApiException

        def read(**more: Any) -> Any:
            try:
                return call(*args, **more)
            except ApiException as error:
                if error.status == 404:
                    return None
                raise

        return self._read(action, read)

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
        answer = self._read("ask for rights", self._auth.create_self_subject_access_review, body)
        return bool(answer.status.allowed)

    def secret(self, name: str) -> SecretObject:
        """Read one Secret of the namespace."""
        action = f"get Secret {self.namespace}/{name}"
        return _secret(self._read(action, self._core.read_namespaced_secret, name, self.namespace))

    def secrets(self, label_selector: str = "") -> Sequence[SecretObject]:
        """Read the namespace's Secrets, where wanted those with a label."""
        found = self._read(
            f"list Secrets in {self.namespace}",
            self._core.list_namespaced_secret,
            self.namespace,
            label_selector=label_selector,
        )
        return [_secret(item) for item in found.items]

    def secrets_everywhere(self) -> Sequence[SecretObject] | None:
        """Read all Secrets of the cluster; None where RBAC forbids it, as deploy/rbac.yaml does."""
        if not self.allows(Right("list", "secrets")):
            return None
        found = self._read("list Secrets in all namespaces", self._core.list_secret_for_all_namespaces)
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
        return self._read(f"get {kind} {self.namespace}/{name}", read, name, self.namespace)

    def workload(self, kind: WorkloadKind, name: str) -> Workload:
        """Read a StatefulSet or DaemonSet; "rolled out" is what `kubectl rollout status` waits for."""
        found = self._read_workload(kind, name)
        rolled_out, progress = _rollout(kind, found)
        template = found.spec.template
        return Workload(
            kind=kind,
            name=name,
            args=_args(template),
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
            answer = self._read(f"list {kind}s in {self.namespace}", read, self.namespace)
            found += [_template(kind, item) for item in answer.items]
        return found

    def deployments_everywhere(self) -> Sequence[WorkloadTemplate] | None:
        """Read all Deployments of the cluster; None where RBAC forbids it, as deploy/rbac.yaml does."""
        if not self.allows(Right("list", "deployments", "apps")):
            return None
        found = self._read("list Deployments in all namespaces", self._apps.list_deployment_for_all_namespaces)
        return [_template("Deployment", item) for item in found.items]

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
        found = self._read(
            f"list Pods in {namespace}", self._core.list_namespaced_pod, namespace, label_selector=label_selector
        )
        return [_pod(item) for item in found.items]

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        """The PVs of the JuiceFS CSI driver."""
        found = self._read("list PersistentVolumes", self._core.list_persistent_volume)
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

    def storage_classes(self) -> Sequence[StorageClass]:
        """The StorageClasses of the JuiceFS CSI driver."""
        from kubernetes.client import StorageV1Api

        found = self._read("list StorageClasses", StorageV1Api(self._api).list_storage_class)
        secret = "csi.storage.k8s.io/node-publish-secret-"  # noqa: S105  the name of a parameter
        return [
            StorageClass(
                name=item.metadata.name,
                secret_namespace=(item.parameters or {}).get(f"{secret}namespace", ""),
                secret_name=(item.parameters or {}).get(f"{secret}name", ""),
                mount_options=tuple(item.mount_options or ()),
            )
            for item in found.items
            if item.provisioner == _CSI_DRIVER
        ]

    def driver_mount_options(self) -> Sequence[str]:
        """The `mountOptions` of every `mountPodPatch` in the driver's ConfigMap; none where there is no ConfigMap."""
        import yaml

        action = f"get ConfigMap {self.namespace}/{CSI_CONFIG_MAP}"
        found = self._find(action, self._core.read_namespaced_config_map, CSI_CONFIG_MAP, self.namespace)
        try:
            content = yaml.safe_load(((found and found.data) or {}).get("config.yaml", "")) or {}
            return [
                str(option)
                for patch in content.get("mountPodPatch") or ()
                for option in patch.get("mountOptions") or ()
            ]
        except (yaml.YAMLError, AttributeError, TypeError):
            raise PermanentError(
                f"ConfigMap {self.namespace}/{CSI_CONFIG_MAP}: config.yaml is not of the driver's form.",
                next_step="correct it; the driver cannot read it either",
            ) from None

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        """Run a command in a pod over a WebSocket of its own.

        Raises:
            PermanentError: The connection's user may not exec here.
            TransientError: It could not be started, the connection was lost, or it did not end in time; in the
                last two cases it may still be running.
        """
        from websocket import WebSocketException

        where = f"{command[0]} in pod {self.namespace}/{pod}"
        deadline = time.monotonic() + timeout_s
        socket = self._open_exec(pod, container, command, where, stdin=bool(stdin))
        try:
            if stdin:
                socket.write_stdin(stdin.encode())
            while socket.is_open() and time.monotonic() < deadline:
                socket.update(timeout=min(1.0, max(0.0, deadline - time.monotonic())))
            if socket.is_open():
                raise LostAnswerError(
                    f"{where} did not end within {timeout_s:g} s.",
                    state="it may still be running there",
                    next_step="the task tries again; every step observes before it acts",
                )
            stdout, stderr = (read().decode(errors="replace") for read in (socket.read_stdout, socket.read_stderr))
            return ExecResult(_exit_code(socket, where, stderr), stdout, stderr)
        except (WebSocketException, OSError):
            raise _connection_lost(where) from None
        finally:
            with suppress(WebSocketException, OSError):
                socket.close()

    def _open_exec(self, pod: str, container: str, command: Sequence[str], where: str, *, stdin: bool) -> Any:
        """The WebSocket of an exec, opened within `_REQUEST_TIMEOUT_S`: the client itself would wait for ever."""
        from kubernetes import client, stream

        # stream() swaps the request method of its client: one client per call keeps threads apart.
        api = client.CoreV1Api(client.ApiClient(self._api.configuration))
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        too_late = threading.Event()

        def connect() -> None:
            try:
                socket = stream.stream(
                    api.connect_get_namespaced_pod_exec,
                    pod,
                    self.namespace,
                    container=container,
                    command=list(command),
                    stdin=stdin,
                    stdout=True,
                    stderr=True,
                    tty=False,
                    binary=True,
                    _preload_content=False,
                )
                socket.sock.settimeout(_REQUEST_TIMEOUT_S)
                answer.put(socket)
                if too_late.is_set():
                    socket.close()
            except Exception as error:  # noqa: BLE001  the client raises ApiException, WebSocket and socket errors here
                answer.put(error)

        threading.Thread(target=connect, name="exec", daemon=True).start()
        try:
            opened = answer.get(timeout=_REQUEST_TIMEOUT_S)
        except queue.Empty:
            too_late.set()
            raise LostAnswerError(
                f"Could not start {where}: no answer within {_REQUEST_TIMEOUT_S} s.",
                state="the command may yet be run",
                next_step="the task observes and tries again",
            ) from None
        if isinstance(opened, Exception):
            raise _not_started(opened, where, self.namespace)
        return opened

    def lease(self, name: str) -> Lease | None:
        """Read a Lease of the namespace."""
        action = f"get Lease {self.namespace}/{name}"
        found = self._find(action, self._coordination.read_namespaced_lease, name, self.namespace)
        return _lease(found) if found else None

    def write_lease(self, lease: Lease) -> bool:
        """Create the Lease, or replace it with its resourceVersion tested; a 409 is an answer, never tried again."""
        from kubernetes.client import ApiException

        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": lease.name,
                "namespace": self.namespace,
                **({"resourceVersion": lease.resource_version} if lease.resource_version else {}),
            },
            "spec": {
                "holderIdentity": lease.holder,
                "leaseDurationSeconds": lease.duration_s,
                # The API server takes times with exactly six digits, which the client's own serialiser may leave out.
                "acquireTime": lease.acquired_at.isoformat(timespec="microseconds"),
                "renewTime": lease.renewed_at.isoformat(timespec="microseconds"),
                "leaseTransitions": lease.transitions,
            },
        }
        name = [lease.name] if lease.resource_version else []
        api = self._coordination
        write = api.replace_namespaced_lease if lease.resource_version else api.create_namespaced_lease
        with self._explained(f"write Lease {self.namespace}/{lease.name}"):
            try:
                write(*name, self.namespace, body, _request_timeout=_REQUEST_TIMEOUT_S)
            except ApiException as error:
                # 404: it was deleted since it was read.
                if error.status == 409 or (error.status == 404 and lease.resource_version):
                    return False
                raise
        return True

    def dump(self, kind: DumpKind) -> Sequence[Mapping[str, Any]]:
        """Objects as the API server sends them; of claims and volumes those of the JuiceFS CSI driver alone."""
        from kubernetes.client import StorageV1Api

        storage = StorageV1Api(self._api)
        namespaced = {
            "pods": self._core.list_namespaced_pod,
            "events": self._core.list_namespaced_event,
            "statefulsets": self._apps.list_namespaced_stateful_set,
            "daemonsets": self._apps.list_namespaced_daemon_set,
        }
        clusterwide = {
            "persistentvolumes": self._core.list_persistent_volume,
            "persistentvolumeclaims": self._core.list_persistent_volume_claim_for_all_namespaces,
            "csidrivers": storage.list_csi_driver,
            "csinodes": storage.list_csi_node,
        }
        if kind in namespaced:
            found = self._read(f"list {kind} in {self.namespace}", namespaced[kind], self.namespace)
        else:
            found = self._read(f"list {kind}", clusterwide[kind])
        items: list[dict[str, Any]] = self._api.sanitize_for_serialization(found.items)
        if kind == "persistentvolumes":
            return [item for item in items if item["spec"].get("csi", {}).get("driver") == _CSI_DRIVER]
        if kind == "persistentvolumeclaims":
            ours = {(volume.claim_namespace, volume.claim_name) for volume in self.persistent_volumes()}
            return [item for item in items if (item["metadata"]["namespace"], item["metadata"]["name"]) in ours]
        return items

    def log_tail(self, pod: str, lines: int = 20, container: str = "") -> str:
        """The last lines of a pod's log; an explanation where it cannot be read."""
        try:
            action = f"read the log of Pod {self.namespace}/{pod}"
            more = {"container": container} if container else {}
            read = self._core.read_namespaced_pod_log
            # As bytes: the client's own reading of a text is the `repr` of them, in which a line never ends.
            answer = self._read(action, read, pod, self.namespace, tail_lines=lines, _preload_content=False, **more)
            return str(answer.data.decode(errors="replace"))
        except (PermanentError, TransientError) as error:
            return f"(no log: {error.problem})"


def _may_pass(error: BaseException) -> bool:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    if isinstance(error, ApiException):
        return error.status == 429 or (error.status or 0) >= 500
    return isinstance(error, HTTPError)


def _pause_s(state: RetryCallState) -> float:
    """Seconds to the next try: what the server asks for, within reason, else twice as long as before."""
    error = state.outcome.exception() if state.outcome else None
    asked = (getattr(error, "headers", None) or {}).get("Retry-After", "")
    return min(float(asked) if asked.isdecimal() else 0.25 * 2 ** (state.attempt_number - 1), _LONGEST_PAUSE_S)


def _not_started(error: Exception, where: str, namespace: str) -> PermanentError | TransientError:
    """What a refused handshake means.

    The client fails over its own ApiException then, which is left in the context; its text holds the answer's
    headers and body.
    """
    refusal = error if hasattr(error, "reason") else error.__context__
    found = re.search(r"Handshake status (\d+)", str(getattr(refusal, "reason", "")))
    status = found[1] if found else str(getattr(refusal, "status", "") or "")
    kind = PermanentError if status in {"401", "403"} else TransientError
    return kind(
        f"Could not start {where} ({f'Kubernetes answered {status}' if status else type(refusal or error).__name__}).",
        state="the command was not run",
        next_step="apply deploy/rbac.yaml: pods/exec needs get and create"
        if kind is PermanentError
        else f"kubectl -n {namespace} get pods",
    )


def _lease(item: Any) -> Lease:
    spec = item.spec
    made: datetime = item.metadata.creation_timestamp
    return Lease(
        name=item.metadata.name,
        holder=spec.holder_identity or "",
        duration_s=spec.lease_duration_seconds or 0,
        acquired_at=spec.acquire_time or made,
        renewed_at=spec.renew_time or spec.acquire_time or made,
        transitions=spec.lease_transitions or 0,
        resource_version=item.metadata.resource_version,
    )


def _connection_lost(where: str) -> LostAnswerError:
    return LostAnswerError(
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


def _args(template: Any) -> tuple[str, ...]:
    return tuple(arg for box in template.spec.containers for arg in [*(box.command or []), *(box.args or [])])


def _template(kind: str, item: Any) -> WorkloadTemplate:
    template = item.spec.template
    boxes = [*(template.spec.containers or ()), *(template.spec.init_containers or ())]
    variables = [one.value_from.secret_key_ref for box in boxes for one in box.env or () if one.value_from]
    variables += [one.secret_ref for box in boxes for one in box.env_from or ()]
    volumes = [one.secret.secret_name for one in template.spec.volumes or () if one.secret]
    return WorkloadTemplate(
        kind=kind,
        namespace=item.metadata.namespace,
        name=item.metadata.name,
        annotations={
            **(item.metadata.annotations or {}),
            **((template.metadata and template.metadata.annotations) or {}),
        },
        secrets=frozenset([*(ref.name for ref in variables if ref), *volumes]),
        args=_args(template),
    )


def _pod(item: Any) -> Pod:
    statuses = (item.status and item.status.container_statuses) or []
    waiting = [status for status in statuses if status.state and status.state.waiting and status.state.waiting.reason]
    conditions = (item.status and item.status.conditions) or []
    return Pod(
        namespace=item.metadata.namespace,
        name=item.metadata.name,
        uid=item.metadata.uid,
        node=item.spec.node_name or "",
        ready=any(row.type == "Ready" and row.status == "True" for row in conditions)
        and not item.metadata.deletion_timestamp,
        restarts=sum(status.restart_count for status in statuses),
        problem=waiting[0].state.waiting.reason if waiting else "",
        labels=dict(item.metadata.labels or {}),
        commands=tuple(" ".join([*(box.command or []), *(box.args or [])]) for box in item.spec.containers),
        claims=tuple(
            volume.persistent_volume_claim.claim_name
            for volume in item.spec.volumes or []
            if volume.persistent_volume_claim
        ),
        annotations=dict(item.metadata.annotations or {}),
        waiting_container=waiting[0].name if waiting else "",
        unready_since=next(
            (row.last_transition_time for row in conditions if row.type == "Ready" and row.status != "True"), None
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

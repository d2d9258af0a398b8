"""The Kubernetes cluster, through Airflow's KubernetesHook."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.adapters.kubernetes.exec import PodExec
from include.juicefs_storage.adapters.kubernetes.leases import Leases
from include.juicefs_storage.adapters.kubernetes.objects import container_args, rollout, to_pod, to_secret, to_template
from include.juicefs_storage.adapters.kubernetes.requests import REQUEST_TIMEOUT_S, Requests
from include.juicefs_storage.errors import PermanentError, TransientError
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

_CSI_DRIVER = "csi.juicefs.com"
_MERGE_PATCH = "application/merge-patch+json"


class KubernetesCluster:
    """`ports.Cluster`, seen from one namespace.

    Args:
        api_client: A client of the Kubernetes API.
        namespace: The CSI driver's.
        is_away: Whether a read that fails need not be tried again: others have just waited in vain.
    """

    def __init__(self, api_client: ApiClient, namespace: str, is_away: Callable[[], bool] = lambda: False) -> None:
        from kubernetes import client

        self.namespace = namespace
        self._requests = Requests(api_client, namespace, is_away)
        self._api = self._requests.api
        self._core = client.CoreV1Api(self._api)
        self._apps = client.AppsV1Api(self._api)
        self._auth = client.AuthorizationV1Api(self._api)
        self._exec = PodExec(self._api.configuration, namespace)
        self._leases = Leases(self._requests)

    @classmethod
    def from_connection(
        cls, conn_id: str, namespace: str, is_away: Callable[[], bool] = lambda: False
    ) -> KubernetesCluster:
        """Use an Airflow connection of type Kubernetes (in-cluster, kubeconfig, extras).

        Args:
            conn_id: The connection's id.
            namespace: The CSI driver's.
            is_away: Whether a read that fails need not be tried again: others have just waited in vain.

        Raises:
            PermanentError: There is none, or it leads to no cluster.
        """
        from airflow.providers.cncf.kubernetes.hooks.kubernetes import KubernetesHook
        from airflow.sdk.exceptions import AirflowException
        from kubernetes.client import Configuration
        from kubernetes.config import ConfigException, load_incluster_config
        from yaml import YAMLError

        # A configuration of its own: without it two connections would share one global default.
        configuration = Configuration()
        hook = KubernetesHook(kubernetes_conn_id=conn_id, client_configuration=configuration)
        try:
            with missing_connections_explained():
                api_client = hook.api_client
                if hook.is_in_cluster:
                    # With extra in_cluster the hook fills in the global default instead.
                    load_incluster_config(client_configuration=configuration)
        except (ConfigException, AirflowException, YAMLError, OSError) as error:
            # The text of the others may quote what was read, tokens included.
            why = str(error) if isinstance(error, ConfigException) else type(error).__name__
            raise PermanentError(
                f"Connection {conn_id!r}: expected the way to a cluster, found none: {why}",
                next_step="correct its kubeconfig in Airflow (Admin → Connections)",
            ) from None
        return cls(api_client, namespace, is_away)

    @classmethod
    def from_kubeconfig(cls, kubeconfig: str | None, context: str | None, namespace: str) -> KubernetesCluster:
        """Use a kubeconfig, without Airflow.

        Args:
            kubeconfig: Its file; None: $KUBECONFIG or ~/.kube/config, and in a pod its service account.
            context: Its context; None: the current one.
            namespace: The CSI driver's.

        Raises:
            PermanentError: There is none, or it cannot be used.
        """
        from kubernetes.client import ApiClient, Configuration
        from kubernetes.config import ConfigException, load_incluster_config, new_client_from_config

        try:
            api_client = new_client_from_config(config_file=kubeconfig, context=context)
        except ConfigException as error:
            try:
                if kubeconfig or context:
                    raise error from None
                configuration = Configuration()
                load_incluster_config(client_configuration=configuration)
                api_client = ApiClient(configuration)
            except ConfigException as last:
                raise PermanentError(
                    f"No kubeconfig can be used: {last}", next_step="give one with --kubeconfig"
                ) from None
        return cls(api_client, namespace)

    def allows(self, right: Right) -> bool:
        """Ask by a SelfSubjectAccessReview."""
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
        answer = self._requests.read("ask for rights", self._auth.create_self_subject_access_review, body)
        return bool(answer.status.allowed)

    def secret(self, name: str) -> SecretObject:
        """Read one Secret of the namespace."""
        action = f"get Secret {self.namespace}/{name}"
        return to_secret(self._requests.read(action, self._core.read_namespaced_secret, name, self.namespace))

    def secrets(self, label_selector: str = "") -> Sequence[SecretObject]:
        """Read the namespace's Secrets, where wanted those with a label."""
        found = self._requests.read(
            f"list Secrets in {self.namespace}",
            self._core.list_namespaced_secret,
            self.namespace,
            label_selector=label_selector,
        )
        return [to_secret(item) for item in found.items]

    def secrets_everywhere(self) -> Sequence[SecretObject] | None:
        """Read all Secrets of the cluster; None where RBAC forbids it, as deploy/rbac.yaml does."""
        if not self.allows(Right("list", "secrets")):
            return None
        found = self._requests.read("list Secrets in all namespaces", self._core.list_secret_for_all_namespaces)
        return [to_secret(item) for item in found.items]

    def patch_secret(self, secret: SecretObject, values: Mapping[str, str]) -> None:
        """Send a JSON patch that tests the resourceVersion; `add`, which also replaces, since keys may be absent."""
        patch: list[dict[str, str]] = [
            {"op": "test", "path": "/metadata/resourceVersion", "value": secret.resource_version}
        ]
        for key, value in values.items():
            path = "/data/" + key.replace("~", "~0").replace("/", "~1")
            patch.append({"op": "add", "path": path, "value": base64.b64encode(value.encode()).decode()})
        try:
            with self._requests.explained(f"patch Secret {secret.namespace}/{secret.name}"):
                self._core.patch_namespaced_secret(
                    secret.name, secret.namespace, patch, _request_timeout=REQUEST_TIMEOUT_S
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
        return self._requests.read(f"get {kind} {self.namespace}/{name}", read, name, self.namespace)

    def workload(self, kind: WorkloadKind, name: str) -> Workload:
        """Read a StatefulSet or DaemonSet; "rolled out" is what `kubectl rollout status` waits for."""
        found = self._read_workload(kind, name)
        rolled_out, progress = rollout(kind, found)
        template = found.spec.template
        return Workload(
            kind=kind,
            name=name,
            args=container_args(template),
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
            answer = self._requests.read(f"list {kind}s in {self.namespace}", read, self.namespace)
            found += [to_template(kind, item) for item in answer.items]
        return found

    def deployments_everywhere(self) -> Sequence[WorkloadTemplate] | None:
        """Read all Deployments of the cluster; None where RBAC forbids it, as deploy/rbac.yaml does."""
        if not self.allows(Right("list", "deployments", "apps")):
            return None
        found = self._requests.read("list Deployments in all namespaces", self._apps.list_deployment_for_all_namespaces)
        return [to_template("Deployment", item) for item in found.items]

    def stamp_template(self, kind: WorkloadKind, name: str, annotations: Mapping[str, str]) -> None:
        """Merge-patch the annotations of the pod template, as `kubectl rollout restart` does.

        Args:
            kind: The workload's kind.
            name: The workload's name.
            annotations: Name -> value, beside those that are there.
        """
        patch = {"spec": {"template": {"metadata": {"annotations": dict(annotations)}}}}
        call = {
            "StatefulSet": self._apps.patch_namespaced_stateful_set,
            "DaemonSet": self._apps.patch_namespaced_daemon_set,
        }[kind]
        with self._requests.explained(f"restart {kind} {self.namespace}/{name}"):
            call(name, self.namespace, patch, _content_type=_MERGE_PATCH, _request_timeout=REQUEST_TIMEOUT_S)

    def templates(self) -> Mapping[str, Any]:
        """Return the pod templates of the CSI workloads, as the API server sends them."""
        return {
            f"{kind}/{name}": self._api.sanitize_for_serialization(self._read_workload(kind, name).spec.template)
            for kind, name in CSI_WORKLOADS
        }

    def pods(self, label_selector: str = "", namespace: str | None = None) -> Sequence[Pod]:
        """Read the pods of a namespace."""
        namespace = namespace or self.namespace
        found = self._requests.read(
            f"list Pods in {namespace}", self._core.list_namespaced_pod, namespace, label_selector=label_selector
        )
        return [to_pod(item) for item in found.items]

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        """Return the PVs of the JuiceFS CSI driver."""
        found = self._requests.read("list PersistentVolumes", self._core.list_persistent_volume)
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
        """Return the StorageClasses of the JuiceFS CSI driver."""
        from kubernetes.client import StorageV1Api

        found = self._requests.read("list StorageClasses", StorageV1Api(self._api).list_storage_class)
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
        """Return the `mountOptions` of every `mountPodPatch` in the driver's ConfigMap; none where it is absent."""
        import yaml

        action = f"get ConfigMap {self.namespace}/{CSI_CONFIG_MAP}"
        found = self._requests.find(action, self._core.read_namespaced_config_map, CSI_CONFIG_MAP, self.namespace)
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
        """Run a command in a pod. See `PodExec.run`.

        Args:
            pod: The pod's name.
            container: Its container.
            command: The command and its arguments; no secret, since the API server's audit log shows it.
            stdin: Its standard input.
            timeout_s: How long it may run, in seconds.
        """
        return self._exec.run(pod, container, command, stdin=stdin, timeout_s=timeout_s)

    def lease(self, name: str) -> Lease | None:
        """Read a Lease of the namespace."""
        return self._leases.read(name)

    def write_lease(self, lease: Lease) -> bool:
        """Create or replace a Lease, see `Leases.write`."""
        return self._leases.write(lease)

    def dump(self, kind: DumpKind) -> Sequence[Mapping[str, Any]]:
        """Return objects as the API server sends them; of claims and volumes those of the JuiceFS CSI driver alone."""
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
            found = self._requests.read(f"list {kind} in {self.namespace}", namespaced[kind], self.namespace)
        else:
            found = self._requests.read(f"list {kind}", clusterwide[kind])
        items: list[dict[str, Any]] = self._api.sanitize_for_serialization(found.items)
        if kind == "persistentvolumes":
            return [item for item in items if item["spec"].get("csi", {}).get("driver") == _CSI_DRIVER]
        if kind == "persistentvolumeclaims":
            ours = {(volume.claim_namespace, volume.claim_name) for volume in self.persistent_volumes()}
            return [item for item in items if (item["metadata"]["namespace"], item["metadata"]["name"]) in ours]
        return items

    def log_tail(self, pod: str, lines: int = 20, container: str = "", since_s: float | None = None) -> str:
        """Read the last lines of a pod's log; return an explanation where it cannot be read.

        Args:
            pod: The pod's name.
            lines: How many lines.
            container: Its container; empty: the only one.
            since_s: Only lines of so many seconds; None: all.
        """
        try:
            action = f"read the log of Pod {self.namespace}/{pod}"
            more: dict[str, Any] = {"container": container} if container else {}
            if since_s is not None:
                more["since_seconds"] = max(1, round(since_s))
            read = self._core.read_namespaced_pod_log
            # As bytes: the client's own reading of a text is the `repr` of them, in which a line never ends.
            answer = self._requests.read(
                action, read, pod, self.namespace, tail_lines=lines, _preload_content=False, **more
            )
            return str(answer.data.decode(errors="replace"))
        except (PermanentError, TransientError) as error:
            return f"(no log: {error.problem})"

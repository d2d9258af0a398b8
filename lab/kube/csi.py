"""A JuiceFS CSI installation: its objects, and what csi-node does when pods that use a volume come and go."""

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
import shlex
import string
import uuid
from pathlib import Path

from lab.kube.pods import Kubelet
from lab.kube.store import (
    CLAIMS,
    CONFIG_MAPS,
    CSI_DRIVERS,
    CSI_NODES,
    DAEMON_SETS,
    NAMESPACES,
    NODES,
    PODS,
    SECRETS,
    STATEFUL_SETS,
    STORAGE_CLASSES,
    VOLUMES,
    ApiError,
    Obj,
    Resource,
    Store,
    not_found,
)

DRIVER = "csi.juicefs.com"
NAMESPACE = "juicefs"
APPS = "apps"
SECRET = "juicefs-sc-secret"  # noqa: S105 (an object's name)
NODE_NAMES = ("node-1", "node-2")
_POLL_S = 0.1
_CLI = "/usr/local/bin/juicefs"
_IMAGE = "juicedata/juicefs-csi-driver:v0.32.4"
_MOUNT_IMAGE = "juicedata/mount:ce-v1.4.2"
_PROBE_S = 3.0


class Csi:
    """The driver. `volume` holds the Secret's values (name, metaurl, storage, …), or None for no volume at all."""

    def __init__(self, store: Store, kubelet: Kubelet, volume: dict[str, str] | None, heartbeat_s: int) -> None:
        self.store, self.kubelet, self.volume, self.heartbeat_s = store, kubelet, volume, heartbeat_s

    def install(self) -> None:
        """Create the objects of the installation, a volume, a claim and two business pods that use it."""
        for name in ("default", "kube-system", NAMESPACE, APPS):
            self._create(NAMESPACES, name, status={"phase": "Active"}, spec={"finalizers": ["kubernetes"]})
        for name in NODE_NAMES:
            self._node(name)
        self._create(
            CSI_DRIVERS, DRIVER, spec={"attachRequired": False, "podInfoOnMount": True, "fsGroupPolicy": "File"}
        )
        self._create(CONFIG_MAPS, "juicefs-csi-driver-config", NAMESPACE, data={"config.yaml": "mountPodPatch: []\n"})
        self._workload(STATEFUL_SETS, "juicefs-csi-controller", ["--leader-election"])
        self._workload(DAEMON_SETS, "juicefs-csi-node", ["--enable-manager=true"])
        if self.volume is None:
            return
        data = {key: base64.b64encode(value.encode()).decode() for key, value in self.volume.items()}
        self._create(SECRETS, SECRET, NAMESPACE, data=data, type="Opaque")
        stages = ("provisioner", "node-publish", "controller-expand")
        parameters = {f"csi.storage.k8s.io/{s}-secret-name": SECRET for s in stages}
        parameters |= {f"csi.storage.k8s.io/{s}-secret-namespace": NAMESPACE for s in stages}
        self._create(
            STORAGE_CLASSES,
            "juicefs-sc",
            provisioner=DRIVER,
            parameters=parameters,
            reclaimPolicy="Retain",
            volumeBindingMode="Immediate",
        )
        options = [f"heartbeat={self.heartbeat_s}", "no-usage-report", "cache-size=512", "metrics=127.0.0.1:0"]
        # A client dumps the metadata into the store every hour, first some minutes after it started: at any time in a
        # test that shows that nothing was written.
        options.append("backup-meta=0")
        handle = f"pvc-{uuid.uuid4()}"
        claim = {"kind": "PersistentVolumeClaim", "apiVersion": "v1", "namespace": APPS, "name": "data"}
        common = {"accessModes": ["ReadWriteMany"], "storageClassName": "juicefs-sc", "volumeMode": "Filesystem"}
        source = {
            "driver": DRIVER,
            "volumeHandle": handle,
            "fsType": "juicefs",
            "volumeAttributes": {"subPath": handle, "storage.kubernetes.io/csiProvisionerIdentity": DRIVER},
            "nodePublishSecretRef": {"name": SECRET, "namespace": NAMESPACE},
        }
        size = {"capacity": {"storage": "10Gi"}}
        volume = common | size | {"csi": source, "claimRef": claim, "mountOptions": options}
        retain = {"persistentVolumeReclaimPolicy": "Retain"}
        self._create(VOLUMES, handle, spec=volume | retain, status={"phase": "Bound"})
        request = {"resources": {"requests": {"storage": "10Gi"}}, "volumeName": handle}
        bound = {"phase": "Bound", "accessModes": ["ReadWriteMany"]} | size
        self._create(CLAIMS, "data", APPS, spec=common | request, status=bound)
        for number, node in enumerate(NODE_NAMES, start=1):
            self._create(PODS, f"app-{number}", APPS, spec=_business_pod(node))

    async def publish(self, pod: Obj) -> dict[str, Path]:
        """Mount a starting pod's volumes; return the machine's folders by volume name. Wait without a deadline."""
        folders: dict[str, Path] = {}
        meta = pod["metadata"]
        for volume in pod["spec"].get("volumes", []):
            if "emptyDir" in volume:
                folders[volume["name"]] = self.kubelet.state / "pods" / meta["uid"] / "volumes" / volume["name"]
                folders[volume["name"]].mkdir(parents=True)
            if "persistentVolumeClaim" in volume:
                claim_name = volume["persistentVolumeClaim"]["claimName"]
                source = await self._bound_source(meta["namespace"], claim_name)
                folders[volume["name"]] = await self._publish_volume(pod, source)
        return folders

    async def unpublish(self, pod: Obj) -> None:
        """Takes back what a pod used: its mount pods go with their last user, a mount pod's own mount with itself."""
        if _is_mount_pod(pod):
            path = str(self.mount_path(pod))
            await _quietly("umount", "-l", path)
            await _quietly("rmdir", path)
            self._replace_mount_pod(pod)
            return
        for mount_pod in self.store.list(PODS, NAMESPACE):
            keys = [k for k, target in _references(mount_pod).items() if f"/pods/{pod['metadata']['uid']}/" in target]
            if not keys:
                continue

            def forget(new: Obj, keys: list[str] = keys) -> None:
                for key in keys:
                    del new["metadata"]["annotations"][key]

            left = self.store.amend(PODS, mount_pod, forget)
            if left and not _references(left) and "deletionTimestamp" not in left["metadata"]:
                self.store.mark_deleted(left, left["spec"]["terminationGracePeriodSeconds"])

    def _replace_mount_pod(self, pod: Obj) -> None:
        """What the driver does when a mount pod goes that still has users: the same commands under a new name."""
        meta = (self.store.find(PODS, NAMESPACE, pod["metadata"]["name"]) or pod)["metadata"]
        alive = {p["metadata"]["uid"] for p in self.store.list(PODS) if "deletionTimestamp" not in p["metadata"]}
        users = {k: t for k, t in _references({"metadata": meta}).items() if t.split("/")[5] in alive}
        if not users:
            return
        suffix = _suffix()
        renamed = json.loads(json.dumps(pod["spec"]).replace(f"-{meta['name'][-6:]}", f"-{suffix}"))
        annotations = {
            k: v for k, v in meta["annotations"].items() if k in users or not v.startswith("/var/lib/kubelet/")
        }
        new = {"name": meta["name"][:-6] + suffix, "namespace": NAMESPACE, "labels": meta["labels"]}
        self.store.create(PODS, {"metadata": new | {"annotations": annotations}, "spec": renamed})

    async def serving(self, pod: Obj) -> bool:
        """Whether a pod is ready: a mount pod when its mount answers, any other at once."""
        if not _is_mount_pod(pod):
            return True
        try:
            # In a thread and with a deadline: a call into a dying FUSE mount may hang.
            async with asyncio.timeout(_PROBE_S):
                return await asyncio.to_thread(_answers, self.mount_path(pod))
        except TimeoutError:
            return False

    def mount_path(self, mount_pod: Obj) -> Path:
        """The machine's path of a mount pod's mount."""
        meta = mount_pod["metadata"]
        return self.kubelet.jfs / f"{meta['labels']['volume-id']}-{meta['name'][-6:]}"

    async def _bound_source(self, namespace: str, claim_name: str) -> Obj:
        while True:
            claim = self.store.find(CLAIMS, namespace, claim_name) or {}
            volume = self.store.find(VOLUMES, "", claim.get("spec", {}).get("volumeName", ""))
            if volume and volume["spec"].get("csi", {}).get("driver") == DRIVER:
                source: Obj = {"mountOptions": volume["spec"].get("mountOptions", [])} | volume["spec"]["csi"]
                return source
            await asyncio.sleep(_POLL_S)

    async def _publish_volume(self, pod: Obj, source: Obj) -> Path:
        node, unique_id = pod["spec"]["nodeName"], source["volumeHandle"]
        target = f"/var/lib/kubelet/pods/{pod['metadata']['uid']}/volumes/kubernetes.io~csi/{unique_id}/mount"
        while True:
            # kubelet calls the driver on its node: without a running csi-node nothing gets mounted.
            if not self._csi_node_runs(node):
                await asyncio.sleep(_POLL_S)
                continue
            try:
                name = self._ensure_mount_pod(node, source, target)
            except ApiError as e:
                self.kubelet.event(pod, "FailedMount", f"MountVolume.SetUp failed: {e}", kind="Warning")
                await asyncio.sleep(1)
                continue
            while (mount := self.store.find(PODS, NAMESPACE, name)) and "deletionTimestamp" not in mount["metadata"]:
                if any(status["ready"] for status in mount["status"].get("containerStatuses", [])):
                    path: Path = self.mount_path(mount) / source.get("volumeAttributes", {}).get("subPath", "")
                    await asyncio.to_thread(path.mkdir, exist_ok=True)
                    return path
                await asyncio.sleep(_POLL_S)

    def _csi_node_runs(self, node: str) -> bool:
        return any(
            pod["metadata"].get("labels", {}).get("app") == "juicefs-csi-node"
            and pod["spec"].get("nodeName") == node
            and self.kubelet.running(pod["metadata"]["uid"])
            for pod in self.store.list(PODS, NAMESPACE)
        )

    def _ensure_mount_pod(self, node: str, source: Obj, target: str) -> str:
        """The name of the mount pod of this node, volume and setting, made where there is none; notes its new user."""
        unique_id, ref = source["volumeHandle"], source["nodePublishSecretRef"]
        secret = self.store.get(SECRETS, ref["namespace"], ref["name"])
        values = {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
        options = source["mountOptions"]
        digest = hashlib.sha256(json.dumps([values, options], sort_keys=True).encode()).hexdigest()[:63]
        key = "juicefs-" + hashlib.sha256(target.encode()).hexdigest()[:46]
        self._refresh_secret(unique_id, values)
        for pod in self.store.list(PODS, NAMESPACE):
            labels = pod["metadata"].get("labels", {})
            same = labels.get("volume-id") == unique_id and labels.get("juicefs-hash") == digest
            if same and pod["spec"].get("nodeName") == node and "deletionTimestamp" not in pod["metadata"]:
                self.store.amend(
                    PODS, pod, lambda new: new["metadata"].setdefault("annotations", {}).update({key: target})
                )
                return str(pod["metadata"]["name"])
        suffix = _suffix()
        name = f"juicefs-{node}-{unique_id}-{suffix}"
        metadata = {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {"app.kubernetes.io/name": "juicefs-mount", "volume-id": unique_id, "juicefs-hash": digest},
            "annotations": {"juicefs-uniqueid": unique_id, key: target},
        }
        mount_path = f"/jfs/{unique_id}-{suffix}"
        script = f"{_format_command(values)}\n{_mount_command(mount_path, options)}"
        secret_name = f"juicefs-{unique_id}-secret"
        self.store.create(
            PODS, {"metadata": metadata, "spec": _mount_spec(node, unique_id, script, mount_path, secret_name)}
        )
        return name

    def _refresh_secret(self, unique_id: str, values: dict[str, str]) -> None:
        name = f"juicefs-{unique_id}-secret"
        setting: Obj = {"name": values["name"], "metaurl": values["metaurl"], "secretkey": values.get("secret-key", "")}
        setting |= {"uniqueId": unique_id, "storage": values.get("storage", ""), "isCe": True}
        plain = {"metaurl": values["metaurl"], "jfsSettings": json.dumps(setting)}
        if values.get("secret-key"):
            plain["secretkey"] = values["secret-key"]
        data = {key: base64.b64encode(value.encode()).decode() for key, value in plain.items()}
        old = self.store.find(SECRETS, NAMESPACE, name)
        if old is None:
            self._create(SECRETS, name, NAMESPACE, labels={"juicefs/secret": "true"}, data=data)
        else:
            self.store.amend(SECRETS, old, lambda new: new.update(data=data))

    def _node(self, name: str) -> None:
        labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
        condition = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "kubelet is posting ready"}
        addresses = [{"type": "InternalIP", "address": self.kubelet.ip}, {"type": "Hostname", "address": name}]
        self._create(NODES, name, labels=labels, spec={}, status={"conditions": [condition], "addresses": addresses})
        self._create(CSI_NODES, name, spec={"drivers": [{"name": DRIVER, "nodeID": name, "topologyKeys": None}]})

    def _workload(self, resource: Resource, name: str, flags: list[str]) -> None:
        labels = {"app": name, "app.kubernetes.io/name": "juicefs-csi-driver", "app.kubernetes.io/instance": "juicefs"}
        env = [
            {"name": "CSI_ENDPOINT", "value": "unix:///var/lib/csi/sockets/pluginproxy/csi.sock"},
            {"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
            {"name": "JUICEFS_MOUNT_NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}},
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "JUICEFS_MOUNT_PATH", "value": "/var/lib/juicefs/volume"},
        ]
        container = {
            "name": "juicefs-plugin",
            "image": _IMAGE,
            "args": ["--endpoint=$(CSI_ENDPOINT)", "--logtostderr", "--nodeid=$(NODE_NAME)", *flags],
            "env": env,
            "securityContext": {"privileged": True},
            "volumeMounts": [{"name": "jfs-dir", "mountPath": "/jfs", "mountPropagation": "Bidirectional"}],
        }
        spec = {
            "containers": [container],
            "volumes": [_jfs_dir()],
            "serviceAccountName": f"{name}-sa",
            "terminationGracePeriodSeconds": 30,
        }
        template = {"metadata": {"labels": labels}, "spec": spec}
        workload: Obj = {"selector": {"matchLabels": labels}, "template": template}
        if resource == STATEFUL_SETS:
            workload |= {"replicas": 1, "serviceName": name}
        self._create(resource, name, NAMESPACE, labels=labels, spec=workload)

    def _create(
        self,
        resource: Resource,
        name: str,
        namespace: str = "",
        *,
        labels: dict[str, str] | None = None,
        **rest: object,
    ) -> None:
        metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
        self.store.create(resource, {"metadata": metadata | ({"labels": labels} if labels else {})} | rest)


def _format_command(values: dict[str, str]) -> str:
    """The driver's: it leaves the setting alone only where the Secret says nothing about the store."""
    if not values.get("name") or not values.get("metaurl"):
        raise not_found(SECRETS, "name or metaurl")
    words = [_CLI, "format"]
    if not values.get("storage") or not values.get("bucket"):
        words.append("--no-update")
    words += [f"--{key}={shlex.quote(values[key])}" for key in ("storage", "bucket", "access-key") if values.get(key)]
    if values.get("secret-key"):
        words.append("--secret-key=${secretkey}")
    return " ".join([*words, "${metaurl}", shlex.quote(values["name"])])


def _mount_command(mount_path: str, options: list[str]) -> str:
    joined = ",".join([*options, "cache-dir=/var/jfsCache"])
    return f"exec /bin/mount.juicefs ${{metaurl}} {mount_path} -o {shlex.quote(joined)}"


def _mount_spec(node: str, unique_id: str, script: str, mount_path: str, secret_name: str) -> Obj:
    keys = ("metaurl", "secretkey")
    refs = [{"name": k, "valueFrom": {"secretKeyRef": {"name": secret_name, "key": k}}} for k in keys]
    hook = ["sh", "-c", f"umount {mount_path} -l; rmdir {mount_path}; exit 0"]
    container = {
        "name": "jfs-mount",
        "image": _MOUNT_IMAGE,
        "command": ["sh", "-c", script],
        "env": [{"name": "JFS_INSIDE_CONTAINER", "value": "1"}, *refs, {"name": "JFS_FOREGROUND", "value": "1"}],
        "securityContext": {"privileged": True, "runAsUser": 0},
        "volumeMounts": [{"name": "jfs-dir", "mountPath": "/jfs", "mountPropagation": "Bidirectional"}],
        "lifecycle": {"preStop": {"exec": {"command": hook}}},
    }
    return {
        "nodeName": node,
        "hostname": unique_id,
        "hostNetwork": True,
        "containers": [container],
        "volumes": [_jfs_dir()],
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": 10,
    }


def _suffix() -> str:
    return "".join(secrets.choice(string.ascii_lowercase) for _ in range(6))


def _jfs_dir() -> Obj:
    return {"name": "jfs-dir", "hostPath": {"path": "/var/lib/juicefs/volume", "type": "DirectoryOrCreate"}}


def _business_pod(node: str) -> Obj:
    container = {
        "name": "app",
        "image": "debian:bookworm-slim",
        "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    return {"nodeName": node, "containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 5}


def _is_mount_pod(pod: Obj) -> bool:
    return bool(pod["metadata"].get("labels", {}).get("app.kubernetes.io/name") == "juicefs-mount")


def _answers(mount: Path) -> bool:
    try:
        # Opened, not looked at: the kernel knows the attributes of a mount for a second after its process died.
        # The mount option prefix-internal renames it.
        return any((mount / name).read_bytes() for name in (".config", ".jfs.config") if (mount / name).exists())
    except OSError:
        return False


def _references(mount_pod: Obj) -> dict[str, str]:
    """The users of a mount pod: annotations whose value is where the user has it mounted."""
    annotations = mount_pod["metadata"].get("annotations", {}) if _is_mount_pod(mount_pod) else {}
    return {k: v for k, v in annotations.items() if k.startswith("juicefs-") and v.startswith("/var/lib/kubelet/")}


async def _quietly(*command: str) -> None:
    """Run a clean-up command that fails only where there is nothing to clean."""
    with contextlib.suppress(OSError):
        quiet = asyncio.subprocess.DEVNULL
        await (await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)).wait()

"""A JuiceFS CSI installation: its objects, and what csi-node does when pods that use a volume come and go."""

import asyncio
import base64
import contextlib
import os
import uuid
from pathlib import Path

from lab.kube.fuse import FuseDescriptors
from lab.kube.mount_pods import (
    FUSE_VOLUME,
    UPGRADE_LABEL,
    Setting,
    is_mount_pod,
    jfs_dir,
    mount_path,
    pod_name,
    reference_key,
    users,
)
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
    Change,
    Obj,
    Resource,
    Store,
)

DRIVER = "csi.juicefs.com"
NAMESPACE = "juicefs"
APPS = "apps"
SECRET = "juicefs-sc-secret"  # noqa: S105 (an object's name)
#: How many nodes there are, unless a test asks for fewer: `node-1` and so on.
NODES_HERE = 2
_POLL_S = 0.1
#: The driver's default; they elect a leader among them.
CONTROLLERS = 2
#: How long a mount pod that completed stays, as the driver takes to see it.
_COMPLETED_S = 2.0
_IMAGE = "juicedata/juicefs-csi-driver:v0.32.4"
_PROBE_S = 3.0


class Csi:
    """The driver.

    Args:
        store: Where its objects are.
        kubelet: Runs its pods.
        volume: The Secret's values (name, metaurl, storage, …), or None for no volume at all.
        heartbeat_s: Of the mounts.
        nodes: How many there are, each with a business pod that uses the volume.
        keeps_fuse: Whether csi-node keeps the FUSE descriptors of mount pods, as from driver 0.25 on.
    """

    def __init__(
        self,
        store: Store,
        kubelet: Kubelet,
        volume: dict[str, str] | None,
        heartbeat_s: int,
        *,
        nodes: int = NODES_HERE,
        keeps_fuse: bool = False,
    ) -> None:
        self.store, self.kubelet, self.volume, self.heartbeat_s = store, kubelet, volume, heartbeat_s
        self.nodes = [f"node-{number}" for number in range(1, nodes + 1)]
        self.fuse = FuseDescriptors(kubelet.state / "fuse") if keeps_fuse else None
        self._tasks: set[asyncio.Task[None]] = set()
        store.listeners.append(self._on_change)

    def install(self) -> None:
        """Create the objects of the installation, a volume, a claim and the business pods that use it."""
        for name in ("default", "kube-system", NAMESPACE, APPS):
            self._create(NAMESPACES, name, status={"phase": "Active"}, spec={"finalizers": ["kubernetes"]})
        for name in self.nodes:
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
        for number, node in enumerate(self.nodes, start=1):
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
                bound = await self._bound_volume(meta["namespace"], claim_name)
                folders[volume["name"]] = await self._publish_volume(pod, bound)
            if self.fuse and volume["name"] == FUSE_VOLUME:
                folders[FUSE_VOLUME] = self.fuse.folder(meta["labels"][UPGRADE_LABEL])
                # The driver does it: a client that hands its descriptor over looks at no mount point, which may hang.
                with contextlib.suppress(FileExistsError):
                    os.mkdir(self.mount_path(pod))  # noqa: PTH102  pathlib looks at what is there
        return folders

    async def unpublish(self, pod: Obj) -> None:
        """Take back what a pod used: its mount pods go with their last user, a mount pod's own mount with itself."""
        if is_mount_pod(pod):
            if not self._successor(pod):
                await self._replace(pod)
            return
        for mount_pod in self.store.list(PODS, NAMESPACE):
            keys = [k for k, target in users(mount_pod).items() if f"/pods/{pod['metadata']['uid']}/" in target]
            if not keys:
                continue

            def forget(new: Obj, keys: list[str] = keys) -> None:
                for key in keys:
                    del new["metadata"]["annotations"][key]

            left = self.store.amend(PODS, mount_pod, forget)
            if left and not users(left) and "deletionTimestamp" not in left["metadata"]:
                self.store.mark_deleted(left, left["spec"]["terminationGracePeriodSeconds"])

    def _on_change(self, change: Change) -> None:
        """Replace a mount pod that completed, as the last act of a smooth upgrade; the driver needs seconds for it."""
        pod, old = change.obj, change.old or {}
        ended = pod.get("status", {}).get("phase") == "Succeeded" != old.get("status", {}).get("phase")
        if change.resource == PODS and ended and is_mount_pod(pod):
            task = asyncio.create_task(self._replace_completed(pod))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _replace_completed(self, pod: Obj) -> None:
        await asyncio.sleep(_COMPLETED_S)
        if not self._successor(pod):
            await self._replace(pod, completed=True)
        newest = self.store.find(PODS, NAMESPACE, pod["metadata"]["name"])
        if newest and "deletionTimestamp" not in newest["metadata"]:
            self.store.mark_deleted(newest, newest["spec"]["terminationGracePeriodSeconds"])

    async def _unmount(self, mount_pod: Obj) -> None:
        path = str(self.mount_path(mount_pod))
        await _quietly("umount", "-l", path)
        await _quietly("rmdir", path)

    def _successor(self, pod: Obj) -> bool:
        """Return whether another mount pod has this one's path already."""
        path, uid = mount_path(pod), pod["metadata"]["uid"]
        others = (other for other in self.store.list(PODS, NAMESPACE) if other["metadata"]["uid"] != uid)
        return any(
            is_mount_pod(o) and mount_path(o) == path for o in others if "deletionTimestamp" not in o["metadata"]
        )

    async def _replace(self, pod: Obj, *, completed: bool = False) -> None:
        """Put another mount pod in the place of one that ended: its mount goes on where csi-node keeps it.

        Args:
            pod: The one that ended.
            completed: It handed its open files over, as the last act of a smooth upgrade.
        """
        key = pod["metadata"]["labels"].get(UPGRADE_LABEL, "")
        goes_on = bool(self.fuse and self.fuse.keeps(key))
        if self.fuse and not completed:
            self.fuse.forget_state(key)
        if not goes_on:
            await self._unmount(pod)
        if not self._make_again(pod, self.fuse.environment(key) if self.fuse and completed else {}) and goes_on:
            if self.fuse:
                self.fuse.stop(key)
            await self._unmount(pod)

    def _make_again(self, pod: Obj, more: dict[str, str]) -> bool:
        """Make a mount pod that still has users again: a new name, the old path, the command by the Secret as it is.

        Args:
            pod: The one that ended.
            more: Variables of the new one.

        Returns:
            False where it has no users.
        """
        meta = (self.store.find(PODS, NAMESPACE, pod["metadata"]["name"]) or pod)["metadata"]
        alive = {p["metadata"]["uid"] for p in self.store.list(PODS) if "deletionTimestamp" not in p["metadata"]}
        left = {k: t for k, t in users({"metadata": meta}).items() if t.split("/")[5] in alive}
        unique_id = meta["labels"]["volume-id"]
        volume = next((v for v in self.store.list(VOLUMES) if _handle(v) == unique_id), None)
        if not left or not volume:
            return False
        setting = self._setting(volume)
        self._write_secret(setting)
        node, key = pod["spec"]["nodeName"], meta["labels"].get(UPGRADE_LABEL, "")
        new = setting.mount_pod(node, pod_name(node, unique_id), mount_path(pod), key, more)
        new["metadata"]["annotations"] |= left
        self.store.create(PODS, new | {"metadata": new["metadata"] | {"namespace": NAMESPACE}})
        return True

    async def serving(self, pod: Obj) -> bool:
        """Return whether a pod is ready: a mount pod when its mount answers, any other at once."""
        if not is_mount_pod(pod):
            return True
        try:
            # In a thread and with a deadline: a call into a dying FUSE mount may hang.
            async with asyncio.timeout(_PROBE_S):
                return await asyncio.to_thread(_answers, self.mount_path(pod))
        except TimeoutError:
            return False

    def mount_path(self, mount_pod: Obj) -> Path:
        """Return the machine's path of a mount pod's mount."""
        return self.kubelet.jfs / mount_path(mount_pod).removeprefix("/jfs/")

    async def _bound_volume(self, namespace: str, claim_name: str) -> Obj:
        while True:
            claim = self.store.find(CLAIMS, namespace, claim_name) or {}
            volume = self.store.find(VOLUMES, "", claim.get("spec", {}).get("volumeName", ""))
            if volume and volume["spec"].get("csi", {}).get("driver") == DRIVER:
                return volume
            await asyncio.sleep(_POLL_S)

    async def _publish_volume(self, pod: Obj, volume: Obj) -> Path:
        node, unique_id = pod["spec"]["nodeName"], _handle(volume)
        target = f"/var/lib/kubelet/pods/{pod['metadata']['uid']}/volumes/kubernetes.io~csi/{unique_id}/mount"
        while True:
            # kubelet calls the driver on its node: without a running csi-node nothing gets mounted.
            if not self._csi_node_runs(node):
                await asyncio.sleep(_POLL_S)
                continue
            try:
                name = self._ensure_mount_pod(node, volume, target)
            except ApiError as e:
                self.kubelet.event(pod, "FailedMount", f"MountVolume.SetUp failed: {e}", kind="Warning")
                await asyncio.sleep(1)
                continue
            while (mount := self.store.find(PODS, NAMESPACE, name)) and "deletionTimestamp" not in mount["metadata"]:
                if any(status["ready"] for status in mount["status"].get("containerStatuses", [])):
                    attributes = volume["spec"]["csi"].get("volumeAttributes", {})
                    path: Path = self.mount_path(mount) / attributes.get("subPath", "")
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

    def _ensure_mount_pod(self, node: str, volume: Obj, target: str) -> str:
        """Return the mount pod of this node, volume and setting, made where there is none; note its new user."""
        setting, key = self._setting(volume), reference_key(target)
        self._write_secret(setting)
        for pod in self.store.list(PODS, NAMESPACE):
            labels = pod["metadata"].get("labels", {})
            same = labels.get("volume-id") == setting.unique_id and labels.get("juicefs-hash") == setting.digest
            if same and pod["spec"].get("nodeName") == node and "deletionTimestamp" not in pod["metadata"]:
                self.store.amend(
                    PODS, pod, lambda new: new["metadata"].setdefault("annotations", {}).update({key: target})
                )
                return str(pod["metadata"]["name"])
        name = pod_name(node, setting.unique_id)
        new = setting.mount_pod(node, name, f"/jfs/{setting.unique_id}-{name[-6:]}")
        new["metadata"] |= {"namespace": NAMESPACE}
        new["metadata"]["annotations"][key] = target
        self.store.create(PODS, new)
        return name

    def _setting(self, volume: Obj) -> Setting:
        """Return the setting by the PersistentVolume's Secret; where that is gone, as the volume's own remembers it."""
        ref = volume["spec"]["csi"]["nodePublishSecretRef"]
        if secret := self.store.find(SECRETS, ref["namespace"], ref["name"]):
            return Setting.of(volume, _decoded(secret), keeps_fuse=self.fuse is not None)
        own = self.store.get(SECRETS, NAMESPACE, f"juicefs-{_handle(volume)}-secret")
        return Setting.remembered(volume, _decoded(own), keeps_fuse=self.fuse is not None)

    def _write_secret(self, setting: Setting) -> None:
        """Write the volume's own Secret. Its owner is the PersistentVolume, which does not control it."""
        data = {key: base64.b64encode(value.encode()).decode() for key, value in setting.secret().items()}
        old = self.store.find(SECRETS, NAMESPACE, setting.secret_name)
        if old:
            self.store.amend(SECRETS, old, lambda new: new.update(data=data))
            return
        meta = setting.volume["metadata"]
        owner = {"apiVersion": "v1", "kind": "PersistentVolume", "name": meta["name"], "uid": meta["uid"]}
        labels = {"juicefs/secret": "true"}
        owners = [owner | {"controller": False}]
        self._create(SECRETS, setting.secret_name, NAMESPACE, labels=labels, owners=owners, data=data)

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
            "volumes": [jfs_dir()],
            "serviceAccountName": f"{name}-sa",
            "terminationGracePeriodSeconds": 30,
        }
        template = {"metadata": {"labels": labels}, "spec": spec}
        workload: Obj = {"selector": {"matchLabels": labels}, "template": template}
        if resource == STATEFUL_SETS:
            workload |= {"replicas": CONTROLLERS, "serviceName": name}
        self._create(resource, name, NAMESPACE, labels=labels, spec=workload)

    def _create(
        self,
        resource: Resource,
        name: str,
        namespace: str = "",
        *,
        labels: dict[str, str] | None = None,
        owners: list[Obj] | None = None,
        **rest: object,
    ) -> None:
        given = {"namespace": namespace, "labels": labels, "ownerReferences": owners}
        self.store.create(resource, {"metadata": {"name": name} | {k: v for k, v in given.items() if v}} | rest)


def _handle(volume: Obj) -> str:
    return str(volume["spec"].get("csi", {}).get("volumeHandle", ""))


def _decoded(secret: Obj) -> dict[str, str]:
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def _business_pod(node: str) -> Obj:
    container = {
        "name": "app",
        "image": "debian:bookworm-slim",
        "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 3600 & wait; done"],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    }
    volumes = [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]
    return {"nodeName": node, "containers": [container], "volumes": volumes, "terminationGracePeriodSeconds": 5}


def _answers(mount: Path) -> bool:
    try:
        # Opened, not looked at: the kernel knows the attributes of a mount for a second after its process died.
        # The mount option prefix-internal renames it.
        return any((mount / name).read_bytes() for name in (".config", ".jfs.config") if (mount / name).exists())
    except OSError:
        return False


async def _quietly(*command: str) -> None:
    """Run a clean-up command that fails only where there is nothing to clean."""
    with contextlib.suppress(OSError):
        quiet = asyncio.subprocess.DEVNULL
        await (await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)).wait()

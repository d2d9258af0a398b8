"""The controllers of StatefulSets and DaemonSets: revisions, rolling updates one pod at a time, and their status."""

import asyncio
import copy
import hashlib
import json

from lab.kube.pods import Kubelet
from lab.kube.store import (
    DAEMON_SETS,
    NODES,
    PODS,
    REVISIONS,
    STATEFUL_SETS,
    Change,
    Obj,
    Resource,
    Store,
    random_suffix,
)

_SETTLE_S = 0.05


class Workloads:
    """Bring the pods of every workload to its template; `delay_s` is how long it takes to see a new template."""

    def __init__(self, store: Store, kubelet: Kubelet, delay_s: float) -> None:
        self.store, self.kubelet, self.delay_s = store, kubelet, delay_s
        self._wake = asyncio.Event()
        self._new_template = False
        store.listeners.append(self._on_change)

    async def run(self) -> None:
        """Reconcile until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            await asyncio.sleep(self.delay_s if self._new_template else _SETTLE_S)
            self._new_template = False
            for resource in (STATEFUL_SETS, DAEMON_SETS):
                for workload in self.store.list(resource):
                    self._reconcile(resource, workload)
            self._collect()

    def _on_change(self, change: Change) -> None:
        if change.resource in (STATEFUL_SETS, DAEMON_SETS, PODS):
            is_new = change.resource != PODS and change.obj.get("status") == (change.old or {}).get("status")
            self._new_template |= is_new
            self._wake.set()

    def _collect(self) -> None:
        """Delete the pods whose workload is gone."""
        owners = {w["metadata"]["uid"] for r in (STATEFUL_SETS, DAEMON_SETS) for w in self.store.list(r)}
        for pod in self.store.list(PODS):
            refs = pod["metadata"].get("ownerReferences", [])
            if refs and refs[0]["kind"] in ("StatefulSet", "DaemonSet") and refs[0]["uid"] not in owners:
                self._delete(pod)

    def _reconcile(self, resource: Resource, workload: Obj) -> None:
        meta = workload["metadata"]
        revision = self._revision(resource, workload)
        pods = {
            _slot(resource, pod): pod
            for pod in self.store.list(PODS, meta["namespace"])
            if any(o["uid"] == meta["uid"] for o in pod["metadata"].get("ownerReferences", []))
        }
        if resource == STATEFUL_SETS:
            self._roll_stateful_set(workload, revision, pods)
        else:
            self._roll_daemon_set(workload, revision, pods)

    def _roll_stateful_set(self, workload: Obj, revision: str, pods: dict[str, Obj]) -> None:
        name, replicas = workload["metadata"]["name"], workload["spec"]["replicas"]
        slots = [f"{name}-{ordinal}" for ordinal in range(replicas)]
        for slot in sorted(set(pods) - set(slots), reverse=True):
            self._delete(pods[slot])
        # In order: a pod that is not ready stops all progress, also towards a better template, until it is deleted.
        waits = False
        for slot in slots:
            if slot not in pods:
                self._create(STATEFUL_SETS, workload, revision, slot, "")
                waits = True
            elif not _ready(pods[slot]):
                waits = True
            if waits:
                break
        outdated = [slot for slot in reversed(slots) if slot in pods and _revision_of(pods[slot]) != revision]
        if outdated and not waits and workload["spec"]["updateStrategy"]["type"] == "RollingUpdate":
            self._delete(pods[outdated[0]])
        alive = [pods[slot] for slot in slots if slot in pods]
        updated = [pod for pod in alive if _revision_of(pod) == revision]
        ready = [pod for pod in alive if _ready(pod)]
        before = workload.get("status", {}).get("currentRevision", revision)
        done = len(updated) == len(ready) == replicas
        current = revision if done else before
        status = {
            "observedGeneration": workload["metadata"]["generation"],
            "replicas": len(alive),
            "readyReplicas": len(ready),
            "availableReplicas": len(ready),
            "currentReplicas": sum(_revision_of(pod) == current for pod in alive),
            "updatedReplicas": len(updated),
            "currentRevision": current,
            "updateRevision": revision,
            "collisionCount": 0,
        }
        self._set_status(STATEFUL_SETS, workload, status)

    def _roll_daemon_set(self, workload: Obj, revision: str, pods: dict[str, Obj]) -> None:
        nodes = [node["metadata"]["name"] for node in self.store.list(NODES)]
        for node in nodes:
            if node not in pods:
                self._create(
                    DAEMON_SETS, workload, revision, f"{workload['metadata']['name']}-{random_suffix(5)}", node
                )
        alive = [pods[node] for node in nodes if node in pods]
        updated = [pod for pod in alive if _revision_of(pod) == revision]
        ready = [pod for pod in alive if _ready(pod)]
        outdated = [pod for pod in alive if pod not in updated and "deletionTimestamp" not in pod["metadata"]]
        if workload["spec"]["updateStrategy"]["type"] == "RollingUpdate":
            for pod in outdated:
                # maxUnavailable is 1; a pod that is down anyway can go at once.
                if pod not in ready or len(ready) == len(nodes):
                    self._delete(pod)
                    break
        available = len(ready)
        status = {
            "observedGeneration": workload["metadata"]["generation"],
            "desiredNumberScheduled": len(nodes),
            "currentNumberScheduled": len(alive),
            "updatedNumberScheduled": len(updated),
            "numberMisscheduled": 0,
            "numberReady": available,
            "numberAvailable": available,
        }
        unavailable = {"numberUnavailable": len(nodes) - available} if available < len(nodes) else {}
        self._set_status(DAEMON_SETS, workload, status | unavailable)

    def _set_status(self, resource: Resource, workload: Obj, status: Obj) -> None:
        self.store.amend(resource, workload, lambda new: new.update(status=status), status=True)

    def _revision(self, resource: Resource, workload: Obj) -> str:
        """Return the name of the current template's ControllerRevision; create it where it is new."""
        meta, template = workload["metadata"], workload["spec"]["template"]
        digest = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()[:10]
        name = f"{meta['name']}-{digest}"
        if self.store.find(REVISIONS, meta["namespace"], name) is None:
            number = 1 + max((r["revision"] for r in self._revisions(workload)), default=0)
            labels = {**template["metadata"]["labels"], "controller-revision-hash": _hash_label(resource, meta, digest)}
            owned = {"name": name, "namespace": meta["namespace"], "labels": labels} | _owned_by(resource, workload)
            data = {"spec": {"template": copy.deepcopy(template) | {"$patch": "replace"}}}
            self.store.create(REVISIONS, {"metadata": owned, "data": data, "revision": number})
        return _hash_label(resource, meta, digest)

    def _revisions(self, workload: Obj) -> list[Obj]:
        meta = workload["metadata"]
        revisions = self.store.list(REVISIONS, meta["namespace"])
        return [r for r in revisions if r["metadata"]["ownerReferences"][0]["uid"] == meta["uid"]]

    def _create(self, resource: Resource, workload: Obj, revision: str, name: str, node: str) -> None:
        template = copy.deepcopy(workload["spec"]["template"])
        meta = template.setdefault("metadata", {})
        meta |= {"name": name, "namespace": workload["metadata"]["namespace"]} | _owned_by(resource, workload)
        meta["labels"] = {**meta.get("labels", {}), "controller-revision-hash": revision}
        if resource == STATEFUL_SETS:
            meta["labels"] |= {"statefulset.kubernetes.io/pod-name": name, "apps.kubernetes.io/pod-index": name[-1]}
        else:
            meta["labels"]["pod-template-generation"] = str(workload["metadata"]["generation"])
            template["spec"]["nodeName"] = node
        self.store.create(PODS, template)
        message = f"{'create Pod' if resource == STATEFUL_SETS else 'Created pod:'} {name}"
        self.kubelet.event(workload, "SuccessfulCreate", message, component=f"{resource.kind.lower()}-controller")

    def _delete(self, pod: Obj) -> None:
        if "deletionTimestamp" not in pod["metadata"]:
            self.store.mark_deleted(pod, pod["spec"]["terminationGracePeriodSeconds"])
            owner = pod["metadata"]["ownerReferences"][0]
            component = f"{owner['kind'].lower()}-controller"
            self.kubelet.event(pod, "SuccessfulDelete", f"delete Pod {pod['metadata']['name']}", component=component)


def _owned_by(resource: Resource, workload: Obj) -> Obj:
    owner = {"apiVersion": resource.api_version, "kind": resource.kind, "controller": True, "blockOwnerDeletion": True}
    return {"ownerReferences": [owner | {k: workload["metadata"][k] for k in ("name", "uid")}]}


def _hash_label(resource: Resource, meta: Obj, digest: str) -> str:
    # As the real controllers write it: the whole revision name for a StatefulSet, the bare hash for a DaemonSet.
    return f"{meta['name']}-{digest}" if resource == STATEFUL_SETS else digest


def _slot(resource: Resource, pod: Obj) -> str:
    return str(pod["metadata"]["name"] if resource == STATEFUL_SETS else pod["spec"]["nodeName"])


def _revision_of(pod: Obj) -> str:
    return str(pod["metadata"]["labels"].get("controller-revision-hash", ""))


def _ready(pod: Obj) -> bool:
    conditions = {c["type"]: c["status"] for c in pod.get("status", {}).get("conditions", [])}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]

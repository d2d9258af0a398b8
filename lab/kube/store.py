"""Kubernetes objects in memory: resource versions, conflicts, and the history that watches replay."""

import base64
import binascii
import copy
import datetime as dt
import re
import secrets
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Obj = dict[str, Any]
EventType = Literal["ADDED", "MODIFIED", "DELETED"]

HISTORY = 5000
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.:]*[a-z0-9])?")
_REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    409: "Conflict",
    410: "Expired",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
}


class ApiError(Exception):
    """An answer other than success; `body` is the Status object that a real API server sends for it."""

    def __init__(self, code: int, message: str, *, reason: str | None = None, details: Obj | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body: Obj = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason or _REASONS[code],
            "details": details or {},
            "code": code,
        }


@dataclass(frozen=True)
class Resource:
    """One served kind."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    short_names: tuple[str, ...] = ()
    subresources: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        """The value of `apiVersion`: `v1` or `group/version`."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """The name in messages: `secrets` or `statefulsets.apps`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


NAMESPACES = Resource("", "v1", "namespaces", "Namespace", False, ("ns",))
NODES = Resource("", "v1", "nodes", "Node", False, ("no",), ("status",))
PODS = Resource("", "v1", "pods", "Pod", True, ("po",), ("status", "log", "exec"))
SECRETS = Resource("", "v1", "secrets", "Secret")
CONFIG_MAPS = Resource("", "v1", "configmaps", "ConfigMap", True, ("cm",))
EVENTS = Resource("", "v1", "events", "Event", True, ("ev",))
VOLUMES = Resource("", "v1", "persistentvolumes", "PersistentVolume", False, ("pv",), ("status",))
CLAIMS = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", True, ("pvc",), ("status",))
STATEFUL_SETS = Resource("apps", "v1", "statefulsets", "StatefulSet", True, ("sts",), ("status",))
DAEMON_SETS = Resource("apps", "v1", "daemonsets", "DaemonSet", True, ("ds",), ("status",))
# Kept and served, but no controller brings pods to them: nothing of the project runs as one.
DEPLOYMENTS = Resource("apps", "v1", "deployments", "Deployment", True, ("deploy",), ("status",))
REVISIONS = Resource("apps", "v1", "controllerrevisions", "ControllerRevision")
JOBS = Resource("batch", "v1", "jobs", "Job", True, (), ("status",))
LEASES = Resource("coordination.k8s.io", "v1", "leases", "Lease")
STORAGE_CLASSES = Resource("storage.k8s.io", "v1", "storageclasses", "StorageClass", False, ("sc",))
CSI_DRIVERS = Resource("storage.k8s.io", "v1", "csidrivers", "CSIDriver", False)
CSI_NODES = Resource("storage.k8s.io", "v1", "csinodes", "CSINode", False)
ACCESS_REVIEWS = Resource("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", False)

RESOURCES = (
    NAMESPACES,
    NODES,
    PODS,
    SECRETS,
    CONFIG_MAPS,
    EVENTS,
    VOLUMES,
    CLAIMS,
    STATEFUL_SETS,
    DAEMON_SETS,
    DEPLOYMENTS,
    REVISIONS,
    JOBS,
    LEASES,
    STORAGE_CLASSES,
    CSI_DRIVERS,
    CSI_NODES,
    ACCESS_REVIEWS,
)


@dataclass(frozen=True)
class Change:
    """One committed write; `old` is the object before it, None for a new one."""

    version: int
    type: EventType
    resource: Resource
    obj: Obj
    old: Obj | None


def now() -> str:
    """Return the time as Kubernetes writes it: UTC, whole seconds."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def not_found(resource: Resource, name: str) -> ApiError:
    """Return the 404 of a missing object."""
    details = {"name": name, "group": resource.group, "kind": resource.plural}
    return ApiError(404, f'{resource.qualified} "{name}" not found', details=details)


def conflict(resource: Resource, name: str, why: str) -> ApiError:
    """Return the 409 of a failed precondition."""
    details = {"name": name, "group": resource.group, "kind": resource.plural}
    message = f'Operation cannot be fulfilled on {resource.qualified} "{name}": {why}'
    return ApiError(409, message, details=details)


def invalid(resource: Resource, name: str, field: str, why: str) -> ApiError:
    """Return the 422 of an object that fails validation."""
    details = {
        "name": name,
        "group": resource.group,
        "kind": resource.kind,
        "causes": [{"reason": "FieldValueInvalid", "message": why, "field": field}],
    }
    return ApiError(422, f'{resource.kind} "{name}" is invalid: {field}: {why}', details=details)


class Store:
    """All objects, the one counter behind resourceVersion, and the last changes.

    Objects handed out are shared: copy before changing. Listeners run in the caller, right after the commit.
    """

    def __init__(self) -> None:
        self.version = 1000
        self.history: deque[Change] = deque(maxlen=HISTORY)
        self.listeners: list[Callable[[Change], None]] = []
        self._objects: dict[tuple[Resource, str, str], Obj] = {}

    def find(self, resource: Resource, namespace: str, name: str) -> Obj | None:
        """Return the object, or None."""
        return self._objects.get((resource, namespace, name))

    def get(self, resource: Resource, namespace: str, name: str) -> Obj:
        """Return the object; ApiError 404 when there is none."""
        found = self.find(resource, namespace, name)
        if found is None:
            raise not_found(resource, name)
        return found

    def list(self, resource: Resource, namespace: str = "") -> list[Obj]:
        """Return all objects of a kind, of one namespace where it is given, ordered as a server does."""
        keys = sorted(key[1:] for key in self._objects if key[0] == resource and namespace in ("", key[1]))
        return [self._objects[(resource, *key)] for key in keys]

    def create(self, resource: Resource, obj: Obj, *, dry_run: bool = False) -> Obj:
        """Add an object; ApiError 409 AlreadyExists, 422 for a bad one, 404 for a missing namespace."""
        obj = copy.deepcopy(obj)
        meta = obj.setdefault("metadata", {})
        name = meta.get("name") or ""
        if not name and meta.get("generateName"):
            name = meta["generateName"] + random_suffix(5)
        if not name:
            raise invalid(resource, "", "metadata.name", "Required value: name or generateName is required")
        if not _NAME.fullmatch(name):
            raise invalid(resource, name, "metadata.name", "Invalid value: a lowercase RFC 1123 subdomain is required")
        if meta.get("resourceVersion"):
            raise ApiError(400, "resourceVersion should not be set on objects to be created")
        namespace = meta.get("namespace", "") if resource.namespaced else ""
        if resource.namespaced and self.find(NAMESPACES, "", namespace) is None:
            raise not_found(NAMESPACES, namespace)
        if self.find(resource, namespace, name) is not None:
            details = {"name": name, "group": resource.group, "kind": resource.plural}
            message = f'{resource.qualified} "{name}" already exists'
            raise ApiError(409, message, reason="AlreadyExists", details=details)
        meta |= {"name": name, "uid": str(uuid.uuid4()), "creationTimestamp": now()}
        if resource in (STATEFUL_SETS, DAEMON_SETS):
            meta["generation"] = 1
        obj |= {"apiVersion": resource.api_version, "kind": resource.kind}
        _normalise(resource, obj)
        if not dry_run:
            self._commit("ADDED", resource, obj, None)
        return obj

    def update(self, resource: Resource, obj: Obj, *, status: bool = False, dry_run: bool = False) -> Obj:
        """Replace an object, or its status only; ApiError 409 where the given resourceVersion or uid is another."""
        meta = obj["metadata"]
        namespace, name = (meta.get("namespace", "") if resource.namespaced else ""), meta["name"]
        old = self.get(resource, namespace, name)
        if meta.get("resourceVersion") not in (None, "", old["metadata"]["resourceVersion"]):
            why = "the object has been modified; please apply your changes to the latest version and try again"
            raise conflict(resource, name, why)
        if meta.get("uid") not in (None, "", old["metadata"]["uid"]):
            why = (
                f"Precondition failed: UID in precondition: {meta['uid']}, UID in object meta: {old['metadata']['uid']}"
            )
            raise conflict(resource, name, why)
        if status:
            new = copy.deepcopy(old) | {"status": copy.deepcopy(obj.get("status", {}))}
            new["metadata"] |= {k: copy.deepcopy(meta[k]) for k in ("labels", "annotations") if k in meta}
        else:
            new = copy.deepcopy(obj)
            if "status" in resource.subresources:
                new.pop("status", None)
                if "status" in old:
                    new["status"] = copy.deepcopy(old["status"])
            for key in ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds"):
                new["metadata"].pop(key, None)
                if key in old["metadata"]:
                    new["metadata"][key] = old["metadata"][key]
        new |= {"apiVersion": resource.api_version, "kind": resource.kind}
        _normalise(resource, new)
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        if new == old:
            return old
        if "generation" in old["metadata"] and new.get("spec") != old.get("spec"):
            new["metadata"]["generation"] = old["metadata"]["generation"] + 1
        if not dry_run:
            self._commit("MODIFIED", resource, new, old)
        return new

    def amend(self, resource: Resource, obj: Obj, change: Callable[[Obj], None], *, status: bool = False) -> Obj | None:
        """Apply a controller's change to the newest state of the object; return None when that object is gone."""
        meta = obj["metadata"]
        old = self.find(resource, meta.get("namespace", ""), meta["name"])
        if old is None or old["metadata"]["uid"] != meta["uid"]:
            return None
        new = copy.deepcopy(old)
        change(new)
        return self.update(resource, new, status=status)

    def mark_deleted(self, obj: Obj, grace_s: int) -> Obj:
        """Start a pod's graceful deletion; whoever runs the pod removes it when its processes have ended."""
        new = copy.deepcopy(obj)
        new["metadata"] |= {"deletionTimestamp": now(), "deletionGracePeriodSeconds": grace_s}
        self._commit("MODIFIED", PODS, new, obj)
        return new

    def remove(self, resource: Resource, obj: Obj) -> Obj:
        """Remove an object at once; do nothing when that very object (by uid) is already gone."""
        meta = obj["metadata"]
        old = self.find(resource, meta.get("namespace", ""), meta["name"])
        if old is None or old["metadata"]["uid"] != meta["uid"]:
            return obj
        last = copy.deepcopy(old)
        self._commit("DELETED", resource, last, old)
        return last

    def _commit(self, kind: EventType, resource: Resource, obj: Obj, old: Obj | None) -> None:
        self.version += 1
        meta = obj["metadata"]
        meta["resourceVersion"] = str(self.version)
        key = (resource, meta.get("namespace", "") if resource.namespaced else "", meta["name"])
        if kind == "DELETED":
            del self._objects[key]
        else:
            self._objects[key] = obj
        change = Change(self.version, kind, resource, obj, old)
        self.history.append(change)
        for listener in list(self.listeners):
            listener(change)


def random_suffix(length: int) -> str:
    """Return random characters as Kubernetes puts them at the end of generated names."""
    return "".join(secrets.choice("bcdfghjklmnpqrstvwxz2456789") for _ in range(length))


def _normalise(resource: Resource, obj: Obj) -> None:
    """Server-side defaults and checks, as far as the kinds here need them."""
    name = obj["metadata"]["name"]
    if resource == SECRETS:
        data = obj.setdefault("data", {}) or {}
        for key, text in (obj.pop("stringData", None) or {}).items():
            data[key] = base64.b64encode(text.encode()).decode()
        for key, value in data.items():
            try:
                base64.b64decode(value, validate=True)
            except (binascii.Error, TypeError, ValueError) as e:
                raise ApiError(400, f'Secret "{name}" cannot be handled: data["{key}"] is not base64') from e
        obj["data"] = data
        obj.setdefault("type", "Opaque")
    elif resource == PODS:
        spec = obj.get("spec") or {}
        containers = spec.get("containers") or []
        if len(containers) != 1 or not containers[0].get("name"):
            raise invalid(resource, name, "spec.containers", "Required value: exactly one named container is run here")
        spec.setdefault("restartPolicy", "Always")
        spec.setdefault("terminationGracePeriodSeconds", 30)
        obj.setdefault("status", {"phase": "Pending"})
    elif resource in (STATEFUL_SETS, DAEMON_SETS):
        spec = obj.get("spec") or {}
        labels = (spec.get("template") or {}).get("metadata", {}).get("labels") or {}
        wanted = (spec.get("selector") or {}).get("matchLabels") or {}
        if not wanted or not wanted.items() <= labels.items():
            why = "Invalid value: `selector` does not match template `labels`"
            raise invalid(resource, name, "spec.template.metadata.labels", why)
        if resource == STATEFUL_SETS:
            spec.setdefault("replicas", 1)
        spec.setdefault("updateStrategy", {"type": "RollingUpdate"})
        spec.setdefault("revisionHistoryLimit", 10)

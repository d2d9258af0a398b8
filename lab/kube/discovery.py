"""The documents by which `kubectl` and the clients learn what is served: versions, kinds, enough of OpenAPI."""

import copy

from lab.kube.store import ACCESS_REVIEWS, DAEMON_SETS, JOBS, PODS, RESOURCES, STATEFUL_SETS, Obj

_VERBS = ["create", "delete", "get", "list", "patch", "update", "watch"]
_PATCHES = ["application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json"]


def discovery(path: str) -> Obj | None:
    """Return the discovery document of a path; None for any other path."""
    return copy.deepcopy(_DOCUMENTS.get(path.rstrip("/")))


def _documents() -> dict[str, Obj]:
    served = sorted({(r.group, r.version) for r in RESOURCES})
    groups = [(group, version) for group, version in served if group]
    schemas = {_prefix(*gv)[1:]: {"serverRelativeURL": f"/openapi/v3{_prefix(*gv)}?hash=1"} for gv in served}
    documents: dict[str, Obj] = {
        "/version": {"major": "1", "minor": "34", "gitVersion": "v1.34.0", "platform": "linux/amd64"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(*gv) for gv in groups]},
        "/openapi/v3": {"paths": schemas},
    }
    for gv in served:
        documents[_prefix(*gv)] = _resource_list(*gv)
        documents[f"/openapi/v3{_prefix(*gv)}"] = _openapi(*gv)
    return documents | {f"/apis/{gv[0]}": {"kind": "APIGroup", "apiVersion": "v1"} | _group(*gv) for gv in groups}


def _prefix(group: str, version: str) -> str:
    return f"/apis/{group}/{version}" if group else f"/api/{version}"


def _group(group: str, version: str) -> Obj:
    entry = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [entry], "preferredVersion": entry}


def _resource_list(group: str, version: str) -> Obj:
    resources: list[Obj] = []
    for r in RESOURCES:
        if (r.group, r.version) != (group, version):
            continue
        verbs = ["create"] if r == ACCESS_REVIEWS else _VERBS
        entry = {"name": r.plural, "singularName": r.kind.lower(), "namespaced": r.namespaced, "kind": r.kind}
        short = {"shortNames": list(r.short_names)} if r.short_names else {}
        category = {"categories": ["all"]} if r in (PODS, STATEFUL_SETS, DAEMON_SETS, JOBS) else {}
        resources.append(entry | {"verbs": verbs} | short | category)
        for sub in r.subresources:
            kind, verbs = {"exec": ("PodExecOptions", ["create", "get"]), "log": ("Pod", ["get"])}.get(
                sub, (r.kind, ["get", "patch", "update"])
            )
            name = {"name": f"{r.plural}/{sub}", "singularName": "", "namespaced": r.namespaced, "kind": kind}
            resources.append(name | {"verbs": verbs})
    version = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}


def _openapi(group: str, version: str) -> Obj:
    """Return as much of the schema as `kubectl apply` asks for: that its patches may name a field validation."""
    paths: Obj = {}
    for r in RESOURCES:
        if (r.group, r.version) != (group, version) or r == ACCESS_REVIEWS:
            continue
        scope = "/namespaces/{namespace}" if r.namespaced else ""
        gvk = {"group": group, "version": version, "kind": r.kind}
        parameters = [
            {"name": name, "in": "query", "schema": {"type": "string"}} for name in ("dryRun", "fieldValidation")
        ]
        patch = {
            "x-kubernetes-action": "patch",
            "x-kubernetes-group-version-kind": gvk,
            "parameters": parameters,
            "requestBody": {"content": {kind: {} for kind in _PATCHES}},
            "responses": {},
        }
        paths[f"{_prefix(group, version)}{scope}/{r.plural}/{{name}}"] = {"patch": patch}
    info = {"title": "Kubernetes", "version": "v1.34.0"}
    return {"openapi": "3.0.0", "info": info, "paths": paths, "components": {"schemas": {}}}


_DOCUMENTS = _documents()

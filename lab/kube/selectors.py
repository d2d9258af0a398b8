"""Label and field selectors, as the API server reads them."""

import re
from collections.abc import Callable
from typing import Any

from lab.kube.store import EVENTS, JOBS, NAMESPACES, PODS, SECRETS, ApiError, Obj, Resource

_FIELDS = {
    PODS: (
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.schedulerName",
        "spec.serviceAccountName",
        "spec.hostNetwork",
        "status.phase",
        "status.podIP",
        "status.nominatedNodeName",
    ),
    EVENTS: (
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.resourceVersion",
        "involvedObject.fieldPath",
        "reason",
        "reportingComponent",
        "source",
        "type",
    ),
    SECRETS: ("type",),
    NAMESPACES: ("status.phase",),
    JOBS: ("status.successful",),
}
_SET = re.compile(r"\s*([^\s!=,()]+)\s+(in|notin)\s+\(([^)]*)\)\s*")


def selector(resource: Resource, name: str, labels: str, fields: str) -> Callable[[Obj], bool]:
    """Return the test that a list or watch applies to objects.

    Args:
        resource: The kind that is asked for.
        name: Of one object; empty: of any.
        labels: The request's `labelSelector`.
        fields: The request's `fieldSelector`.

    Raises:
        ApiError: 400 for a field that a real server does not select by.
    """
    label_tests = _label_tests(labels)
    wanted: list[tuple[str, bool, str]] = []
    for term in filter(None, fields.split(",")):
        found = re.fullmatch(r"([^=!]+)(=|==|!=)(.*)", term)
        allowed = ("metadata.name", "metadata.namespace", *_FIELDS.get(resource, ()))
        if not found or found[1] not in allowed:
            raise ApiError(400, f'Unable to find "{resource.qualified}" that match field selector "{term}"')
        wanted.append((found[1], found[2] != "!=", found[3]))
    if name:
        wanted.append(("metadata.name", True, name))

    def matches(obj: Obj) -> bool:
        own = obj["metadata"].get("labels") or {}
        return all(test(own) for test in label_tests) and all((_field(obj, f) == v) == same for f, same, v in wanted)

    return matches


def _field(obj: Obj, path: str) -> str:
    value: Any = obj
    for key in path.split("."):
        value = value.get(key, {}) if isinstance(value, dict) else {}
    return str(value).lower() if isinstance(value, bool) else str(value or "")


def _label_tests(selector: str) -> list[Callable[[dict[str, str]], bool]]:
    def is_among(key: str, values: set[str], wanted: bool) -> Callable[[dict[str, str]], bool]:
        return lambda own: (own.get(key) in values) == wanted

    def exists(key: str, wanted: bool) -> Callable[[dict[str, str]], bool]:
        return lambda own: (key in own) == wanted

    tests: list[Callable[[dict[str, str]], bool]] = []
    for term in filter(None, re.split(r",(?![^(]*\))", selector)):
        found = _SET.fullmatch(term)
        if found:
            tests.append(is_among(found[1], {v.strip() for v in found[3].split(",")}, found[2] == "in"))
        elif "=" in term:
            key, _, value = term.replace("==", "=").partition("=")
            tests.append(is_among(key.rstrip("!").strip(), {value.strip()}, not key.endswith("!")))
        else:
            tests.append(exists(term.strip().lstrip("!"), not term.strip().startswith("!")))
    return tests

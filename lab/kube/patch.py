"""The three kinds of patch that the clients send: JSON patch, merge patch, strategic merge patch."""

import copy
import json
from typing import Any

import jsonpatch

from lab.kube.store import ApiError, Obj

# The lists that a strategic merge patch merges by key; every other list is replaced, as the API's own tags have it.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "imagePullSecrets": "name",
    "ownerReferences": "uid",
    "conditions": "type",
}
_DIRECTIVES = ("$patch", "$retainKeys", "$setElementOrder/", "$deleteFromPrimitiveList/")


def apply_patch(content_type: str, current: Obj, body: bytes) -> Obj:
    """Return the object after the patch; `current` stays as it is.

    ApiError 400 for a body that is no patch, 415 for a kind that is not served, 422 where a JSON patch does not apply.
    """
    try:
        patch = json.loads(body)
    except ValueError as e:
        raise ApiError(400, f"error decoding patch: {e}") from e
    match content_type:
        case "application/json-patch+json":
            return _json_patch(current, patch)
        case "application/merge-patch+json":
            merged = _merge(current, patch)
        case "application/strategic-merge-patch+json":
            merged = _strategic(current, patch)
        case _:
            raise ApiError(415, f"the body of the request was in an unknown format: {content_type}")
    if not isinstance(merged, dict):
        raise ApiError(400, "a patch must be an object")
    return merged


def _json_patch(current: Obj, patch: Any) -> Obj:
    try:
        return dict(jsonpatch.JsonPatch(patch).apply(copy.deepcopy(current)))
    except jsonpatch.InvalidJsonPatch as e:
        raise ApiError(400, f"error decoding patch: {e}") from e
    except (jsonpatch.JsonPatchException, jsonpatch.JsonPointerException) as e:
        causes = [{"reason": "UnexpectedServerResponse", "message": str(e)}]
        message = "the server rejected our request due to an error in our request"
        raise ApiError(422, message, details={"causes": causes}) from e


def _merge(current: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(copy.deepcopy(current)) if isinstance(current, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merge(result.get(key), value)
    return result


def _strategic(current: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    if patch.get("$patch") == "replace":
        return {k: copy.deepcopy(v) for k, v in patch.items() if k != "$patch"}
    result = dict(copy.deepcopy(current)) if isinstance(current, dict) else {}
    for key, value in patch.items():
        if key.startswith("$deleteFromPrimitiveList/"):
            field = key.partition("/")[2]
            result[field] = [item for item in result.get(field, []) if item not in value]
        elif key.startswith(_DIRECTIVES):
            continue
        elif value is None:
            result.pop(key, None)
        elif isinstance(value, list) and key in _MERGE_KEYS:
            result[key] = _merge_list(result.get(key) or [], value, _MERGE_KEYS[key])
        else:
            result[key] = _strategic(result.get(key), value)
    return result


def _merge_list(current: list[Obj], patch: list[Obj], key: str) -> list[Obj]:
    result = copy.deepcopy(current)
    for item in patch:
        if key not in item:
            raise ApiError(400, f"map: {item} does not contain declared merge key: {key}")
        index = next((i for i, old in enumerate(result) if old.get(key) == item[key]), None)
        if item.get("$patch") == "delete":
            result = [old for old in result if old.get(key) != item[key]]
        elif index is None:
            result.append(_strategic(None, item))
        else:
            result[index] = _strategic(result[index], item)
    return result

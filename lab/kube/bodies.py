"""The bodies of requests: JSON, and the one protobuf message that `kubectl` insists on."""

import json

from aiohttp import web

from lab.kube.store import ApiError, Obj


async def json_body(request: web.Request) -> Obj:
    """Return the object of a request; ApiError 415 for another type, 400 for what is no object."""
    if request.content_type not in ("application/json", "application/octet-stream", "text/plain"):
        raise ApiError(415, f"the body of the request was in an unknown format: {request.content_type}")
    try:
        body = json.loads(await request.read() or b"{}")
    except ValueError as e:
        raise ApiError(400, f"the object provided is unrecognized: {e}") from e
    if not isinstance(body, dict):
        raise ApiError(400, "the object provided is unrecognized: not an object")
    return body


async def review_spec(request: web.Request) -> Obj:
    """Return the spec of an access review, sent as JSON or as protobuf."""
    if request.content_type != "application/vnd.kubernetes.protobuf":
        spec: Obj = (await json_body(request)).get("spec", {})
        return spec
    # `kubectl auth can-i` speaks protobuf only: an envelope (magic, then the object as field 2), in it the spec as
    # field 2, in that the resource attributes as field 1, whose fields are strings in this order.
    names = ("namespace", "verb", "group", "version", "resource", "subresource", "name")
    envelope = _fields_of((await request.read()).removeprefix(b"k8s\0"))
    attributes = _fields_of(_fields_of(_fields_of(envelope.get(2, b"")).get(2, b"")).get(1, b""))
    return {"resourceAttributes": {name: attributes.get(i, b"").decode() for i, name in enumerate(names, start=1)}}


def _fields_of(message: bytes) -> dict[int, bytes]:
    """Return the length-delimited fields of a protobuf message by number; ApiError 400 for any other wire type."""
    fields: dict[int, bytes] = {}
    rest = memoryview(message)

    def varint() -> int:
        nonlocal rest
        value = shift = 0
        while rest:
            byte, rest = rest[0], rest[1:]
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return value

    while rest:
        key = varint()
        if key & 7 != 2:
            raise ApiError(400, "the object provided is unrecognized: not an access review")
        length = varint()
        fields[key >> 3], rest = bytes(rest[:length]), rest[length:]
    return fields

"""The HTTP side: discovery, CRUD, patches, watches, selectors, logs, exec, access reviews, audit and ordered faults."""

import asyncio
import datetime as dt
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path

from aiohttp import web

from lab.kube.bodies import json_body, review_spec
from lab.kube.discovery import discovery
from lab.kube.exec import serve_exec, serve_program
from lab.kube.faults import Faults
from lab.kube.patch import apply_patch
from lab.kube.pods import Kubelet
from lab.kube.selectors import selector
from lab.kube.store import (
    ACCESS_REVIEWS,
    PODS,
    RESOURCES,
    ApiError,
    Change,
    Obj,
    Resource,
    Store,
    conflict,
)
from lab.kube.table import pod_table
from lab.kube.upgrade import PROGRAM, Program

_BOOKMARK_S = 30.0


@dataclass
class Asked:
    """What a request asks for, as authorization and audit see it."""

    verb: str
    resource: Resource
    namespace: str
    name: str
    subresource: str
    command: list[str] = field(default_factory=list)


class _DropError(Exception):
    """The connection is to be cut."""


class Api:
    """The request handler of the server."""

    def __init__(
        self, store: Store, kubelet: Kubelet, faults: Faults, token: str, audit: Path, csi_program: Program
    ) -> None:
        self.store, self.kubelet, self.faults, self._csi_program = store, kubelet, faults, csi_program
        self._token, self._audit = token, audit
        self._by_path = {(r.group, r.version, r.plural): r for r in RESOURCES}
        self._watchers: set[asyncio.Queue[Change | None]] = set()
        store.listeners.append(self._on_change)

    def application(self) -> web.Application:
        """Build the aiohttp application."""
        app = web.Application(client_max_size=8 * 2**20)
        app.router.add_route("*", "/{path:.*}", self._handle)
        return app

    def close(self) -> None:
        """End the watches, so that the server can stop."""
        for queue in self._watchers:
            queue.put_nowait(None)

    def _on_change(self, change: Change) -> None:
        for queue in self._watchers:
            queue.put_nowait(change)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        try:
            if request.path in ("/healthz", "/livez", "/readyz"):
                return web.Response(text="ok")
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            if scheme.lower() != "bearer" or token != self._token:
                raise ApiError(401, "Unauthorized")
            if request.path.startswith("/lab/"):
                return await self._lab(request)
            found = discovery(request.path)
            if found is not None:
                return web.json_response(found)
            return await self._resource(request)
        except ApiError as e:
            return _error(e)
        except _DropError:
            if request.transport:
                request.transport.abort()
            raise ConnectionResetError from None

    async def _lab(self, request: web.Request) -> web.Response:
        if request.path != "/lab/faults":
            raise ApiError(404, "the server could not find the requested resource")
        if request.method == "DELETE":
            self.faults.clear()
        else:
            fault = await request.json()
            try:
                if "kill" in fault:
                    pod = self.store.get(PODS, fault.get("namespace", "juicefs"), fault["kill"])
                    self.kubelet.kill(pod["metadata"]["uid"])
                else:
                    self.faults.order(fault)
            except ValueError as e:
                raise ApiError(400, str(e)) from e
        return web.json_response({})

    async def _resource(self, request: web.Request) -> web.StreamResponse:
        asked = self._parse(request)
        started, code = dt.datetime.now(dt.UTC), 0

        def audit() -> None:
            entry = {
                "time": started.isoformat(),
                "user_agent": request.headers.get("User-Agent", ""),
                "verb": asked.verb,
                "group": asked.resource.group,
                "resource": asked.resource.plural,
                "subresource": asked.subresource,
                "namespace": asked.namespace,
                "name": asked.name,
                "code": code,
                "command": asked.command,
                "dry_run": "dryRun" in request.query,
            }
            with self._audit.open("a") as file:
                file.write(json.dumps(entry) + "\n")

        try:
            self._authorize(asked)
            action = self.faults.action(asked.verb, asked.resource.plural, asked.name, asked.subresource)
            await asyncio.sleep(action.get("delay_s", 0))
            if action.get("drop") == "before":
                raise _DropError
            if "status" in action:
                raise _ordered(action, asked)
            if asked.verb in ("watch", "connect"):
                # These end with the connection: an audit trail that waited for that would miss those under way.
                code = 101 if asked.verb == "connect" else 200
                audit()
            response = await self._serve(request, asked)
            code = response.status
            if action.get("drop") == "after":
                raise _DropError
        except ApiError as e:
            code = e.code
            raise
        finally:
            if asked.verb not in ("watch", "connect") or code >= 400 or code == 0:
                audit()
        return response

    def _parse(self, request: web.Request) -> Asked:
        parts = request.path.strip("/").split("/")
        if parts[0] == "api" and len(parts) > 2:
            group, version, rest = "", parts[1], parts[2:]
        elif parts[0] == "apis" and len(parts) > 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            raise ApiError(404, "the server could not find the requested resource")
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2:
            namespace, rest = rest[1], rest[2:]
        resource = self._by_path.get((group, version, rest[0]))
        name = rest[1] if len(rest) > 1 else ""
        subresource = rest[2] if len(rest) > 2 else ""
        if resource is None or len(rest) > 3 or (subresource and subresource not in resource.subresources):
            raise ApiError(404, "the server could not find the requested resource")
        methods = {"GET": "get" if name else "list", "POST": "create", "PUT": "update", "PATCH": "patch"}
        methods["DELETE"] = "delete" if name else "deletecollection"
        verb = methods.get(request.method, "")
        if subresource == "exec":
            return Asked("connect", resource, namespace, name, subresource, request.query.getall("command", []))
        if verb == "list" and _on(request.query.get("watch")):
            verb = "watch"
        wrong = (verb == "create" and name) or (resource == ACCESS_REVIEWS and verb != "create")
        if verb in ("", "deletecollection") or wrong:
            raise ApiError(405, "the server does not allow this method on the requested resource")
        return Asked(verb, resource, namespace, name, subresource)

    def _authorize(self, asked: Asked) -> None:
        resource = asked.resource
        verb = "create" if asked.verb == "connect" else asked.verb
        plural = f"{resource.plural}/{asked.subresource}" if asked.subresource else resource.plural
        if resource != ACCESS_REVIEWS and self.faults.denied(verb, resource.group, plural):
            where = f' in the namespace "{asked.namespace}"' if asked.namespace else " at the cluster scope"
            name = f' "{asked.name}"' if asked.name else ""
            message = (
                f'{resource.qualified}{name} is forbidden: User "lab" cannot {verb} resource "{plural}" '
                f'in API group "{resource.group}"{where}'
            )
            details = {"name": asked.name, "group": resource.group, "kind": resource.plural}
            raise ApiError(403, message, details=details)

    async def _serve(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        resource, namespace, name = asked.resource, asked.namespace, asked.name
        dry_run = "dryRun" in request.query
        match asked.verb, asked.subresource:
            case "watch", _:
                return await self._watch(request, asked)
            case "connect", _:
                return await self._exec(request, asked)
            case "get", "log":
                return await self._log(request, asked)
            case "get", _:
                answer = self.store.get(resource, namespace, name)
                answer = pod_table([answer], "") if _wants_table(request, asked) else answer
            case "list", _:
                answer = self._list(request, asked)
                if _wants_table(request, asked):
                    answer = pod_table(answer["items"], answer["metadata"]["resourceVersion"])
            case "create", _:
                answer = await self._create(request, asked, dry_run=dry_run)
            case (("update" | "patch"), _):
                answer = await self._change(request, asked, dry_run=dry_run)
            case _:
                answer = await self._delete(request, asked, dry_run=dry_run)
        return web.json_response(answer, status=201 if asked.verb == "create" else 200)

    async def _create(self, request: web.Request, asked: Asked, *, dry_run: bool) -> Obj:
        resource, namespace = asked.resource, asked.namespace
        if resource == ACCESS_REVIEWS:
            return self._review(await review_spec(request))
        body = await json_body(request)
        meta = body.setdefault("metadata", {})
        if body.get("kind") not in (None, resource.kind):
            raise ApiError(400, f"{body['kind']} cannot be handled as a {resource.kind}")
        if meta.get("namespace") not in (None, "", namespace):
            raise ApiError(400, "the namespace of the provided object does not match the namespace sent on the request")
        if resource.namespaced:
            meta["namespace"] = namespace
        return self.store.create(resource, body, dry_run=dry_run)

    async def _change(self, request: web.Request, asked: Asked, *, dry_run: bool) -> Obj:
        resource, namespace, name = asked.resource, asked.namespace, asked.name
        current = self.store.get(resource, namespace, name)
        if asked.verb == "update":
            new = await json_body(request)
        else:
            new = apply_patch(request.content_type, current, await request.read())
        meta = new.setdefault("metadata", {})
        if (meta.get("name"), meta.get("namespace") or namespace) != (name, namespace):
            raise ApiError(400, "the name or namespace of the object does not match the URL")
        if resource.namespaced:
            meta["namespace"] = namespace
        return self.store.update(resource, new, status=bool(asked.subresource), dry_run=dry_run)

    async def _delete(self, request: web.Request, asked: Asked, *, dry_run: bool) -> Obj:
        current = self.store.get(asked.resource, asked.namespace, asked.name)
        options = await json_body(request) if request.can_read_body else {}
        meta = current["metadata"]
        for key, value in (options.get("preconditions") or {}).items():
            if value not in (None, meta[key]):
                why = f"Precondition failed: {key} in precondition: {value}, in object meta: {meta[key]}"
                raise conflict(asked.resource, asked.name, why)
        if asked.resource == PODS:
            grace = request.query.get("gracePeriodSeconds", options.get("gracePeriodSeconds"))
            grace_s = current["spec"]["terminationGracePeriodSeconds"] if grace is None else int(grace)
            if dry_run or (grace_s and "deletionTimestamp" in meta):
                return current
            return self.store.mark_deleted(current, grace_s) if grace_s else self.store.remove(PODS, current)
        if not dry_run:
            self.store.remove(asked.resource, current)
        details = {"name": asked.name, "group": asked.resource.group, "kind": asked.resource.plural, "uid": meta["uid"]}
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}

    def _list(self, request: web.Request, asked: Asked) -> Obj:
        matches = _selector(request, asked)
        return {
            "kind": f"{asked.resource.kind}List",
            "apiVersion": asked.resource.api_version,
            "metadata": {"resourceVersion": str(self.store.version)},
            "items": [obj for obj in self.store.list(asked.resource, asked.namespace) if matches(obj)],
        }

    async def _watch(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        matches, query = _selector(request, asked), request.query
        since = query.get("resourceVersion", "")
        initial, version = _on(query.get("sendInitialEvents")), self.store.version
        if initial or since in ("", "0"):
            objects = self.store.list(asked.resource, asked.namespace)
            events = [("ADDED", obj) for obj in objects if matches(obj)]
        else:
            events = self._replay(int(since), asked, matches)
        queue: asyncio.Queue[Change | None] = asyncio.Queue()
        self._watchers.add(queue)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        deadline = time.monotonic() + float(query.get("timeoutSeconds", 1800))

        table = _wants_table(request, asked)

        async def send(kind: str, obj: Obj) -> None:
            if table and kind != "BOOKMARK":
                obj = pod_table([obj], obj["metadata"]["resourceVersion"])
            await response.write(json.dumps({"type": kind, "object": obj}).encode() + b"\n")

        try:
            await response.prepare(request)
            for kind, obj in events:
                await send(kind, obj)
            if initial:
                await send("BOOKMARK", _bookmark(asked, version, {"k8s.io/initial-events-end": "true"}))
            while (left := deadline - time.monotonic()) > 0:
                try:
                    async with asyncio.timeout(min(left, _BOOKMARK_S)):
                        change = await queue.get()
                except TimeoutError:
                    if _on(query.get("allowWatchBookmarks")):
                        await send("BOOKMARK", _bookmark(asked, self.store.version))
                    continue
                if change is None:
                    break
                for kind, obj in _seen(change, asked, matches):
                    await send(kind, obj)
        except ConnectionError:
            pass
        finally:
            self._watchers.discard(queue)
        return response

    def _replay(self, since: int, asked: Asked, matches: Callable[[Obj], bool]) -> list[tuple[str, Obj]]:
        history = self.store.history
        if len(history) == history.maxlen and since < history[0].version - 1:
            raise ApiError(410, f"too old resource version: {since} ({history[0].version})")
        return [event for change in history if change.version > since for event in _seen(change, asked, matches)]

    def _pod_container(self, request: web.Request, asked: Asked) -> Obj:
        pod = self.store.get(PODS, asked.namespace, asked.name)
        wanted = request.query.get("container", "")
        if wanted not in ("", pod["spec"]["containers"][0]["name"]):
            raise ApiError(400, f"container {wanted} is not valid for pod {asked.name}")
        return pod

    async def _exec(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        pod = self._pod_container(request, asked)
        running = self.kubelet.running(pod["metadata"]["uid"])
        if running is None:
            container = pod["spec"]["containers"][0]["name"]
            message = f'Internal error occurred: unable to upgrade connection: container not found ("{container}")'
            raise ApiError(500, message)

        def delete_pod() -> None:
            self.store.remove(PODS, pod)

        command = request.query.getall("command", [])
        if pod["metadata"].get("labels", {}).get("app") == "juicefs-csi-node" and command[:1] == [PROGRAM]:
            return await serve_program(request, self._csi_program(pod, command))
        return await serve_exec(request, running, self.faults.exec(), delete_pod)

    async def _log(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        pod, query = self._pod_container(request, asked), request.query
        uid, statuses = pod["metadata"]["uid"], pod.get("status", {}).get("containerStatuses", [])
        restart = statuses[0]["restartCount"] if statuses else 0
        container = pod["spec"]["containers"][0]["name"]
        if _on(query.get("previous")):
            restart -= 1
        path = self.kubelet.log_path(uid, restart)
        if not path.exists() and not _on(query.get("previous")):
            # As the kubelet: while the next container waits to start, the log is that of the one that ended.
            path = self.kubelet.log_path(uid, restart - 1)
        if not path.exists():
            state = statuses[0]["state"].get("waiting", {}).get("reason", "") if statuses else "Pending"
            if _on(query.get("previous")):
                why = f'previous terminated container "{container}" in pod "{asked.name}" not found'
            else:
                why = f'container "{container}" in pod "{asked.name}" is waiting to start: {state}'
            raise ApiError(400, why)
        since = query.get("sinceTime", "")
        if "sinceSeconds" in query:
            start = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=int(query["sinceSeconds"]))
            since = start.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        stamps = _on(query.get("timestamps"))

        def text(lines: list[str]) -> bytes:
            kept = [line.split(" ", 3) for line in lines]
            return "".join((f"{t} " if stamps else "") + f"{line}\n" for t, _, _, line in kept if t >= since).encode()

        lines = path.read_text().split("\n")[:-1]
        seen = len(lines)
        if "tailLines" in query:
            lines = lines[-int(query["tailLines"]) :] if int(query["tailLines"]) else []
        body = text(lines)
        if not _on(query.get("follow")):
            limit = query.get("limitBytes")
            return web.Response(body=body[: int(limit)] if limit else body, content_type="text/plain")
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        try:
            await response.write(body)
            alive = True
            while alive and request.transport and not request.transport.is_closing():
                # Asked before the last read, so that the last lines of an ended container are sent too.
                alive = self.kubelet.running(uid) is not None
                lines = path.read_text().split("\n")[:-1]
                await response.write(text(lines[seen:])) if lines[seen:] else None
                seen = len(lines)
                await asyncio.sleep(0.2)
        except ConnectionError:
            pass
        return response

    def _review(self, spec: Obj) -> Obj:
        asked = spec.get("resourceAttributes", {})
        plural = asked.get("resource", "")
        if asked.get("subresource"):
            plural = f"{plural}/{asked['subresource']}"
        allowed = not self.faults.denied(asked.get("verb", ""), asked.get("group", ""), plural)
        return {
            "kind": ACCESS_REVIEWS.kind,
            "apiVersion": ACCESS_REVIEWS.api_version,
            "metadata": {},
            "spec": spec,
            "status": {"allowed": allowed},
        }


def _wants_table(request: web.Request, asked: Asked) -> bool:
    """`kubectl get` asks for a table; only of pods is there more to say than name and age, which it knows itself."""
    return asked.resource == PODS and "as=Table" in request.headers.get("Accept", "")


def _selector(request: web.Request, asked: Asked) -> Callable[[Obj], bool]:
    query = request.query
    return selector(asked.resource, asked.name, query.get("labelSelector", ""), query.get("fieldSelector", ""))


def _seen(change: Change, asked: Asked, matches: Callable[[Obj], bool]) -> list[tuple[str, Obj]]:
    """Return what a watcher with a selector sees of a change: entering it is ADDED, leaving it is DELETED."""
    if change.resource != asked.resource or asked.namespace not in ("", change.obj["metadata"].get("namespace", "")):
        return []
    is_in = matches(change.obj) and change.type != "DELETED"
    was_in = change.old is not None and matches(change.old)
    if is_in:
        return [("MODIFIED" if was_in else "ADDED", change.obj)]
    return [("DELETED", change.obj)] if was_in else []


def _bookmark(asked: Asked, version: int, annotations: dict[str, str] | None = None) -> Obj:
    meta: Obj = {"resourceVersion": str(version)} | ({"annotations": annotations} if annotations else {})
    return {"kind": asked.resource.kind, "apiVersion": asked.resource.api_version, "metadata": meta}


def _on(value: str | None) -> bool:
    """Read a query flag: kubectl writes `true` or `1`, the Python client `True`."""
    return value in ("true", "True", "1")


def _error(error: ApiError) -> web.Response:
    after = error.body["details"].get("retryAfterSeconds")
    headers = {"Retry-After": str(after)} if after else None
    return web.json_response(error.body, status=error.code, headers=headers)


def _ordered(action: Obj, asked: Asked) -> ApiError:
    code = int(action["status"])
    if code == 409:
        why = "the object has been modified; please apply your changes to the latest version and try again"
        return conflict(asked.resource, asked.name, why)
    details = {"retryAfterSeconds": action["retry_after"]} if "retry_after" in action else {}
    return ApiError(code, HTTPStatus(code).phrase, details=details)

"""An S3 store in memory that takes any key, as the big stores do.

SeaweedFS and MinIO keep objects under paths: they refuse `..` and parts longer than 255 bytes, and fold `//`. What
clients make of such keys shows here only. Signatures are not verified.
"""

import email.utils
import hashlib
import threading
import time
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote

from lab.s3_wire import contents, list_page, unframed

_KEPT = {"content-type", "cache-control", "content-disposition", "content-encoding", "content-language", "expires"}


@dataclass(frozen=True)
class Object:
    """What lies under a key."""

    body: bytes
    etag: str
    headers: dict[str, str] = field(default_factory=dict)
    modified_s: float = field(default_factory=time.time)

    def entry(self, key: str, *, encoded: bool) -> str:
        """Return an object's part of a listing."""
        modified = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.modified_s))
        return contents(key, len(self.body), self.etag, modified, encoded=encoded)


class MemoryStore(ThreadingHTTPServer):
    """Buckets on 127.0.0.1, served while the `with` block lasts.

    Attributes:
        buckets: Key -> object by bucket's name; to be filled and read by tests as they like.
        requests: Counted by method.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, *buckets: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, Object]] = {bucket: {} for bucket in buckets}
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.requests: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """Where clients reach it."""
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, bucket: str, key: str, body: bytes, **headers: str) -> None:
        """Store an object."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        with self.lock:
            self.buckets[bucket][key] = Object(body, hashlib.md5(body, usedforsecurity=False).hexdigest(), named)

    def bodies(self, bucket: str) -> dict[str, bytes]:
        """Key -> content."""
        with self.lock:
            return {key: found.body for key, found in self.buckets[bucket].items()}

    def __enter__(self) -> Self:
        """Serve."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that goes away: that is no error of the store's."""


class _Handler(BaseHTTPRequestHandler):
    server: MemoryStore
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        store = self.server
        path, _, text = self.requestline.split(" ")[1].partition("?")
        self.bucket, _, key = unquote(path[1:]).partition("/")
        self.text = text
        self.query = {name: values[0] for name, values in parse_qs(text, keep_blank_values=True).items()}
        body = self._body()
        with store.lock:
            store.requests[self.command] += 1
            objects = store.buckets.get(self.bucket)
            if objects is None:
                self._refuse(404, "NoSuchBucket")
            elif len(key.encode()) > 1024:
                self._refuse(400, "KeyTooLongError")
            elif not key:
                self._list(objects)
            elif self.command in {"GET", "HEAD"}:
                self._get(objects, key)
            elif self.command == "PUT":
                self._put(objects, key, body)
            elif self.command == "POST":
                self._complete(objects, key)
            else:
                self._delete(objects, key)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815  http.server's names

    def _body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:
            # No store keeps half of what was announced.
            self.close_connection = True
            raise ConnectionError("a body that was cut")
        if not body or not self.headers.get("x-amz-content-sha256", "").startswith("STREAMING-"):
            return body
        return unframed(body)

    def _list(self, objects: dict[str, Object]) -> None:
        if "location" in self.query:
            self._xml("<LocationConstraint></LocationConstraint>")
            return
        self._xml(list_page(sorted(objects), self.text, lambda key, encoded: objects[key].entry(key, encoded=encoded)))

    def _get(self, objects: dict[str, Object], key: str) -> None:
        found = objects.get(key)
        if found is None:
            self._refuse(404, "NoSuchKey")
            return
        if self.headers.get("If-Match", found.etag).strip('"') != found.etag:
            self._refuse(412, "PreconditionFailed")
            return
        body, headers, status = found.body, {"ETag": f'"{found.etag}"', **found.headers}, 200
        headers["Last-Modified"] = email.utils.formatdate(found.modified_s, usegmt=True)
        if (wanted := self.headers.get("Range")) and body:
            first, _, end = wanted.removeprefix("bytes=").partition("-")
            stop = min(int(end) + 1 if end else len(body), len(body))
            headers["Content-Range"] = f"bytes {first}-{stop - 1}/{len(body)}"
            body, status = body[int(first) : stop], 206
        self._answer(status, body, headers)

    def _put(self, objects: dict[str, Object], key: str, body: bytes) -> None:
        if "uploadId" in self.query:
            self.server.uploads[self.query["uploadId"]][int(self.query["partNumber"])] = body
            self._answer(200, b"", {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'})
            return
        if self.headers.get("If-None-Match") == "*" and key in objects:
            self._refuse(412, "PreconditionFailed")
            return
        kept = {name: value for name, value in self.headers.items() if self._is_kept(name)}
        if origin := self.headers.get("x-amz-copy-source"):
            bucket, _, source = unquote(origin).removeprefix("/").partition("/")
            found = self.server.buckets.get(bucket, {}).get(source)
            if found is None:
                self._refuse(404, "NoSuchKey")
                return
            objects[key] = Object(found.body, hashlib.md5(found.body, usedforsecurity=False).hexdigest(), found.headers)
            self._xml(f"<CopyObjectResult><ETag>&quot;{objects[key].etag}&quot;</ETag></CopyObjectResult>")
            return
        objects[key] = Object(body, hashlib.md5(body, usedforsecurity=False).hexdigest(), kept)
        self._answer(200, b"", {"ETag": f'"{objects[key].etag}"'})

    def _is_kept(self, name: str) -> bool:
        return name.lower() in _KEPT or name.lower().startswith("x-amz-meta-")

    def _complete(self, objects: dict[str, Object], key: str) -> None:
        if "uploads" in self.query:
            upload = f"upload-{len(self.server.uploads)}-{time.monotonic_ns()}"
            self.server.uploads[upload] = {}
            self._xml(f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>")
            return
        parts = [body for _, body in sorted(self.server.uploads.pop(self.query["uploadId"]).items())]
        digests = b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in parts)
        etag = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
        objects[key] = Object(b"".join(parts), etag)
        self._xml(f"<CompleteMultipartUploadResult><ETag>&quot;{etag}&quot;</ETag></CompleteMultipartUploadResult>")

    def _delete(self, objects: dict[str, Object], key: str) -> None:
        if "uploadId" in self.query:
            self.server.uploads.pop(self.query["uploadId"], None)
        else:
            objects.pop(key, None)
        self._answer(204, b"", {})

    def _refuse(self, status: int, code: str) -> None:
        self._xml(f"<Error><Code>{code}</Code><Message>{code}</Message></Error>", status)

    def _xml(self, text: str, status: int = 200) -> None:
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
        self._answer(status, body, {"Content-Type": "application/xml"})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing."""


class SkippingStore(MemoryStore):
    """Lists as MinIO of mid-2025: after a start key that is no key, the key behind the first page is left out."""

    def __init__(self, *buckets: str) -> None:
        super().__init__(*buckets)
        self.RequestHandlerClass = _SkippingHandler


class _SkippingHandler(_Handler):
    def _list(self, objects: dict[str, Object]) -> None:
        start, keys = self.query.get("start-after"), sorted(objects)
        if start and start not in objects and "continuation-token" not in self.query:
            # The token is the first key of the next page instead of the last one of this page.
            at = bisect_right(keys, start) + int(self.query["max-keys"])
            if at < len(keys):
                answer = list_page(keys, self.text, lambda key, encoded: objects[key].entry(key, encoded=encoded))
                self._xml(answer.replace(f"Token>{keys[at - 1]}<", f"Token>{keys[at]}<"))
                return
        super()._list(objects)

"""A proxy before an S3 store that fails, hangs, lags, speaks TLS, refuses writes or keeps another time, on demand.

Signatures stay valid, since path, Host and headers go through as they came.
"""

import datetime as dt
import http.client
import json
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit
from weakref import WeakSet

_CHUNK_BYTES = 65536
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "expect"}
#: How far S3 lets a client's clock be off.
_SKEW_LIMIT_S = 900
_WRITES = {"PUT", "POST", "DELETE"}
_ADMIN = "/minio/admin/v3/"


class Fault(StrEnum):
    """What a request meets instead of its answer."""

    ERROR = "500"
    SLOW_DOWN = "503"  # with Retry-After: 1
    RESET = "reset"  # RST before the first byte of an answer
    CUT = "cut"  # an answer's body ends halfway; a request's body is read halfway
    HANG = "hang"  # nothing, until the proxy is closed


@dataclass(frozen=True)
class Request:
    """A request that the proxy sees: method and target (path and query) as they stand in the request line."""

    method: str
    target: str


def outside(folder: str) -> Callable[[Request], bool]:
    """Make `S3Proxy.denies` of keys that may do all below a folder, and nothing on the bucket as such.

    Args:
        folder: Ends with `/`.
    """

    def denied(request: Request) -> bool:
        url = urlsplit(request.target)
        key = unquote(url.path).lstrip("/").partition("/")[2]
        prefix = parse_qs(url.query).get("prefix", [""])[0]
        return not (key.startswith(folder) or (request.method == "GET" and not key and prefix.startswith(folder)))

    return denied


class S3Proxy(ThreadingHTTPServer):
    """A proxy on the loopback address, serving while the `with` block lasts. The settings may be changed at any time.

    Attributes:
        faults: Met in turn by one request in `every`, of those that `fails` takes.
        every: 1: all of them. Counted over all connections.
        fails: Which requests can fail; all by default.
        before: Called before a request is passed on, from the thread of its connection.
        delay_s: Waited before each answer.
        read_only: PUT, POST and DELETE are answered 403 AccessDenied.
        denies: Which requests are answered 403 AccessDenied; none by default.
        groups: Those that its one user is a member of, as MinIO's admin API shows and sets them. While the policy of
            one of them denies something the store is read-only, as to that user; where it denies reads, and until the
            moment that it may name, GET and HEAD of objects are refused too.
        fenced: The access keys that were made members of a group; none: read_only is for everyone.
        refusal: A status and an S3 error code that every request is answered, such as (400, "ExpiredToken").
        skew_s: The store's clock is ahead by this. Requests that are dated otherwise are answered RequestTimeTooSkewed;
            others are signed again with `keys`, (access key, secret key), for the store behind, whose clock is right.
        token: The session token that every request must carry; others are answered 400 InvalidToken. With `keys`
            requests are signed again without it, for a store behind that knows no token.
        requests: Counted by method, whatever became of them.
        failed: Of these, how many met a fault.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(
        self,
        endpoint_url: str,
        *,
        tls: ssl.SSLContext | None = None,
        keys: tuple[str, str] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Handler)
        self.upstream = urlsplit(endpoint_url).netloc
        self.faults: Sequence[Fault] = ()
        self.every = 1
        self.fails: Callable[[Request], bool] = lambda _: True
        self.before: Callable[[Request], None] = lambda _: None
        self.delay_s = 0.0
        self.read_only = False
        self.denies: Callable[[Request], bool] = lambda _: False
        self.groups: set[str] = set()
        self.fenced: set[str] = set()
        self.denying: set[str] = set()
        self.off_until: dict[str, str] = {}
        self.policies: dict[str, str] = {}
        self.refusal: tuple[int, str] | None = None
        self.skew_s = 0.0
        self.token = ""
        self.requests: Counter[str] = Counter()
        self.failed = 0
        self.keys = keys
        self.over = threading.Event()
        self._tls = tls
        self._eligible = 0
        self._connections: WeakSet[socket.socket] = WeakSet()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def url(self) -> str:
        """Where clients reach it."""
        host = str(self.server_address[0])
        return f"{'https' if self._tls else 'http'}://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def __enter__(self) -> Self:
        """Serve."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of whatever hangs, and end, with the connections that clients keep open."""
        self.over.set()
        self.shutdown()
        for connection in list(self._connections):
            with suppress(OSError):  # closed by its client
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
        self._thread.join()

    def get_request(self) -> tuple[socket.socket, object]:
        """Accept a connection; the thread that serves it makes the TLS handshake, with its first read."""
        connection, address = super().get_request()
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        self._connections.add(connection)
        return connection, address

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that goes away, or does not trust the certificate: that is no error of the proxy's."""

    def administer(self, request: Request, body: bytes) -> bytes:
        """Answer as MinIO's admin API; the rights of who asks are not looked at."""
        url = urlsplit(request.target)
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        match url.path.removeprefix(_ADMIN):
            case "user-info":
                return json.dumps({"memberOf": sorted(self.groups), "status": "enabled"}).encode()
            case "add-canned-policy":
                (statement,) = json.loads(body)["Statement"]
                self.denying |= {query["name"]} if statement["Effect"] == "Deny" else set()
                if "s3:GetObject" in statement["Action"]:
                    self.off_until[query["name"]] = statement["Condition"]["DateLessThan"]["aws:CurrentTime"]
            case "set-user-or-group-policy":
                self.policies[query["userOrGroup"]] = query["policyName"]
            case "update-group-members":
                change = json.loads(body)
                self.fenced |= set(change["members"])
                if change["members"]:
                    (self.groups.discard if change["isRemove"] else self.groups.add)(change["group"])
                self.read_only = any(self.policies[group] in self.denying for group in self.groups)
        return b""

    def is_off(self, access_key: str) -> bool:
        """Return whether a key is denied the reads of objects now."""
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ends = [self.off_until[self.policies[group]] for group in self.groups if self.policies[group] in self.off_until]
        return access_key in self.fenced and any(now < end for end in ends)

    def refuses(self, request: Request, access_key: str) -> bool:
        """Return whether a policy denies a request; lists are never denied."""
        if request.method in _WRITES:
            return self.read_only and (not self.fenced or access_key in self.fenced)
        return "/" in urlsplit(request.target).path.strip("/") and self.is_off(access_key)

    def fault(self, request: Request) -> Fault | None:
        """Count a request, and say which fault it meets."""
        with self._lock:
            self.requests[request.method] += 1
            if not self.faults or not self.fails(request):
                return None
            self._eligible += 1
            if self._eligible % self.every:
                return None
            self.failed += 1
            return self.faults[(self.failed - 1) % len(self.faults)]


class _Handler(BaseHTTPRequestHandler):
    """One connection of a client, and one to the store."""

    server: S3Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.upstream = http.client.HTTPConnection(self.server.upstream, timeout=60)

    def finish(self) -> None:
        self.upstream.close()
        super().finish()

    def handle_expect_100(self) -> bool:
        # Said when the body is read: one that is refused is never sent.
        return True

    def _serve(self) -> None:
        proxy = self.server
        # http.server folds the leading slashes of `self.path`.
        request = Request(self.command, self.requestline.split(" ")[1])
        if request.target.startswith(_ADMIN):
            self._say(proxy.administer(request, self._take(int(self.headers.get("Content-Length") or 0))))
            return
        fault = proxy.fault(request)
        if proxy.delay_s:
            time.sleep(proxy.delay_s)
        if fault is Fault.HANG:
            proxy.over.wait()
            self.close_connection = True
        elif fault is Fault.RESET:
            self._reset()
        elif fault in {Fault.ERROR, Fault.SLOW_DOWN}:
            self._refuse(int(fault), "InternalError" if fault is Fault.ERROR else "SlowDown")
        elif proxy.refusal:
            self._refuse(*proxy.refusal)
        elif proxy.token and self.headers.get("x-amz-security-token") != proxy.token:
            self._refuse(400, "InvalidToken")
        elif proxy.denies(request) or proxy.refuses(request, self._access_key()):
            self._refuse(403, "AccessDenied")
        elif proxy.skew_s and self._skewed():
            self._refuse(403, "RequestTimeTooSkewed")
        else:
            proxy.before(request)
            self._pass_on(request, cut=fault is Fault.CUT)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve  # noqa: N815  http.server's names

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        # Without linger this sends RST; the files that http.server has made of the socket would keep it open.
        for file in (self.rfile, self.wfile, self.connection):
            file.close()

    def _refuse(self, status: int, code: str) -> None:
        self._take(int(self.headers.get("Content-Length") or 0))
        body = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'
        self.send_response_only(status)
        self.send_header("Date", formatdate(time.time() + self.server.skew_s, usegmt=True))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        if status == 503:
            self.send_header("Retry-After", "1")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body.encode())

    def _say(self, body: bytes) -> None:
        self.send_response_only(http.HTTPStatus.OK)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _take(self, size: int) -> bytes:
        if size and self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(http.HTTPStatus.CONTINUE)
            self.end_headers()
        return self.rfile.read(size)

    def _access_key(self) -> str:
        return self.headers.get("Authorization", "").partition("Credential=")[2].partition("/")[0]

    def _skewed(self) -> bool:
        dated = self.headers.get("x-amz-date", "")
        try:
            signed = dt.datetime.strptime(dated, "%Y%m%dT%H%M%SZ").replace(tzinfo=dt.UTC).timestamp()
        except ValueError:
            return True
        return abs(signed - time.time() - self.server.skew_s) > _SKEW_LIMIT_S

    def _signed_again(self, request: Request) -> dict[str, str]:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.credentials import Credentials

        if not self.server.keys:
            raise ValueError("to sign again needs the store's keys")
        kept = {name: value for name, value in self.headers.items() if name.lower() not in {"authorization", "host"}}
        own = {"x-amz-date", "x-amz-security-token", *_HOP_BY_HOP}
        kept = {name: value for name, value in kept.items() if name.lower() not in own}
        again = AWSRequest(request.method, f"http://{self.server.upstream}{request.target}", headers=kept)
        again.context["payload_signing_enabled"] = False
        S3SigV4Auth(Credentials(*self.server.keys), "s3", "us-east-1").add_auth(again)
        return {"Host": self.server.upstream, **again.headers}

    def _pass_on(self, request: Request, *, cut: bool) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        if cut and size:
            self._take(size // 2)
            self._reset()
            return
        again = self.server.skew_s or (self.server.token and self.server.keys)
        headers = self._signed_again(request) if again else dict(self.headers.items())
        self.upstream.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
        for name, value in headers.items():
            if name.lower() not in _HOP_BY_HOP:
                self.upstream.putheader(name, value)
        self.upstream.endheaders()
        left = size
        while left:
            chunk = self._take(min(left, _CHUNK_BYTES)) if left == size else self.rfile.read(min(left, _CHUNK_BYTES))
            if not chunk:
                self._reset()  # the client went away in mid-body: so does the request to the store
                self.upstream.close()
                return
            self.upstream.send(chunk)
            left -= len(chunk)
        self._answer(self.upstream.getresponse(), cut=cut)

    def _answer(self, answer: http.client.HTTPResponse, *, cut: bool) -> None:
        has_body = self.command != "HEAD" and answer.status not in {204, 304}
        chunked = has_body and answer.length is None
        self.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if not has_body:
            answer.read()
            return
        left = (answer.length or 0) // 2 if cut else answer.length
        while chunk := answer.read(_CHUNK_BYTES if left is None else min(left, _CHUNK_BYTES)):
            self.wfile.write(b"%x\r\n%b\r\n" % (len(chunk), chunk) if chunked else chunk)
            left = None if left is None else left - len(chunk)
        if cut:
            self.close_connection = True
            self.upstream.close()
        elif chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: the counters say what happened."""

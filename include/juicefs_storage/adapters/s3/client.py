"""Signed requests to one store, retried where that may help; refusals as errors that say what to do."""

from __future__ import annotations

import logging
import random
import re
import time
from typing import TYPE_CHECKING
from urllib.parse import quote

from include.juicefs_storage.adapters.s3.signing import Headers, Signer
from include.juicefs_storage.adapters.s3.wire.drive import drive
from include.juicefs_storage.adapters.s3.wire.host import Host
from include.juicefs_storage.adapters.s3.wire.limits import SLOWEST_BYTES_S
from include.juicefs_storage.adapters.s3.wire.message import Buffer, HttpError, Response, TooLongError
from include.juicefs_storage.errors import (
    NoBucketError,
    PermanentError,
    StorageSwitchError,
    TransientError,
    UnreachableError,
)
from include.juicefs_storage.objects.flow import LOOK_S, Flow

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from include.juicefs_storage.adapters.s3.store import S3Store
    from include.juicefs_storage.adapters.s3.wire.connection import Connection
    from include.juicefs_storage.adapters.s3.wire.limits import Limits, Steps

log = logging.getLogger(__name__)

#: The longest answer that is no object: a page of 1,000 keys of 1 KiB, percent-encoded, is half as long.
ANSWER_LIMIT_BYTES = 8 * 2**20
#: The bytes that such an answer is given time for.
_ANSWER_BYTES = 2**20
#: Larger objects cannot be sent in one PUT.
PUT_LIMIT_BYTES = 5 * 2**30
OBJECT_LIMIT_BYTES = 5 * 2**40  # the largest that S3 knows
#: So many refusals without a single success: the keys are at fault, not an object.
_DENIALS = 50
_THROTTLED = ("status 429", "status 503")
_TRIED_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Keys that need no percent-encoding.
_PLAIN = re.compile(r"[A-Za-z0-9/_.~-]*").fullmatch
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
_KEYS = "correct the keys of {origin}, or their policy on this bucket"
_REGION = "correct extra.region_name or extra.endpoint_url of {connection}"
_RENEW = "renew the keys and the session token of {origin}, then clear this task"
#: Answers that concern every request to a bucket, with what to do about each.
_REMEDIES = {
    "NoSuchBucket": "make the bucket, or correct its name: it is never created from here",
    "InvalidBucketName": "correct the bucket's name",
    "InvalidAccessKeyId": "correct the access key (login) of {origin}",
    "SignatureDoesNotMatch": "correct the secret key (password) of {origin}",
    "ExpiredToken": _RENEW,
    "TokenRefreshRequired": _RENEW,
    "InvalidToken": "correct extra.aws_session_token of {connection}",
    "AccessDenied": _KEYS,
    "AllAccessDisabled": _KEYS,
    "AccountProblem": _KEYS,
    "RequestTimeTooSkewed": "set the clocks of the store and of the Airflow workers (NTP)",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
}


class StoreDownError(TransientError):
    """The store answered none of many tries: there is no point in asking for the next object."""


class StoreUnreachableError(StoreDownError, UnreachableError):
    """The store answered nothing at all."""


class ObjectError(Exception):
    """One object cannot be treated; the text is for its row in the manifest, without secrets."""


class S3Client:
    """Requests to one store. Not for several threads at once; connections are kept between requests.

    Args:
        store: Where it is and with which keys.
        limits: Of each request; None: the store's.
        flow: Its bandwidth is kept where objects are streamed, and nothing is tried again in pauses. None: nobody's.
    """

    def __init__(self, store: S3Store, limits: Limits | None = None, flow: Flow | None = None) -> None:
        self.store, self.limits = store, limits or store.limits
        self.flow = flow
        host = Host(store.endpoint, verify=store.verify)
        if store.virtual_host:
            host.name, host.header = f"{store.bucket}.{host.name}", f"{store.bucket}.{host.header}"
        self.host = host
        self.signer = Signer(host.header, store.region, store.access_key, store.secret_key, store.session_token)
        #: Of new objects.
        self.new_headers: Headers = (("x-amz-storage-class", store.storage_class),) if store.storage_class else ()
        self.bucket_path = "/" if store.virtual_host else f"/{quote(store.bucket, safe='')}/"
        self._prefix = quote(store.prefix, safe="/~")
        self.idle: list[Connection] = []
        #: Requests that this store answered, with whatever it had to say.
        self.answers = 0
        #: Objects read or written, which shows that the keys may do that.
        self.granted = 0
        #: The last refusal of an object for want of rights.
        self.denied: StorageSwitchError | None = None
        self.denials = 0
        #: Told where the store may have too much to do: the seconds that it asked everybody to wait, 0 if it did not.
        self.on_failure: Callable[[float], None] = lambda _: None
        #: Where bodies are received by calls that wait; None: the thread has other things to do than to wait.
        self.buffer: memoryview | None = None
        self._corrected_at = -1e9

    def close(self) -> None:
        """Close the idle connections."""
        while self.idle:
            self.idle.pop().close()

    def path(self, key: str) -> str:
        """Return the request path of a key (relative to the prefix), percent-encoded."""
        return f"{self.bucket_path}{self._prefix}{key if _PLAIN(key) else quote(key, safe='/~')}"

    def connection(self) -> Steps[Connection]:
        """Return an idle connection, the last used first, or open a new one."""
        if self.idle:
            return self.idle.pop()
        return (yield from self.host.connect(self.limits))

    def release(self, connection: Connection) -> None:
        """Give a connection back after an exchange that went well."""
        if connection.reusable:
            connection.used = True
            self.idle.append(connection)
        else:
            connection.close()

    def request(  # noqa: PLR0912 - one way through, unrolled (over 60 lines): every object passes here twice
        self,
        method: str,
        path: str,
        query: str = "",
        headers: Headers = (),
        parts: list[Buffer] | None = None,
        length: int | None = None,
        limit_bytes: int = ANSWER_LIMIT_BYTES,
        transfer_bytes: int = _ANSWER_BYTES,
    ) -> Steps[Response]:
        """Make one request, retried where that may help. The answer may be a refusal.

        Args:
            method: GET, PUT, …
            path: From `path`.
            query: Percent-encoded and sorted.
            headers: Extra ones.
            parts: The body.
            length: Of the body in bytes; None: there is none.
            limit_bytes: The longest body that is taken for an answer.
            transfer_bytes: How many bytes the server is given the time to move.

        Raises:
            StoreDownError: No try was answered, nor was anyone else's meanwhile.
            ObjectError: This request was not answered well, while others were.
            TooLongError: The body is longer than `limit_bytes`.
            PermanentError: The certificate is not trusted, or the clocks keep differing.
        """
        tries = Tries(self)
        idle = self.idle
        while True:
            connection = None
            retry_after = None
            try:
                connection = idle.pop() if idle else (yield from self.host.connect(self.limits))
                connection.start(self.limits, transfer_bytes, tries.until)
                head = self.signer.head(method, path, query, headers, length)
                if parts:
                    size = len(head) + (length or 0)
                    if (sent := connection.send_some([head, *parts])) != size:
                        yield from connection.send([head, *parts], size, sent)
                elif connection.send_some([head]) != len(head):
                    raise HttpError("a request's head was not taken")  # its buffer was empty
                response = yield from connection.receive_all(method, limit_bytes)
            except TooLongError:
                if connection is not None:
                    connection.close()
                raise
            except (OSError, HttpError) as error:
                if connection is not None:
                    connection.close()
                    if connection.stale(error):
                        continue  # the next is new, or as old
                problem = self.problem(error)
            except BaseException:
                if connection is not None:
                    connection.close()
                raise
            else:
                self.release(connection)
                if response.status < 300 or not self.again(response):
                    self.answers += 1
                    response.tries = tries.made + 1
                    return response
                problem = f"status {response.status} {error_code(response)}".rstrip()
                retry_after = response.headers.get("retry-after")
            yield tries.delay(method, problem, retry_after)
            yield from await_resumed(self.flow, tries)

    def call(
        self,
        method: str,
        path: str,
        query: str = "",
        headers: Headers = (),
        *,
        parts: list[Buffer] | None = None,
        length: int | None = None,
    ) -> Response:
        """Make one request in the calling thread. See `request`.

        Args:
            method: GET, PUT, …
            path: From `path`.
            query: Percent-encoded and sorted.
            headers: Extra headers.
            parts: The body.
            length: The body's length in bytes; None: there is no body.

        Raises:
            TransientError: It was not answered well.
            PermanentError: The certificate is not trusted, or the clocks keep differing.
        """
        try:
            return drive(self.request(method, path, query, headers, parts, length), self.limits)
        except (ObjectError, TooLongError) as error:
            raise TransientError(f"{self.store.where}: {method}: {error}.", next_step="look at the store") from None

    def again(self, response: Response) -> bool:
        """Return whether to retry. Correct the clock where that is what was wrong."""
        if response.status < 300:
            return False
        if response.status in _TRIED_AGAIN:
            return True
        code = error_code(response)
        if code == "RequestTimeTooSkewed":
            return self._correct_clock(response.headers.get("date", ""))
        return code in {"RequestTimeout", "SlowDown", "OperationAborted", "InternalError"}

    def _correct_clock(self, date: str) -> bool:
        from email.utils import parsedate_to_datetime

        try:
            skew_s = parsedate_to_datetime(date).timestamp() - time.time()
        except ValueError:
            return False
        if abs(skew_s - self.signer.skew_s) < 60:
            # Another request corrected it while this one was on its way, or the correction does not help.
            return time.monotonic() < self._corrected_at + self.limits.idle_s
        self._corrected_at = time.monotonic()
        log.warning(
            "The clock of %s is %+.0f s off ours; requests are signed with its time.", self.store.endpoint, skew_s
        )
        self.signer.skew_s = skew_s
        return True

    def problem(self, error: Exception) -> str:
        """Describe in a few words what went wrong with a connection.

        Raises:
            PermanentError: The certificate is not trusted, or the server does not speak TLS.
        """
        if type(error).__name__ == "SSLCertVerificationError":
            raise PermanentError(
                f"{self.store.where}: its certificate is not trusted ({getattr(error, 'verify_message', '')}).",
                next_step=f"set extra.verify of {self.store.connection} to the file of its CA, or to false where its "
                "clients may take any certificate; or trust that CA on the Airflow workers",
            ) from None
        if getattr(error, "reason", "") in {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"}:
            raise PermanentError(
                f"{self.store.where}: expected a server that speaks TLS, found one that does not.",
                next_step=f"correct the scheme or the port in the endpoint of {self.store.origin}",
            ) from None
        if isinstance(error, TimeoutError):
            return "no answer in time"
        return str(error) if isinstance(error, HttpError) else f"{type(error).__name__}: {error}"

    def expect_s3(self, action: str, headers: Mapping[str, str]) -> None:
        """Refuse a 200 that no S3 store gives: a login page, a console, a proxy that answers everything.

        Raises:
            TransientError: Neither an ETag nor any header of Amazon's names is there.
        """
        if "etag" not in headers and not any(name.startswith("x-amz-") for name in headers):
            raise self.not_s3(action, headers)

    def not_s3(self, action: str, headers: Mapping[str, str], why: str = "") -> TransientError:
        """Say what was found where an answer of S3 was expected.

        Args:
            action: What was asked, for the message.
            headers: The answer's.
            why: What is wrong with it; empty: nothing more is known.
        """
        kind, server = (_shown(headers.get(name, "")) for name in ("content-type", "server"))
        found = f"status 200 of type {kind or '(none)'} from server {server or '(unnamed)'}{f': {why}' if why else ''}"
        return TransientError(
            f"{self.store.where}: {action}: expected an answer of an S3 store, found {found}.",
            next_step=f"check that the endpoint of {self.store.origin} is the store's S3 port, and any proxy before it",
        )

    def refuse(self, action: str, response: Response) -> ObjectError:
        """Turn the refusal of one object into an error.

        Raises:
            PermanentError: It concerns every request to this store.
        """
        code = error_code(response)
        found = f"status {response.status} {code}".rstrip()
        if code not in _REMEDIES and response.status not in (301, 302, 303, 307, 308, 401):
            return ObjectError(f"{action}: {found}")
        error = self.refused(action, response)
        if code not in {"AccessDenied", "SignatureDoesNotMatch"}:
            raise error
        self.denied, self.denials = error, self.denials + 1
        if not self.granted and self.denials >= _DENIALS:
            raise error
        return ObjectError(f"{action}: {found}")

    def refused(self, action: str, response: Response) -> StorageSwitchError:
        """Say what is wrong with the whole store, and what to do about it. Transient where the store itself failed."""
        code, status = error_code(response), response.status
        found = f"status {status} {code}".rstrip()
        step = _REMEDIES.get(code) or (_KEYS if status in (401, 403) else "look at the store, and at {origin}")
        if 300 <= status < 400 or code in {"PermanentRedirect", "AuthorizationHeaderMalformed"}:
            step = _REGION
            region = response.headers.get("x-amz-bucket-region")
            found += f", asked in region {self.store.region}" + (f"; the bucket is in {region}" if region else "")
        kind = TransientError if status >= 500 or status == 409 else PermanentError
        kind = NoBucketError if code == "NoSuchBucket" else kind
        return kind(
            f"{self.store.where}: the store answered {action} by {found}.",
            next_step=step.format(origin=self.store.origin, connection=self.store.connection),
        )

    def copy_source(self, key: str) -> str:
        """Return a key in the form in which CopyObject names its source."""
        return f"/{quote(self.store.bucket, safe='')}/{self._prefix}{quote(key, safe='/~')}"


class Tries:
    """Counts the tries of one call, and ends it after the last or when its time is up.

    Attributes:
        made: How many tries have failed.
        until: When the call must have ended, by `time.monotonic`.
    """

    def __init__(self, client: S3Client, transfer_bytes: int = 0) -> None:
        self._client, self._answers, self.made = client, client.answers, 0
        self.until = time.monotonic() + client.limits.total_s + transfer_bytes / SLOWEST_BYTES_S

    def delay(self, action: str, problem: str, retry_after: str | None = None) -> float:
        """Return the seconds to the next try: doubled each time, with jitter, at least what the store asks for.

        Args:
            action: What was tried, for messages.
            problem: How it failed.
            retry_after: The header of that name.

        Raises:
            StoreDownError: It was the last, and the store answered nothing else meanwhile.
            ObjectError: It was the last.
        """
        limits = self._client.limits
        self.made += 1
        delay_s: float = limits.first_delay_s * 2.0 ** (self.made - 1) * random.uniform(0.5, 1)  # noqa: S311 - jitter
        asked_s = min(float(retry_after), limits.max_delay_s) if retry_after and retry_after.isdigit() else 0.0
        delay_s = min(max(delay_s, asked_s), limits.max_delay_s)
        # One object that fails at each try says nothing about how many the store takes at once.
        if self.made == 1 or asked_s or problem.startswith(_THROTTLED):
            self._client.on_failure(asked_s)
        if self.made < limits.tries and time.monotonic() + delay_s < self.until:
            return delay_s
        found = f"{action}: {problem} ({self.made} {'try' if self.made == 1 else 'tries'})"
        if self._client.answers == self._answers:
            kind = StoreDownError if problem.startswith("status ") else StoreUnreachableError
            raise kind(
                f"{self._client.store.where}: expected an answer, found none to {found}.",
                next_step="check that the store serves and that the Airflow workers reach it; then clear this task"
                + self._client.host.proxy_note,
            )
        raise ObjectError(found)


def await_resumed(flow: Flow | None, *tries: Tries) -> Steps[None]:
    """Wait while a flow is paused, which counts for no deadline.

    Args:
        flow: None: nobody pauses it.
        tries: Those that wait.
    """
    while flow is not None and flow.paused:
        for each in tries:
            each.until += LOOK_S
        yield LOOK_S


def _shown(text: str) -> str:
    """Return a header's value as a message may quote it."""
    return "".join(character for character in text[:80] if character.isprintable())


def error_code(response: Response) -> str:
    """Return the S3 error code in a body, or an empty text."""
    code = _CODE.search(response.body) if response.size else None
    return code[1].decode() if code else ""


def is_md5(etag: str) -> bool:
    """Return whether an ETag has the form of an MD5."""
    return len(etag) == 32 and "-" not in etag


def encoded(text: str) -> str:
    """Percent-encode a value of a query."""
    return quote(text, safe="~")

"""A bucket as one side of a copy: signed requests that are tried again, listings, errors that say what to do."""

from __future__ import annotations

import hashlib
import logging
import operator
import random
import re
import time
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote, unquote_plus

from include.juicefs_storage.adapters.s3.http import (
    Buffer,
    Connection,
    Host,
    HttpError,
    Limits,
    Response,
    TooLongError,
    drive,
)
from include.juicefs_storage.adapters.s3.signing import Headers, Signer
from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.objects.model import KeyRange, Page

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from include.juicefs_storage.adapters.s3.http import Steps
    from include.juicefs_storage.volume.setting import StorageConfig

log = logging.getLogger(__name__)

_ENDPOINT = re.compile(r"https?://[^/\s?#@]+/?")
_BODY_LIMIT_BYTES = 16 * 2**20
#: Larger objects cannot be sent in one PUT.
PUT_LIMIT_BYTES = 5 * 2**30
_OBJECT_LIMIT_BYTES = 5 * 2**40  # the largest that S3 knows
#: So many refusals without a single success: the keys are at fault, and no object.
_DENIALS = 50
_TRIED_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
#: Keys that need no percent-encoding.
_PLAIN = re.compile(r"[A-Za-z0-9/_.~-]*").fullmatch
_CODE = re.compile(rb"<Code>([A-Za-z0-9]{1,64})</Code>")
_KEYS = "correct the keys of the connection, or their policy on this bucket"
_REGION = "correct extra.region_name or extra.endpoint_url of the connection"
#: Answers that concern the whole side, with what to do about each.
_REMEDIES = {
    "NoSuchBucket": "make the bucket, or correct its name: it is never created from here",
    "InvalidBucketName": "correct the bucket's name",
    "InvalidAccessKeyId": "correct the access key (login) of the connection",
    "SignatureDoesNotMatch": "correct the secret key (password) of the connection",
    "ExpiredToken": "renew the connection's keys and session token, then clear this task",
    "TokenRefreshRequired": "renew the connection's keys and session token, then clear this task",
    "InvalidToken": "correct extra.aws_session_token of the connection",
    "AccessDenied": _KEYS,
    "AllAccessDisabled": _KEYS,
    "AccountProblem": _KEYS,
    "RequestTimeTooSkewed": "set the clocks of the store and of the Airflow workers (NTP)",
    "AuthorizationHeaderMalformed": _REGION,
    "PermanentRedirect": _REGION,
    "TemporaryRedirect": _REGION,
    "IllegalLocationConstraintException": _REGION,
}


@dataclass(frozen=True, slots=True)
class S3Store:
    """Where a side lies and with which keys.

    Attributes:
        endpoint: `http(s)://host[:port]`.
        prefix: What every key of this side begins with; it is taken as it is, so a folder's ends with `/`.
        verify: Whether a certificate is checked, or the file of the authorities to trust.
        virtual_host: The bucket stands in the host's name instead of the path.
    """

    endpoint: str
    bucket: str
    prefix: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    region: str = "us-east-1"
    session_token: str = field(default="", repr=False)
    verify: bool | str = True
    virtual_host: bool = False

    def __post_init__(self) -> None:
        if not _ENDPOINT.fullmatch(self.endpoint):
            raise PermanentError(
                "Expected an endpoint of the form http(s)://host[:port], found one with a path, keys, or no scheme.",
                next_step="correct extra.endpoint_url of the connection",
            )
        object.__setattr__(self, "endpoint", self.endpoint.rstrip("/"))

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.bucket}/{self.prefix} at {self.endpoint}"

    @classmethod
    def from_connection(cls, conn_id: str, bucket: str, prefix: str = "") -> S3Store:
        """What an Airflow connection of type `aws` says.

        Beside what `objects.aws_connection` reads, of extra: region_name, aws_session_token, verify (false, or the file
        of a CA), config_kwargs.s3.addressing_style.

        Raises:
            PermanentError: The connection lacks a field.
        """
        from include.juicefs_storage.adapters.s3.boto_bucket import aws_connection

        connection, endpoint = aws_connection(conn_id)
        extra = connection.extra_dejson
        style = ((extra.get("config_kwargs") or {}).get("s3") or {}).get("addressing_style")
        verify = extra.get("verify", True)
        return cls(
            endpoint=endpoint,
            bucket=bucket,
            prefix=prefix,
            access_key=connection.login or "",
            secret_key=connection.password or "",
            region=str(extra.get("region_name") or "us-east-1"),
            session_token=str(extra.get("aws_session_token") or ""),
            verify={"false": False, "true": True}.get(str(verify).lower(), str(verify)),
            virtual_host=style == "virtual",
        )

    @classmethod
    def from_storage(cls, config: StorageConfig, prefix: str = "") -> S3Store:
        """What the setting of a JuiceFS volume says."""
        endpoint, bucket = config.endpoint_and_bucket
        return cls(endpoint, bucket, prefix, config.access_key.get_secret_value(), config.secret_key.get_secret_value())


class StoreDownError(TransientError):
    """The store answered none of many tries: there is no point in asking for the next object."""


class ObjectError(Exception):
    """One object cannot be treated; the text is for its row in the manifest, without secrets."""


class _Hash(Protocol):
    def update(self, data: Buffer, /) -> None: ...
    def hexdigest(self) -> str: ...


class S3Client:
    """Requests to one store. Not for several threads at once; connections are kept between requests."""

    def __init__(self, store: S3Store, limits: Limits | None = None) -> None:
        self.store, self.limits = store, limits or Limits()
        host = Host(store.endpoint, verify=store.verify)
        if store.virtual_host:
            host.name, host.header = f"{store.bucket}.{host.name}", f"{store.bucket}.{host.header}"
        self.host = host
        self.signer = Signer(host.header, store.region, store.access_key, store.secret_key, store.session_token)
        self.bucket_path = "/" if store.virtual_host else f"/{quote(store.bucket, safe='')}/"
        self._prefix = quote(store.prefix, safe="/~")
        self.idle: list[Connection] = []
        #: Requests that this store answered, with whatever it had to say.
        self.answers = 0
        #: Objects read or written, which shows that the keys may do that.
        self.granted = 0
        #: The last refusal of an object for want of rights.
        self.denied: PermanentError | None = None
        self.denials = 0
        self._corrected_at = -1e9

    def close(self) -> None:
        """Close the idle connections."""
        while self.idle:
            self.idle.pop().close()

    def path(self, key: str) -> str:
        """The request path of a key (relative to the prefix), percent-encoded."""
        return f"{self.bucket_path}{self._prefix}{key if _PLAIN(key) else quote(key, safe='/~')}"

    def connection(self) -> Steps[Connection]:
        """One that is idle, the last used first, or a new one."""
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

    def request(  # noqa: PLR0912 - one way through, unrolled: every object passes here twice
        self,
        method: str,
        path: str,
        query: str = "",
        headers: Headers = (),
        parts: list[Buffer] | None = None,
        length: int | None = None,
        limit_bytes: int = _BODY_LIMIT_BYTES,
    ) -> Steps[Response]:
        """One request, tried again where that may help. The answer may be a refusal.

        Args:
            method: GET, PUT, …
            path: From `path`.
            query: Percent-encoded and sorted.
            headers: Extra ones.
            parts: The body.
            length: Of the body in bytes; None: there is none.
            limit_bytes: The longest body that is taken for an answer.

        Raises:
            StoreDownError: No try was answered, nor was anyone else's meanwhile.
            ObjectError: This request was not answered well, while others were.
            PermanentError: The certificate is not trusted, or the clocks differ and go on differing.
        """
        tries = Tries(self)
        idle = self.idle
        while True:
            connection = None
            retry_after = None
            try:
                connection = idle.pop() if idle else (yield from self.host.connect(self.limits))
                connection.start(self.limits, length or limit_bytes)
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

    def again(self, response: Response) -> bool:
        """Whether the answer may be another one next time. Corrects the clock where that is what was wrong."""
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
        """What went wrong with a connection, in a few words.

        Raises:
            PermanentError: The certificate is not trusted.
        """
        if type(error).__name__ == "SSLCertVerificationError":
            raise PermanentError(
                f"{self.store.endpoint}: its certificate is not trusted ({getattr(error, 'verify_message', '')}).",
                next_step="set extra.verify of the connection to the file of its CA",
            ) from None
        if isinstance(error, TimeoutError):
            return "no answer in time"
        return str(error) if isinstance(error, HttpError) else f"{type(error).__name__}: {error}"

    def refuse(self, action: str, response: Response) -> ObjectError:
        """What a refusal of one object means.

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

    def refused(self, action: str, response: Response) -> PermanentError:
        """What is wrong with the whole side, and what to do about it."""
        code, status = error_code(response), response.status
        found = f"status {status} {code}".rstrip()
        step = _REMEDIES.get(code) or (_KEYS if status in (401, 403) else "look at the store, and at the connection")
        if 300 <= status < 400 or code in {"PermanentRedirect", "AuthorizationHeaderMalformed"}:
            step = _REGION
            region = response.headers.get("x-amz-bucket-region")
            found += f", asked in region {self.store.region}" + (f"; the bucket is in {region}" if region else "")
        return PermanentError(f"{action} in {self.store.name}: the store answered {found}.", next_step=step)

    def copy_source(self, key: str) -> str:
        """A key as CopyObject names its source."""
        return f"/{quote(self.store.bucket, safe='')}/{self._prefix}{quote(key, safe='/~')}"


class Tries:
    """Counts the tries of one request, and gives up after the last."""

    def __init__(self, client: S3Client) -> None:
        self._client, self._answers, self.made = client, client.answers, 0

    def delay(self, action: str, problem: str, retry_after: str | None = None) -> float:
        """Seconds to wait before the next try: doubled each time, with jitter, at least what the store asks for.

        Raises:
            StoreDownError: It was the last, and the store answered nothing else meanwhile.
            ObjectError: It was the last.
        """
        limits = self._client.limits
        self.made += 1
        if self.made >= limits.tries:
            found = f"{action}: {problem} ({self.made} tries)"
            if self._client.answers == self._answers:
                raise StoreDownError(
                    f"{self._client.store.name}: expected an answer, found none to {found}.",
                    state="what was copied so far is in the manifest",
                    next_step="look at the store; then clear this task: it goes on where it stopped",
                )
            raise ObjectError(found)
        delay_s: float = limits.first_delay_s * 2.0 ** (self.made - 1) * random.uniform(0.5, 1)  # noqa: S311 - jitter
        if retry_after and retry_after.isdigit():
            delay_s = max(delay_s, float(retry_after))
        return min(delay_s, limits.max_delay_s)


def error_code(response: Response) -> str:
    """The S3 error code in a body, or an empty text."""
    code = _CODE.search(response.body[:_BODY_LIMIT_BYTES]) if response.size else None
    return code[1].decode() if code else ""


def is_md5(etag: str) -> bool:
    """Whether an ETag has the form of an MD5."""
    return len(etag) == 32 and "-" not in etag


class S3Side:
    """`model.Side` on one store. Iterators may be used by several threads, each by one at a time."""

    def __init__(self, store: S3Store, limits: Limits | None = None) -> None:
        self.store, self.limits = store, limits or Limits()
        self.name = store.name

    def _request(self, client: S3Client, method: str, path: str, query: str = "") -> Response:
        try:
            return drive(client.request(method, path, query), self.limits)
        except ObjectError as error:
            raise TransientError(f"{self.name}: {error}.", next_step="look at the store") from None

    def check(self) -> None:
        """HEAD the bucket and list one key."""
        client = S3Client(self.store, self.limits)
        try:
            head = self._request(client, "HEAD", client.bucket_path)
            if head.status == 404:
                raise PermanentError(
                    f"{self.name}: expected a bucket, found none.", next_step=_REMEDIES["NoSuchBucket"]
                )
        finally:
            client.close()
        # A HEAD has no body to say why it is refused: a LIST has.
        self.first_after("")

    def first_after(self, key: str) -> str | None:
        """The first key after this one: one LIST of one key."""
        for page in self._list(KeyRange(after=key or None), max_keys=1):
            for found in page.keys:
                return found
        return None

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """List a range in order, page by page."""
        return self._list(keys)

    def _list(self, keys: KeyRange, max_keys: int = 1000) -> Iterator[Page]:
        """Pages of one range; each is checked to go on, in order, where the last one ended."""
        client = S3Client(self.store, self.limits)
        prefix, last, until = self.store.prefix, keys.after, keys.until
        start = f"&start-after={encoded(prefix + last)}" if last is not None else ""
        token: str | None = None
        try:
            while True:
                more = f"&continuation-token={encoded(token)}" if token is not None else ""
                query = (
                    f"{more[1:] + '&' if more else ''}encoding-type=url&list-type=2&max-keys={max_keys}"
                    f"&prefix={encoded(prefix)}{start}"
                )
                response = self._request(client, "GET", client.bucket_path, query)
                if response.status != 200:
                    raise client.refused("LIST", response)
                listing = parse_listing(response.body, prefix)
                page = listing.page
                if page.keys:
                    if (last is not None and page.keys[0] <= last) or not _ascending(page.keys):
                        raise PermanentError(
                            f"{self.name}: expected keys in order (UTF-8 bytes), found a page of the listing out of it "
                            f"after {last!r}.",
                            next_step="this store cannot be copied by ranges: use engine=mc",
                        )
                    last = page.keys[-1]
                    if until is not None and last >= until:
                        cut = bisect_right(page.keys, until)
                        page = Page(page.keys[:cut], page.sizes[:cut], page.etags[:cut])
                        if page.keys:
                            yield page
                        return
                    yield page
                if listing.token is None:
                    return
                if listing.token == token:
                    raise TransientError(f"{self.name}: a listing does not go on.", next_step="look at the store")
                token = listing.token
        finally:
            client.close()

    def prefixes(self, below: str) -> Iterator[str]:
        """The common prefixes below a prefix that ends with `/` or is empty."""
        client = S3Client(self.store, self.limits)
        prefix, token = self.store.prefix, ""
        try:
            while True:
                more = f"continuation-token={encoded(token)}&" if token else ""
                query = (
                    f"{more}delimiter=%2F&encoding-type=url&list-type=2&max-keys=1000&prefix={encoded(prefix + below)}"
                )
                response = self._request(client, "GET", client.bucket_path, query)
                if response.status != 200:
                    raise client.refused("LIST", response)
                listing = parse_listing(response.body, prefix)
                yield from listing.prefixes
                if listing.token is None:
                    return
                token = listing.token
        finally:
            client.close()

    def md5(self, key: str) -> str | None:
        """Read one object and hash it."""
        client = S3Client(self.store, self.limits)
        try:
            return drive(digest(client, key, _md5), self.limits)
        except ObjectError as error:
            raise TransientError(f"{self.name}: {error}.", next_step="look at the store") from None
        finally:
            client.close()


def _md5() -> _Hash:
    return hashlib.md5(usedforsecurity=False)


def digest(client: S3Client, key: str, make: Callable[[], _Hash]) -> Steps[str | None]:
    """Read an object piece by piece and hash it; None where there is none.

    Raises:
        ObjectError, StoreDownError: It cannot be read.
        PermanentError: The keys, the bucket or the certificate are wrong.
    """
    tries = Tries(client)
    while True:
        connection = None
        retry_after = None
        try:
            connection = yield from client.connection()
            connection.start(client.limits, _OBJECT_LIMIT_BYTES)
            head = client.signer.head("GET", client.path(key))
            yield from connection.send([head], len(head))
            answer = yield from connection.receive_head("GET")
            if answer.status == 200:
                hashed = make()
                while parts := (yield from connection.receive()):
                    for part in parts:
                        hashed.update(part)
                client.release(connection)
                connection = None
                client.answers += 1
                client.granted += 1
                return hashed.hexdigest()
            refused = yield from connection.receive_body(answer, _BODY_LIMIT_BYTES)
            if not client.again(refused):
                client.answers += 1
                if answer.status == 404 and error_code(refused) != "NoSuchBucket":
                    return None
                raise client.refuse("GET", refused)
            problem, retry_after = f"status {answer.status}", answer.headers.get("retry-after")
        except (OSError, HttpError) as error:
            if connection is not None and connection.stale(error):
                continue
            problem = client.problem(error)
        finally:
            if connection is not None:
                connection.close()
        yield tries.delay("GET", problem, retry_after)


def encoded(text: str) -> str:
    """A value as it stands in a query."""
    return quote(text, safe="~")


def _ascending(keys: list[str]) -> bool:
    return all(map(operator.lt, keys, islice(keys, 1, None)))


@dataclass(frozen=True, slots=True)
class Listing:
    """One answer to ListObjectsV2; keys and prefixes relative to the side's prefix; no token: it is the last."""

    page: Page
    prefixes: list[str]
    token: str | None


_ELEMENT = re.compile(r"<(?:(Owner)>.*?</Owner|([A-Za-z0-9]+)>([^<]*)</\2)>")
_QUOTED = re.compile('(&quot;|&#34;|"|)')
_QUOTE = '(?:&quot;|&#34;|")?'
_WANTED = {"Key": "([^<&]*+)", "ETag": f'{_QUOTE}([^<"&]*+){_QUOTE}', "Size": "([0-9]{1,18}+)"}
_VARYING = {"Key", "Size", "Owner"}
_TRUNCATED = re.compile("<IsTruncated>(true|false)</IsTruncated>")
_TOKEN = re.compile("<NextContinuationToken>([^<&]+)</NextContinuationToken>")


def parse_listing(body: bytes, prefix: str) -> Listing:
    """Read an answer to ListObjectsV2.

    Raises:
        TransientError: It is not a listing, is cut short, or shows a key without the prefix.
    """
    try:
        text = body.decode()
        listing = _parse_uniform(text, prefix) or _parse_any(text, prefix)
    except (ValueError, HttpError) as error:
        raise TransientError(
            f"Expected an answer to ListObjectsV2, found none ({error}).", next_step="look at the store"
        ) from None
    return listing


def _parse_uniform(text: str, prefix: str) -> Listing | None:
    """The usual form: every object has the same elements in the same order, keys are URL-encoded. Else None.

    A regular expression made from the first object has to match all of them; this is 20 times as fast as a parser.
    """
    start, end = text.find("<Contents>"), text.rfind("</Contents>") + len("</Contents>")
    if start < 0 or end < start:
        return None
    first = text[start + len("<Contents>") : text.index("</Contents>")]
    elements = list(_ELEMENT.finditer(first))
    names = tuple(match[1] or match[2] for match in elements)
    around, objects = text[:start] + text[end:], text[start:end]
    truncated = _TRUNCATED.findall(around)
    tokens = _TOKEN.findall(around)
    if (
        not names
        or len(truncated) != 1
        or "<EncodingType>url</EncodingType>" not in around
        or "<CommonPrefixes>" in around
        or "<!" in around
        or not around.rstrip().endswith("</ListBucketResult>")
        or len(tokens) != (truncated[0] == "true")
        or not {"Key", "ETag", "Size"} <= set(names)
        or len(set(names)) != len(names)
    ):
        return None
    number = objects.count("<Contents>")
    # Dates, ETags and storage classes are mostly of one length: they are passed over faster.
    rows = _objects_like(names, tuple(match[3] or "" for match in elements)).findall(objects)
    if len(rows) != number and len(rows := _objects_like(names).findall(objects)) != number:
        return None
    columns = dict(zip([name for name in names if name in _WANTED], zip(*rows, strict=True), strict=True))
    # A slash is the one encoded character of plain keys, and a literal "%2F" would be "%252F".
    text = "<".join(columns["Key"]).replace("%2F", "/")
    keys = text.split("<")
    if "%" in text or "+" in text:
        keys = [unquote_plus(key, errors="strict") if "%" in key or "+" in key else key for key in keys]
    return Listing(
        Page(_relative(keys, prefix), list(map(int, columns["Size"])), list(columns["ETag"])),
        [],
        tokens[0] if tokens else None,
    )


def _objects_like(names: tuple[str, ...], values: tuple[str, ...] = ()) -> re.Pattern[str]:
    """Matches one object with these elements; of those that may be of any length, as long as these values.

    Groups: those of `_WANTED`, in the order they stand in.
    """
    named = zip(names, values, strict=False)
    forms = ((0, "") if name in _VARYING else (len(value), _QUOTED.findall(value)[0]) for name, value in named)
    return _pattern(names, tuple(forms))


@lru_cache(maxsize=64)
def _pattern(names: tuple[str, ...], forms: tuple[tuple[int, str], ...]) -> re.Pattern[str]:
    inner = ""
    for name, form in zip_longest(names, forms):
        value = _WANTED.get(name, "[^<]*+")
        if name == "Owner":
            value = "(?:<[A-Za-z]+>[^<]*+</[A-Za-z]+>)*+"
        elif form and name == "ETag":
            value = f"{form[1]}(.{{{form[0] - 2 * len(form[1])}}}){form[1]}"
        elif form and name not in _WANTED:
            value = f".{{{form[0]}}}"
        inner += f"<{name}>{value}</{name}>"
    return re.compile(f"<Contents>{inner}</Contents>")


def _relative(keys: list[str], prefix: str) -> list[str]:
    # Between two keys that begin with the prefix, in order (which the caller checks), there are only such keys.
    if keys and prefix:
        if not (keys[0].startswith(prefix) and keys[-1].startswith(prefix)):
            raise ValueError("a key without the prefix that was asked for")
        cut = len(prefix)
        return [key[cut:] for key in keys]
    return keys


def _parse_any(text: str, prefix: str) -> Listing:
    """Any well-formed answer. Entities and document types are refused."""
    from xml.parsers import expat

    path: list[str] = []
    found: dict[str, str] = {}
    current: dict[str, str] = {}
    objects: list[dict[str, str]] = []
    prefixes: list[str] = []
    words: list[str] = []

    def refuse(*_: object) -> None:
        raise ValueError("a document type in a listing")

    def begin(name: str, _: object) -> None:
        path.append(name)
        words.clear()
        if path[1:] == ["Contents"]:
            current.clear()

    def finish(name: str) -> None:
        match path[1:]:
            case ["Contents"]:
                objects.append(dict(current))
            case ["Contents", _]:
                current[name] = "".join(words)
            case ["CommonPrefixes", "Prefix"]:
                prefixes.append("".join(words))
            case [_]:
                found[name] = "".join(words)
        words.clear()
        path.pop()

    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = begin, finish, words.append
    try:
        parser.Parse(text.encode(), True)
    except expat.ExpatError as error:
        raise ValueError(f"not XML: {error}") from None
    truncated, token = found.get("IsTruncated"), found.get("NextContinuationToken")
    if truncated not in ("true", "false"):
        raise ValueError("no IsTruncated")
    if truncated == "true" and not token:
        raise ValueError("more follows, but it does not say from where")

    def key_of(text: str) -> str:
        return unquote_plus(text, errors="strict") if found.get("EncodingType") == "url" else text

    try:
        page = Page(
            _relative([key_of(item["Key"]) for item in objects], prefix),
            [int(item["Size"]) for item in objects],
            [item.get("ETag", "").strip('"') for item in objects],
        )
    except KeyError as error:
        raise ValueError(f"an object without {error}") from None
    below = [key_of(text) for text in prefixes]
    if not all(item.startswith(prefix) for item in below):
        raise ValueError("a common prefix without the prefix that was asked for")
    return Listing(page, [item[len(prefix) :] for item in below], token if truncated == "true" else None)

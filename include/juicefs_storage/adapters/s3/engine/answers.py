"""What a store's answers about an object mean for its copy."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.client import ObjectError, error_code
from include.juicefs_storage.objects.model import ObjectOutcome

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.client import S3Client
    from include.juicefs_storage.adapters.s3.signing import Headers
    from include.juicefs_storage.adapters.s3.wire.message import Response

#: The longest refusal that is read.
REFUSAL_BYTES = 2**20
CREATE_ONLY: Headers = (("if-none-match", "*"),)
ETAG = re.compile(rb"<ETag>(?:&quot;|&#34;|\")?([^<\"&]*)")
_KEPT = frozenset(
    {"content-type", "cache-control", "content-disposition", "content-encoding", "content-language", "expires"}
)


class EndedError(Exception):
    """The object is not copied: VANISHED, CHANGED or DAMAGED."""

    def __init__(self, outcome: ObjectOutcome, detail: str = "") -> None:
        super().__init__(outcome)
        self.outcome, self.detail = outcome, detail


@lru_cache(maxsize=256)
def _kept_of(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in _KEPT or name.startswith("x-amz-meta-"))


def kept(headers: dict[str, str]) -> Headers:
    """Return the metadata that goes along: what S3 keeps with an object, but for tags, ACL and storage class."""
    found = tuple([(name, headers[name]) for name in _kept_of(tuple(headers))])
    if "aws-chunked" in headers.get("content-encoding", ""):  # how it was once sent, which S3 itself does not keep
        codings = [coding.strip() for coding in headers["content-encoding"].split(",")]
        rest = ", ".join(coding for coding in codings if coding != "aws-chunked")
        found = tuple((name, rest if name == "content-encoding" else value) for name, value in found)
        found = tuple(item for item in found if item[1])
    return found


def changed(headers: dict[str, str], etag: str) -> bool:
    """Return whether the object is another one than was listed."""
    return bool(etag) and headers.get("etag", "").removeprefix("W/").strip('"') != etag


def not_read(source: S3Client, response: Response) -> Exception:
    """Explain an answer to a GET that is no object: VANISHED, CHANGED, or a refusal."""
    code = error_code(response)
    if response.status == 404 and code in {"NoSuchKey", "NoSuchVersion", ""}:
        return EndedError(ObjectOutcome.VANISHED)
    if response.status in (412, 416):
        return EndedError(ObjectOutcome.CHANGED)
    if response.status == 400 and b"server side encryption" in response.body.lower():
        return ObjectError("GET: it is encrypted with a key of its writer (SSE-C), which no connection holds")
    return source.refuse("GET", response)

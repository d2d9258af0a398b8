"""Objects too large for one PUT: a multipart upload, part after part."""

from __future__ import annotations

import contextlib
import hashlib
import re
from functools import partial
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.client import ObjectError, S3Client, encoded, error_code, is_md5
from include.juicefs_storage.adapters.s3.engine.answers import CREATE_ONLY, ETAG, EndedError, changed, kept
from include.juicefs_storage.adapters.s3.engine.large import relay
from include.juicefs_storage.adapters.s3.engine.proof import compare, not_written, proven, xxh3
from include.juicefs_storage.adapters.s3.wire.drive import drive
from include.juicefs_storage.adapters.s3.wire.limits import Limits
from include.juicefs_storage.objects.model import Comparison, Copied, Listed, ObjectOutcome

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.engine.proof import Hash
    from include.juicefs_storage.adapters.s3.engine.worker import Worker
    from include.juicefs_storage.adapters.s3.signing import Headers
    from include.juicefs_storage.adapters.s3.store import S3Store
    from include.juicefs_storage.adapters.s3.wire.limits import Steps
    from include.juicefs_storage.adapters.s3.wire.message import Head

PART_BYTES = 64 * 2**20
_MOST_PARTS = 9000
_ABORT_LIMITS = Limits(connect_s=5, idle_s=5, tries=3, total_s=30)
_UPLOAD_ID = re.compile(rb"<UploadId>([^<&]+)</UploadId>")


def send_parts(worker: Worker, item: Listed, *, create_only: bool) -> Steps[Copied]:
    """Send an object as a multipart upload, part by part. Abort the upload where it is not completed.

    Args:
        worker: The worker of this thread.
        item: The object, as the source lists it.
        create_only: Write only where the target has no such object.
    """
    key, size, etag = item
    source, target = worker.source, worker.target
    found = yield from source.request("HEAD", source.path(key))
    if found.status == 404:
        raise EndedError(ObjectOutcome.VANISHED)
    if found.status != 200:
        raise source.refuse("HEAD", found)
    if found.headers.get("content-length") != str(size) or changed(found.headers, etag):
        raise EndedError(ObjectOutcome.CHANGED)
    path = target.path(key)
    if create_only and (yield from target.request("HEAD", path)).status == 200:
        compared = yield from compare(worker, item)
        return Copied(compared.outcome, comparison=Comparison.CONTENT, checksum=compared.checksum)
    begun = yield from target.request("POST", path, "uploads=", kept(found.headers) + target.new_headers, None, 0)
    upload_id = _UPLOAD_ID.search(begun.body)
    if begun.status != 200 or upload_id is None:
        raise target.refuse("POST", begun)
    upload = f"uploadId={encoded(upload_id[1].decode())}"
    try:
        parts, content = yield from _upload_parts(worker, item, upload)
        body = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>&quot;{part}&quot;</ETag></Part>"
            for number, part in enumerate(parts, start=1)
        )
        data = f"<CompleteMultipartUpload>{body}</CompleteMultipartUpload>".encode()
        conditions = CREATE_ONLY if create_only else ()
        ended = yield from target.request("POST", path, upload, conditions, [data], len(data))
        # Tried again after an answer that got lost, it finds no upload any more: what is there decides.
        lost = ended.tries > 1 and ended.status == 404
        if not lost and (ended.status != 200 or error_code(ended)):
            _abort(target.store, path, upload)
            return (yield from not_written(worker, item, ended))
    except BaseException:
        _abort(target.store, path, upload)
        raise
    target.granted += 1
    written = ETAG.search(ended.body)
    etag = written[1].decode() if written else ""
    digests = b"".join(bytes.fromhex(part) for part in parts if is_md5(part))
    composite = f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
    return (yield from proven(worker, item, etag, composite, content))


def _upload_parts(worker: Worker, item: Listed, upload: str) -> Steps[tuple[list[str], str]]:
    """Upload all parts; return their ETags, each the MD5 of what was sent, and xxh3-64 of the whole."""
    _, size, etag = item
    part_bytes = max(worker.shared.part_bytes, -(-size // _MOST_PARTS))
    content = xxh3()
    parts: list[str] = []
    for first in range(0, size, part_bytes):
        last = min(first + part_bytes, size) - 1
        number = len(parts) + 1
        query = f"partNumber={number}&{upload}"
        headers: Headers = (("range", f"bytes={first}-{last}"),)
        if etag:
            headers = (("if-match", f'"{etag}"'), *headers)
        so_far = content
        made: list[Hash] = []

        def whole(so_far: Hash = so_far, made: list[Hash] = made) -> Hash:
            made[:] = [so_far.copy()]  # a part that is sent again is hashed again
            return made[0]

        sent, sums, _ = yield from relay(
            worker, item, headers, partial(_part, query), last + 1 - first, [hashlib.md5, whole]
        )
        if sent.status != 200:
            raise worker.target.refuse("PUT", sent)
        stored = sent.headers.get("etag", "").strip('"')
        if is_md5(stored) and stored != sums[0]:
            raise ObjectError(f"part {number} was not stored as it was sent")
        if not stored.isalnum():
            raise ObjectError(f"part {number} got an ETag that is none")
        parts.append(stored)
        content = made[0]
    return parts, content.hexdigest()


def _abort(store: S3Store, path: str, upload: str) -> None:
    """Remove the parts of an upload of our own, as well as can be."""
    client = S3Client(store, _ABORT_LIMITS)
    with contextlib.suppress(Exception):
        drive(client.request("DELETE", path, upload), _ABORT_LIMITS)
    client.close()


def _part(query: str, _: Head) -> tuple[str, Headers]:
    return query, ()

"""Small objects: read into memory, then written. Many of them are in flight on one thread."""

from __future__ import annotations

import hashlib
from functools import partial
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.client import is_md5
from include.juicefs_storage.adapters.s3.engine.answers import EndedError, changed, kept, not_read
from include.juicefs_storage.adapters.s3.engine.proof import not_written, proven, xxh3
from include.juicefs_storage.adapters.s3.engine.put import put_object
from include.juicefs_storage.adapters.s3.wire.message import TooLongError
from include.juicefs_storage.objects.model import Comparison, Copied, Listed, ObjectOutcome
from include.juicefs_storage.volume.checksum import Crc32c, checksum_problem, recorded_checksum

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.client import S3Client
    from include.juicefs_storage.adapters.s3.engine.proof import Hash
    from include.juicefs_storage.adapters.s3.engine.worker import Worker
    from include.juicefs_storage.adapters.s3.signing import Headers
    from include.juicefs_storage.adapters.s3.wire.limits import Steps
    from include.juicefs_storage.adapters.s3.wire.message import Response


def send_small(worker: Worker, item: Listed, *, create_only: bool) -> Steps[Copied]:
    """Send an object: GET into memory, then PUT.

    Args:
        worker: The worker of this thread.
        item: The object, as the source lists it.
        create_only: Write only where the target has no such object.
    """
    key, size, etag = item
    source, target = worker.source, worker.target
    got = yield from _get(source, item)
    damage = _damage(got)
    if damage:  # on the way, or where it is stored
        got = yield from _get(source, item)
        damage = _damage(got)
    if damage and not worker.shared.copy_damaged:
        raise EndedError(ObjectOutcome.DAMAGED, damage)
    path, headers = target.path(key), kept(got.headers) + target.new_headers

    def send(more: Headers) -> Steps[Response]:
        return target.request("PUT", path, "", headers + more, got.parts, size)

    md5 = partial(hashlib.md5, usedforsecurity=False)

    def digest(*, read: bool) -> Steps[str]:  # noqa: ARG001 - it was read
        yield from ()
        return _hashed(got, md5())

    put = yield from put_object(worker, send, digest, create_only=create_only)
    if put.status != 200:
        return (yield from not_written(worker, item, put))
    target.granted += 1
    written = put.headers.get("etag", "").strip('"')
    if written == etag and is_md5(etag):
        return Copied(ObjectOutcome.COPIED, written, Comparison.ETAG, detail=damage)
    copied = yield from proven(worker, item, written, _hashed(got, md5()), _hashed(got, xxh3()))
    return copied._replace(detail=copied.detail or damage)


def _get(source: S3Client, item: Listed) -> Steps[Response]:
    """Read an object as it was listed."""
    key, size, etag = item
    try:
        got = yield from source.request("GET", source.path(key), limit_bytes=size)
    except TooLongError:
        raise EndedError(ObjectOutcome.CHANGED) from None
    if got.status != 200:
        raise not_read(source, got)
    source.granted += 1
    if got.size != size or changed(got.headers, etag):
        raise EndedError(ObjectOutcome.CHANGED)
    return got


def _damage(got: Response) -> str:
    """Say how the content differs from the checksum that JuiceFS left with it; empty where it does not."""
    if recorded_checksum(got.headers) is None:
        return ""
    found = Crc32c()
    for part in got.parts:
        found.update(part)
    return checksum_problem(got.headers, found)


def _hashed(got: Response, made: Hash) -> str:
    for part in got.parts:
        made.update(part)
    return made.hexdigest()

"""Small objects: read into memory, then written. Many of them are in flight on one thread."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.client import is_md5
from include.juicefs_storage.adapters.s3.engine.answers import CREATE_ONLY, EndedError, changed, kept, not_read
from include.juicefs_storage.adapters.s3.engine.proof import not_written, proven, xxh3
from include.juicefs_storage.adapters.s3.wire.message import TooLongError
from include.juicefs_storage.objects.model import Comparison, Copied, Listed, ObjectOutcome

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.engine.worker import Worker
    from include.juicefs_storage.adapters.s3.wire.limits import Steps


def send_small(worker: Worker, item: Listed, *, create_only: bool) -> Steps[Copied]:
    """Send an object: GET into memory, then PUT.

    Args:
        worker: The worker of this thread.
        item: The object, as the source lists it.
        create_only: Write only where the target has no such object.
    """
    key, size, etag = item
    source, target = worker.source, worker.target
    try:
        got = yield from source.request("GET", source.path(key), limit_bytes=size)
    except TooLongError:
        raise EndedError(ObjectOutcome.CHANGED) from None
    if got.status != 200:
        raise not_read(source, got)
    source.granted += 1
    if got.size != size or changed(got.headers, etag):
        raise EndedError(ObjectOutcome.CHANGED)
    headers = kept(got.headers)
    conditions = CREATE_ONLY if create_only else ()
    path = target.path(key)
    put = yield from target.request("PUT", path, "", headers + conditions, got.parts, size)
    if create_only and put.status in (400, 501):
        # Where the store refused the condition, stop sending it.
        without = yield from target.request("PUT", path, "", headers, got.parts, size)
        if without.status == 200:
            worker.shared.create_only, put = False, without
    if put.status != 200:
        return (yield from not_written(worker, item, put))
    target.granted += 1
    written = put.headers.get("etag", "").strip('"')
    if written == etag and is_md5(etag):
        return Copied(ObjectOutcome.COPIED, written, Comparison.ETAG)
    md5 = hashlib.md5(usedforsecurity=False)
    content = xxh3()
    for part in got.parts:
        md5.update(part)
        content.update(part)
    return (yield from proven(worker, item, written, md5.hexdigest(), content.hexdigest()))

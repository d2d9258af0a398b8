"""Objects that the store copies itself, where source and target are one store (CopyObject)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from include.juicefs_storage.adapters.s3.client import error_code, is_md5
from include.juicefs_storage.adapters.s3.engine.answers import CREATE_ONLY, ETAG, EndedError, changed
from include.juicefs_storage.adapters.s3.engine.proof import proven
from include.juicefs_storage.objects.model import Comparison, Copied, Listed, ObjectOutcome

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.engine.worker import Worker
    from include.juicefs_storage.adapters.s3.signing import Headers
    from include.juicefs_storage.adapters.s3.wire.limits import Steps

#: A store copies larger objects for so long before it answers that they are better sent.
SERVER_COPY_BYTES = 2**30
#: The bytes that a store is given time for: none moves over the wire.
_TRANSFER_BYTES = 16 * 2**20


def copy_on_server(worker: Worker, item: Listed, *, overwrite: bool) -> Steps[Copied | None]:
    """Copy an object with CopyObject, which moves no byte through this process.

    Args:
        worker: The worker of this thread.
        item: The object, as the source lists it.
        overwrite: Replace the target's object where there is one.

    Returns:
        The result; None where the store does not copy, or not this object.
    """
    key, _, etag = item
    source, target = worker.source, worker.target
    headers: Headers = (("x-amz-copy-source", source.copy_source(key)),)
    if etag:
        headers += (("x-amz-copy-source-if-match", f'"{etag}"'),)
    if worker.shared.create_only and not overwrite:
        headers += CREATE_ONLY
    headers += target.new_headers
    answer = yield from target.request("PUT", target.path(key), "", headers, None, 0, transfer_bytes=_TRANSFER_BYTES)
    code = error_code(answer)
    if answer.status == 404 and code == "NoSuchKey":
        raise EndedError(ObjectOutcome.VANISHED)
    if answer.status != 200 or code:
        # 412: changed at the source or appeared on the target; an error after 200: the store was too slow. Both are
        # for the long way to find out. Anything else: the store does not copy, or these keys may not read there.
        if answer.status not in (200, 412):
            worker.shared.server_copy = False
        return None
    source.granted += 1
    target.granted += 1
    found = ETAG.search(answer.body)
    written = found[1].decode() if found else ""
    done = ObjectOutcome.OVERWRITTEN if overwrite else ObjectOutcome.COPIED
    if written == etag and is_md5(etag):
        return Copied(done, written, Comparison.ETAG)
    now = yield from source.request("HEAD", source.path(key))
    if now.status == 404 or changed(now.headers, etag):  # a store that ignores the condition
        raise EndedError(ObjectOutcome.CHANGED)
    copied = yield from proven(worker, item, written)
    return copied._replace(outcome=done) if copied.outcome is ObjectOutcome.COPIED else copied

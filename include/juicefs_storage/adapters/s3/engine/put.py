"""A PUT of a whole object, in the form that the target takes."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Protocol

from include.juicefs_storage.adapters.s3.client import error_code
from include.juicefs_storage.adapters.s3.engine.answers import CREATE_ONLY

if TYPE_CHECKING:
    from collections.abc import Callable

    from include.juicefs_storage.adapters.s3.engine.worker import Worker
    from include.juicefs_storage.adapters.s3.signing import Headers
    from include.juicefs_storage.adapters.s3.wire.limits import Steps
    from include.juicefs_storage.adapters.s3.wire.message import Response


class Digest(Protocol):
    """Finds the MD5 of what is sent, in hex."""

    def __call__(self, *, read: bool) -> Steps[str]:
        """Return it; with `read` from the content, whatever else seems to tell."""


def put_object(
    worker: Worker, send: Callable[[Headers], Steps[Response]], digest: Digest, *, create_only: bool
) -> Steps[Response]:
    """Send an object, in another form where the target refuses it: what it takes is remembered.

    A bucket with an object lock refuses a PUT without Content-MD5, some stores the condition of `create_only`.

    Args:
        worker: The worker of this thread.
        send: Sends it with some more headers.
        digest: Only asked where the target wants an MD5.
        create_only: Write only where the target has no such object.

    Returns:
        The target's answer, which may be a refusal.
    """
    shared, read = worker.shared, False
    while True:
        headers: Headers = ()
        if with_md5 := shared.wants_md5:
            headers = (("content-md5", b64encode(bytes.fromhex((yield from digest(read=read)))).decode()),)
        answer = yield from send(headers + CREATE_ONLY if create_only else headers)
        if answer.status == 400 and not with_md5 and b"content-md5" in answer.body.lower():
            shared.wants_md5 = True
            continue
        if answer.status == 400 and with_md5 and not read and error_code(answer) == "BadDigest":
            read = True  # the ETag has the form of an MD5 and is none
            continue
        if create_only and answer.status in (400, 501):
            # Where the store refused the condition, stop sending it.
            without = yield from send(headers)
            if without.status == 200:
                shared.create_only, answer = False, without
        return answer

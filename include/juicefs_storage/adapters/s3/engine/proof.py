"""Whether the target has what the source has: every copy is proven end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from include.juicefs_storage.adapters.s3.client import stream
from include.juicefs_storage.adapters.s3.engine.answers import EndedError
from include.juicefs_storage.adapters.s3.wire.message import TooLongError
from include.juicefs_storage.objects.model import Compared, Comparison, Copied, Listed, ObjectOutcome

if TYPE_CHECKING:
    from include.juicefs_storage.adapters.s3.client import S3Client
    from include.juicefs_storage.adapters.s3.engine.worker import Worker
    from include.juicefs_storage.adapters.s3.wire.limits import Steps
    from include.juicefs_storage.adapters.s3.wire.message import Buffer, Response


class Hash(Protocol):
    """A hash of `hashlib` or of `xxhash`."""

    def update(self, data: Buffer, /) -> None:
        """Take the next piece."""

    def hexdigest(self) -> str:
        """Return the digest of all pieces."""
        ...

    def copy(self) -> Hash:
        """Return another hash that has taken the same pieces."""
        ...


def xxh3() -> Hash:
    """Return the hash that contents are compared by: 100 times as fast as MD5."""
    from xxhash import xxh3_64

    return xxh3_64()


def not_written(worker: Worker, item: Listed, put: Response) -> Steps[Copied]:
    """Explain a PUT that was refused: the object exists by now, or the refusal is final.

    Args:
        worker: The worker of this thread.
        item: The object, as the source lists it.
        put: The answer to the PUT.

    Raises:
        ObjectError: For good.
    """
    if put.status != 412:
        raise worker.target.refuse("PUT", put)
    compared = yield from compare(worker, item)
    # An earlier try may have written it, and its answer got lost.
    outcome = ObjectOutcome.COPIED if put.tries > 1 and compared.outcome is ObjectOutcome.SAME else compared.outcome
    return Copied(outcome, comparison=Comparison.CONTENT, checksum=compared.checksum)


def proven(worker: Worker, item: Listed, written: str, md5: str = "", content: str = "") -> Steps[Copied]:
    """Prove that the target stored what it was sent: its ETag is the MD5 of that, or it is read back.

    Args:
        worker: Of this thread.
        item: What was copied.
        written: The target's ETag.
        md5: Of what was sent, if it was hashed.
        content: xxh3-64 of what was sent, if it was hashed.
    """
    if md5 and md5 == written:
        return Copied(ObjectOutcome.COPIED, written, Comparison.CONTENT, content)
    if not content:
        try:
            read = yield from _content(worker.source, item)
        except TooLongError:
            raise EndedError(ObjectOutcome.CHANGED) from None
        if read is None:
            raise EndedError(ObjectOutcome.VANISHED)
        content = read
    try:
        stored = yield from _content(worker.target, item)
    except TooLongError:
        stored = None
    if stored == content:
        return Copied(ObjectOutcome.COPIED, written, Comparison.CONTENT, content)
    return Copied(ObjectOutcome.FAILED, written, Comparison.CONTENT, detail="read back, it is not what was sent")


def compare(worker: Worker, item: Listed) -> Steps[Compared]:
    """Read both sides and compare xxh3-64."""
    source = ""
    try:
        source = (yield from _content(worker.source, item)) or ""
        if not source:
            return Compared(ObjectOutcome.VANISHED)
        target = yield from _content(worker.target, item)
    except TooLongError:  # longer than listed: nothing more needs to be read
        return Compared(ObjectOutcome.DIFFERENT, source)
    if target is None:
        return Compared(ObjectOutcome.MISSING, source)
    return Compared(ObjectOutcome.SAME if source == target else ObjectOutcome.DIFFERENT, source)


def _content(client: S3Client, item: Listed) -> Steps[str | None]:
    """Hash one object: xxh3-64 in hex; None where there is none.

    Raises:
        TooLongError: It is longer than it was listed.
    """
    hashed = yield from stream(client, item[0], lambda _: xxh3(), item[1])
    return None if hashed is None else hashed.hexdigest()

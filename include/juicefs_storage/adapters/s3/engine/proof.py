"""Whether the target has what the source has: every copy is proven end to end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from include.juicefs_storage.adapters.s3.engine.answers import EndedError
from include.juicefs_storage.adapters.s3.stream import stream
from include.juicefs_storage.adapters.s3.wire.message import TooLongError
from include.juicefs_storage.objects.model import Compared, Comparison, Copied, Listed, ObjectOutcome
from include.juicefs_storage.volume.checksum import Crc32c, checksum_problem, recorded_checksum

if TYPE_CHECKING:
    from collections.abc import Mapping

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
    source = None
    try:
        source = yield from _read(worker.source, item)
        if source is None:
            return Compared(ObjectOutcome.VANISHED)
        target = yield from _read(worker.target, item)
    except TooLongError:  # longer than listed: nothing more needs to be read
        return Compared(ObjectOutcome.DIFFERENT, source.content.hexdigest() if source else "")
    content, problem = source.content.hexdigest(), source.problem
    if target is None:
        return Compared(ObjectOutcome.MISSING, content)
    if content == target.content.hexdigest():
        return Compared(ObjectOutcome.DAMAGED if problem else ObjectOutcome.SAME, content, problem)
    problems = {"source": problem, "target": target.problem}
    detail = "; ".join(f"on the {side} {problem}" for side, problem in problems.items() if problem)
    return Compared(ObjectOutcome.DIFFERENT, content, detail)


class _Read:
    """An object as it comes in.

    Attributes:
        content: xxh3-64 of it.
    """

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.content, self._headers = xxh3(), headers
        self._checksum = None if recorded_checksum(headers) is None else Crc32c()

    def update(self, data: Buffer, /) -> None:
        self.content.update(data)
        if self._checksum is not None:
            self._checksum.update(data)

    @property
    def problem(self) -> str:
        """How it differs from the checksum that JuiceFS left with it."""
        return checksum_problem(self._headers, self._checksum) if self._checksum is not None else ""


def _read(client: S3Client, item: Listed) -> Steps[_Read | None]:
    """Read one object; None where there is none.

    Raises:
        TooLongError: It is longer than it was listed.
    """
    return stream(client, item[0], _Read, item[1])


def _content(client: S3Client, item: Listed) -> Steps[str | None]:
    """Hash one object: xxh3-64 in hex; None where there is none. See `_read`."""
    found = yield from _read(client, item)
    return None if found is None else found.content.hexdigest()

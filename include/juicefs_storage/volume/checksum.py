"""The checksum that JuiceFS keeps with a block: CRC32C of the object as it is stored, in the object's own metadata.

The kinds `minio` and `s3` write it with every PUT of a block, and clients verify it where they read a whole object:
`Put` and `Get` of pkg/object/s3.go, and checksum.go, of JuiceFS 1.4. With kind `s3`, `?disable-checksum=true` in the
bucket leaves both out. An object that another tool wrote may have none.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Among the headers of an answer to GET or HEAD, whose names are in lower case.
CHECKSUM_HEADER = "x-amz-meta-crc32c"


class Crc32c:
    """CRC32C (RFC 3720, B.4) of what it is fed, piece by piece."""

    def __init__(self) -> None:
        from google_crc32c import extend

        self._extend, self.value = extend, 0

    def update(self, data: bytes | memoryview, /) -> None:
        """Take the next piece."""
        self.value = self._extend(self.value, data if isinstance(data, bytes) else bytes(data))


def recorded_checksum(headers: Mapping[str, str]) -> int | None:
    """Return the checksum that JuiceFS left with an object; None where there is none that a client would verify."""
    text = headers.get(CHECKSUM_HEADER, "")
    return int(text) & 0xFFFFFFFF if text.isdecimal() else None


def checksum_problem(headers: Mapping[str, str], found: Crc32c) -> str:
    """Say how an object's content differs from the checksum that JuiceFS left with it.

    Args:
        headers: Of the object.
        found: Has been fed all of its content.

    Returns:
        Empty where it does not differ, or where there is no checksum.
    """
    expected = recorded_checksum(headers)
    if expected is None or expected == found.value:
        return ""
    return f"its content has the CRC32C {found.value}, JuiceFS wrote {expected}"

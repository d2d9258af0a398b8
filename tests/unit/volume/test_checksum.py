from __future__ import annotations

import pytest

from include.juicefs_storage.volume.checksum import CHECKSUM_HEADER, Crc32c, checksum_problem, recorded_checksum


@pytest.mark.parametrize(
    ("content", "checksum"),  # RFC 3720, B.4; the last is the check value of the CRC catalogue
    [(bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E), (b"123456789", 0xE3069283)],
)
def test_crc32c_of_known_contents_in_pieces_of_any_kind(content: bytes, checksum: int) -> None:
    found = Crc32c()
    found.update(content[:5])
    found.update(memoryview(content)[5:])
    assert found.value == checksum
    assert checksum_problem({CHECKSUM_HEADER: str(checksum)}, found) == ""


def test_other_content_is_named_with_both_checksums() -> None:
    found = Crc32c()
    found.update(b"123456780")
    problem = checksum_problem({CHECKSUM_HEADER: "3808858755"}, found)
    assert str(found.value) in problem
    assert "3808858755" in problem


@pytest.mark.parametrize("headers", [{}, {CHECKSUM_HEADER: ""}, {CHECKSUM_HEADER: "none"}, {CHECKSUM_HEADER: "1, 2"}])
def test_what_no_client_would_verify_is_no_checksum(headers: dict[str, str]) -> None:
    assert recorded_checksum(headers) is None
    assert checksum_problem(headers, Crc32c()) == ""

"""From a slice to the keys and sizes of its objects."""

from __future__ import annotations

import pytest

from include.juicefs_storage.volume.layout import ObjectSizes, block_objects
from tests.support.fakes import setting

MIB = 1 << 20
EXACT = ObjectSizes()


def test_block_keys() -> None:
    assert list(block_objects(setting(), 1_234_567, 9 * MIB)) == [
        ("myjfs/chunks/1/1234/1234567_0_4194304", 4 * MIB),
        ("myjfs/chunks/1/1234/1234567_1_4194304", 4 * MIB),
        ("myjfs/chunks/1/1234/1234567_2_1048576", MIB),
    ]
    assert list(block_objects(setting(HashPrefix=True), 300, 1)) == [("myjfs/chunks/2C/0/300_0_1", 1)]
    assert list(block_objects(setting(), 5, 0)) == []


@pytest.mark.parametrize(
    ("sizes", "length", "possible", "impossible"),
    [
        (EXACT, 4096, [4096], [0, 3, 4095, 4097]),
        (ObjectSizes("lz4"), 4 << 20, [16_449, 1 << 20, (4 << 20) + 16_464], [0, 3, 16_448, 5 << 20]),
        (ObjectSizes("zstd"), 4 << 20, [128, 200, (4 << 20) + 16_384], [0, 3, 127, 5 << 20]),
        (ObjectSizes("", True), 4096, [4096 + 287], [0, 3, 4095, 8192]),
        (ObjectSizes("lz4", True), 4096, [17, 4096 + 300], [0, 3, 16, 8192]),
    ],
)
def test_what_cannot_hold_a_block(sizes: ObjectSizes, length: int, possible: list[int], impossible: list[int]) -> None:
    assert [size for size in possible if not sizes.fit(length, size)] == []
    assert [size for size in impossible if sizes.fit(length, size)] == []


@pytest.mark.parametrize("content", [b"\0" * (4 << 20), bytes(range(256)) * 16, b"a"])
def test_the_bounds_hold_for_real_compressors(content: bytes) -> None:
    import pyarrow as pa

    for codec, name in (("lz4_raw", "lz4"), ("zstd", "zstd")):
        size = pa.compress(content, codec=codec, asbytes=True)
        assert ObjectSizes(name).fit(len(content), len(size))

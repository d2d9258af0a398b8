"""Whether an object holds a block is seen by its checksum, and by decompressing it."""

from __future__ import annotations

import pytest

from include.juicefs_storage.volume.block_contents import CODECS, GONE, BlockContents, holds
from include.juicefs_storage.volume.checksum import CHECKSUM_HEADER, Crc32c
from include.juicefs_storage.volume.layout import ObjectSizes
from tests.support.fakes import FakeStore


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("length", [1, 100, 70_000])
def test_only_a_whole_block_decompresses_to_its_length(compression: str, length: int) -> None:
    import pyarrow as pa

    content = (bytes(range(256)) * 300)[:length]
    stored = pa.compress(content, codec=CODECS[compression], asbytes=True)
    assert holds(stored, length, compression)
    assert not holds(stored, length + 1, compression)
    assert not holds(stored, length - 1, compression)
    cuts = range(len(stored)) if len(stored) < 2_000 else range(0, len(stored), 37)
    assert [cut for cut in cuts if holds(stored[:cut], length, compression)] == []


def test_what_is_wrong_with_a_block_is_said_in_the_words_of_what_tells_it() -> None:
    checksum = Crc32c()
    checksum.update(b"." * 100)
    store = FakeStore(dict.fromkeys(("1_0_100", "2_0_100", "3_0_100", "4_0_100"), 100), contents={"2_0_100": "flipped"})
    store.objects["4_0_100"] = 99
    store.headers = {key: {CHECKSUM_HEADER: str(checksum.value)} for key in ("1_0_100", "2_0_100")}
    contents = BlockContents(store, ObjectSizes())
    found = contents.problems([(f"{number}_0_100", 100) for number in range(1, 6)])
    assert (found[0], found[2], found[4]) == ("", "", GONE)
    assert f"JuiceFS wrote {checksum.value}" in found[1]
    assert found[3] == "99 bytes that cannot hold a block of 100 bytes"
    assert contents.told_by == {"checksum": 1, "length": 1}


def test_the_block_of_another_key_with_its_own_checksum_does_not_decompress_to_the_length() -> None:
    import pyarrow as pa

    stored = pa.compress(bytes(70), codec="zstd", asbytes=True)
    store, checksum = FakeStore({"1_0_80": len(stored)}, contents={"1_0_80": stored.decode("latin-1")}), Crc32c()
    checksum.update(stored)
    store.headers["1_0_80"] = {CHECKSUM_HEADER: str(checksum.value)}
    contents = BlockContents(store, ObjectSizes("zstd"))
    assert contents.problems([("1_0_80", 70)]) == [""]
    assert "do not decompress to a block of 80 bytes" in contents.problems([("1_0_80", 80)])[0]
    # What is encrypted cannot be decompressed.
    assert BlockContents(store, ObjectSizes("zstd", encrypted=True)).problems([("1_0_80", 80)]) == [""]

"""Whether an object holds a block is seen by decompressing it."""

from __future__ import annotations

import pytest

from include.juicefs_storage.adapters.compressed_blocks import CODECS, holds


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

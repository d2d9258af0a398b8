"""From a slice of the metadata to the keys of the objects that hold it."""

from __future__ import annotations

from collections.abc import Iterator

from include.juicefs_storage.core.setting import Setting


def block_objects(setting: Setting, slice_id: int, size: int) -> Iterator[tuple[str, int]]:
    """The objects of one slice: key and uncompressed length in bytes.

    The layout is `cachedStore.key` of JuiceFS 1.4 (pkg/chunk/cached_store.go); the volume's name is the prefix.

    Args:
        setting: The volume's setting: name, block size, hash prefix.
        slice_id: `chunkid` of table `jfs_chunk_ref`.
        size: `size` of that row in bytes.
    """
    for index in range((size + setting.block_bytes - 1) // setting.block_bytes):
        length = min(setting.block_bytes, size - index * setting.block_bytes)
        if setting.hash_prefix:
            folder = f"{slice_id % 256:02X}/{slice_id // 1_000_000}"
        else:
            folder = f"{slice_id // 1_000_000}/{slice_id // 1_000}"
        yield f"{setting.name}/chunks/{folder}/{slice_id}_{index}_{length}", length

"""The needed blocks of a run, written down once beside the manifests, for all of its partitions to read.

A file is a stretch of keys in the order of a listing, `00000.parquet` and so on; `index.json` says which. So every task
works on what the metadata said at one moment, and none but the first reads all of it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from include.juicefs_storage.adapters.manifests import WRITING, Folder, parquet, write
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.merge import cut_page
from include.juicefs_storage.objects.model import KeyRange, Page

_FILE_KEYS, _GROUP_KEYS = 50_000, 10_000
_INDEX = "index.json"


@dataclass
class NeededFiles:
    """The files of one run.

    Attributes:
        folder: Theirs alone.
    """

    folder: Folder
    _index: list[tuple[str, str, str]] = field(default_factory=list)

    def write(self, pages: Iterator[Page]) -> Iterator[Page]:
        """Write pages down and pass them on. Only what was taken to its end can be read."""
        self.folder.mkdir(parents=True, exist_ok=True)
        keys: list[str] = []
        sizes: list[int] = []
        for page in pages:
            keys += page.keys
            sizes += page.sizes
            if len(keys) >= _FILE_KEYS:
                self._write(keys, sizes)
                keys, sizes = [], []
            yield page
        if keys:
            self._write(keys, sizes)
        write(self.folder / _INDEX, json.dumps(self._index).encode())

    def _write(self, keys: list[str], sizes: list[int]) -> None:
        import pyarrow as pa

        content, name = io.BytesIO(), f"{len(self._index):05}.parquet"
        table = pa.table({"key": pa.array(keys, pa.string()), "length": pa.array(sizes, pa.int64())})
        options = {**WRITING, "use_dictionary": ["length"]}
        parquet().write_table(table, content, row_group_size=_GROUP_KEYS, **options)
        write(self.folder / name, content.getvalue())
        self._index.append((keys[0], keys[-1], name))

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """Yield the needed blocks of a range, in order; sizes are the blocks' lengths.

        Raises:
            PermanentError: They were not written down.
        """
        if not self._index:
            file = self.folder / _INDEX
            if not file.exists():
                raise PermanentError(
                    f"Expected the list of the blocks that the volume needs in {self.folder}, found none.",
                    next_step="clear plan_partitions with Downstream; all workers need the same folder for manifests",
                )
            self._index = [(first, last, name) for first, last, name in json.loads(file.read_bytes())]
        for first, last, name in self._index:
            if (keys.after is None or last > keys.after) and (keys.until is None or first <= keys.until):
                yield from _within(self._read(name), keys)

    def _read(self, name: str) -> Iterator[Page]:
        with (self.folder / name).open("rb") as stream:
            opened = parquet().ParquetFile(stream)
            for group in range(opened.num_row_groups):
                table = opened.read_row_group(group)
                found = table.column("key").to_pylist()
                yield Page(found, table.column("length").to_pylist(), [""] * len(found))


def _within(pages: Iterator[Page], keys: KeyRange) -> Iterator[Page]:
    for page in pages:
        kept = page
        if keys.after is not None:
            kept = cut_page(kept, keys.after)[1] if kept.keys[0] <= keys.after else kept
        if keys.until is not None:
            kept = cut_page(kept, keys.until)[0]
        if kept.keys:
            yield kept

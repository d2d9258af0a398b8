"""Manifests: what became of every key of a partition, as Parquet.

A checkpoint is a file of its own, `<name>/00000001.parquet` and so on; at the end they become one, `<name>.parquet`,
sorted by key. Its footer says what it belongs to, so that no manifest is taken for another's.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

from include.juicefs_storage.copy.manifest import ManifestRow
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.comparison import COMPARISONS, OUTCOMES, Rows
from include.juicefs_storage.objects.model import Comparison, ObjectOutcome
from include.juicefs_storage.objects.totals import Totals

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

_ABOUT, _TOTALS, _LAST = b"juicefs_storage.about", b"juicefs_storage.totals", b"juicefs_storage.last_key"
#: Keys differ from their neighbours in little: half of the size, and no slower than any other way that was measured.
WRITING: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["outcome", "comparison"],
    "column_encoding": {"key": "DELTA_BYTE_ARRAY"},
}


class Folder(Protocol):
    """What is needed of a `pathlib.Path` or an `ObjectStoragePath`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    def __truediv__(self, name: str, /) -> Folder: ...
    def exists(self) -> bool: ...  # noqa: D102
    def iterdir(self) -> Iterator[Folder]: ...  # noqa: D102
    @property
    def parent(self) -> Folder: ...  # noqa: D102
    def mkdir(self, *, parents: bool, exist_ok: bool) -> None: ...  # noqa: D102
    def open(self, mode: str, /) -> IO[bytes]: ...  # noqa: D102
    def read_bytes(self) -> bytes: ...  # noqa: D102
    def write_bytes(self, content: bytes, /) -> int: ...  # noqa: D102
    def replace(self, target: Any, /) -> Any: ...  # noqa: D102
    def unlink(self) -> None: ...  # noqa: D102


@dataclass
class ParquetManifest:
    """`manifest.Manifest`: the manifest of one partition.

    Attributes:
        folder: Of the run.
        name: Of the partition.
        about: What it belongs to: kept in the file, compared when it is read.
    """

    folder: Folder
    name: str
    about: dict[str, str]

    def __post_init__(self) -> None:
        self._parts: list[Folder] | None = None

    @property
    def file(self) -> Folder:
        """The finished manifest."""
        return self.folder / f"{self.name}.parquet"

    def resume(self) -> tuple[str | None, Totals]:
        """See manifest.Manifest: the checkpoints of a try that was killed."""
        # What is listed and copied first takes longer than the import that the first checkpoint waits for.
        threading.Thread(target=parquet, name="import pyarrow", daemon=True).start()
        totals, last = Totals(), None
        self._parts = []
        for part in self._found_parts():
            about, counted, last = _read_footer(part)
            if about != self.about:
                raise PermanentError(
                    f"Manifest {part}: expected a checkpoint of {self.about}, found one of {about}.",
                    next_step="clear plan_partitions with Downstream",
                )
            totals.merge(counted)
            self._parts.append(part)
        if not self._parts and self.file.exists():
            # An earlier pass left it. Without it nothing claims that this pass is complete before it is.
            self.file.unlink()
        return last, totals

    def append(self, rows: Rows) -> None:
        """See manifest.Manifest."""
        pq = parquet()
        if self._parts is None:
            self.resume()
        parts = cast("list[Folder]", self._parts)
        totals = Totals()
        totals.add_rows(rows)
        content = io.BytesIO()
        pq.write_table(self._described(_table(rows), totals, rows.keys[-1]), content, **WRITING)
        folder = self.folder / self.name
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{len(parts) + 1:08}.parquet"
        write(part, content.getvalue())
        parts.append(part)

    def finish(self) -> None:
        """See manifest.Manifest: one row group a checkpoint, in order."""
        pq = parquet()
        parts, self._parts = self._parts or [], None
        self.folder.mkdir(parents=True, exist_ok=True)
        if len(parts) == 1:
            parts[0].replace(self.file)
            return
        totals, last = Totals(), ""
        for part in parts:
            _, counted, last = _read_footer(part)
            totals.merge(counted)
        schema = self._described(_table(Rows()), totals, last).schema
        # Under another name first: a manifest that is there is whole.
        unfinished = self.folder / f"{self.name}.unfinished"
        with unfinished.open("wb") as file, pq.ParquetWriter(file, schema, **WRITING) as writer:
            for part in parts:
                writer.write_table(pq.read_table(io.BytesIO(part.read_bytes())).cast(schema))
        unfinished.replace(self.file)
        for part in parts:
            part.unlink()

    def _found_parts(self) -> list[Folder]:
        folder = self.folder / self.name
        if not folder.exists():
            return []
        parts = sorted(
            (part for part in folder.iterdir() if part.name.endswith(".parquet")), key=lambda part: part.name
        )
        expected = [f"{number:08}.parquet" for number in range(1, len(parts) + 1)]
        # Do not resume behind a gap: what follows it is done again.
        return [part for part, name in zip(parts, expected, strict=True) if part.name == name]

    def _described(self, table: pa.Table, totals: Totals, last: str) -> pa.Table:
        return table.replace_schema_metadata(
            {_ABOUT: json.dumps(self.about), _TOTALS: json.dumps(totals.as_json()), _LAST: last.encode()}
        )


def write(file: Folder, content: bytes) -> None:
    """Write a file that is either whole or not there."""
    unfinished = file.parent / f"{file.name}.unfinished"
    unfinished.write_bytes(content)
    unfinished.replace(file)


def parquet() -> Any:
    """Import `pyarrow.parquet` so that it gives memory back: with its own allocator a task holds 50 MiB more."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())
    return pq


def _table(rows: Rows) -> pa.Table:
    import pyarrow as pa

    count = len(rows)
    source_etags = pa.array(rows.source_etags, pa.string())
    same = rows.target_etags == rows.source_etags
    return pa.table(
        {
            "key": pa.array(rows.keys, pa.string()),
            "size": pa.array(rows.sizes, pa.int64()),
            "source_etag": source_etags,
            "target_etag": source_etags if same else pa.array(rows.target_etags, pa.string()),
            "checksum": _sparse(rows.checksums, count),
            "time": pa.repeat(pa.scalar(int(rows.time_s * 1000), pa.timestamp("ms", "UTC")), count),
            "outcome": _coded(rows.outcomes, OUTCOMES),
            "comparison": _coded(rows.comparisons, COMPARISONS),
            "detail": _sparse(rows.details, count),
        }
    )


def _sparse(texts: dict[int, str], count: int) -> pa.Array:
    import pyarrow as pa

    return pa.array([texts.get(row) for row in range(count)], pa.string()) if texts else pa.nulls(count, pa.string())


def _coded(codes: bytearray, names: tuple[str, ...]) -> pa.Array:
    import pyarrow as pa

    places = pa.Array.from_buffers(pa.int8(), len(codes), [None, pa.py_buffer(bytes(codes))])
    return pa.DictionaryArray.from_arrays(places, pa.array([str(name) for name in names], pa.string()))


@dataclass(frozen=True)
class ManifestReader:
    """A finished manifest, read a row group at a time.

    Raises:
        PermanentError: The file is damaged, or is no manifest.
    """

    file: Folder

    def about(self) -> tuple[dict[str, str], Totals]:
        """Return what it belongs to, and what it says was counted."""
        about, totals, _ = _read_footer(self.file)
        return about, totals

    def count(self) -> Totals:
        """Count its rows again: every one is read, of the columns that this takes."""
        totals = Totals()
        with self._opened() as manifest:
            for group in range(manifest.num_row_groups):
                totals.merge(_grouped(manifest.read_row_group(group, ["size", "outcome", "comparison"])))
        return totals

    def rows(self, outcomes: Collection[ObjectOutcome]) -> Iterator[ManifestRow]:
        """Yield the rows with one of these outcomes, ordered by key."""
        import pyarrow.compute as pc

        names = [str(outcome) for outcome in outcomes]
        with self._opened() as manifest:
            for group in range(manifest.num_row_groups):
                found = manifest.read_row_group(group, ["outcome"]).column("outcome").cast("string")
                if not pc.any(pc.is_in(found, _strings(names))).as_py():
                    continue
                table = manifest.read_row_group(group, list(ManifestRow._fields))
                table = table.filter(pc.is_in(table.column("outcome").cast("string"), _strings(names)))
                for row in table.to_pylist():
                    yield ManifestRow(**row)

    def listed(self) -> Iterator[tuple[list[str], list[int]]]:
        """Yield keys and sizes of what the source had, a row group at a time."""
        import pyarrow.compute as pc

        with self._opened() as manifest:
            for group in range(manifest.num_row_groups):
                table = manifest.read_row_group(group, ["key", "size", "outcome"])
                table = table.filter(pc.not_equal(table.column("outcome").cast("string"), str(ObjectOutcome.EXTRA)))
                yield table.column("key").to_pylist(), table.column("size").to_pylist()

    @contextmanager
    def _opened(self) -> Iterator[ParquetFile]:
        from pyarrow.parquet import ParquetFile

        with self.file.open("rb") as stream, _explained(self.file):
            yield ParquetFile(stream)


def _strings(names: list[str]) -> pa.Array:
    """Return names in the form that Arrow compares."""
    import pyarrow as pa

    return pa.array(names, pa.string())


def _grouped(table: pa.Table) -> Totals:
    totals = Totals()
    plain = table.set_column(1, "outcome", table.column("outcome").cast("string")).set_column(
        2, "comparison", table.column("comparison").cast("string")
    )
    counted = plain.group_by(["outcome", "comparison"]).aggregate([("size", "count"), ("size", "sum")])
    for row in counted.to_pylist():
        totals.add(ObjectOutcome(row["outcome"]), Comparison(row["comparison"]), row["size_count"], row["size_sum"])
    return totals


def _read_footer(file: Folder) -> tuple[dict[str, str], Totals, str]:
    from pyarrow.parquet import read_schema

    with file.open("rb") as stream, _explained(file):
        found = read_schema(stream).metadata or {}
        return (
            json.loads(found[_ABOUT]),
            Totals.from_json(json.loads(found[_TOTALS])),
            found[_LAST].decode(),
        )


@contextmanager
def _explained(file: Folder) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise PermanentError(
            f"Manifest {file} cannot be read ({type(error).__name__}).",
            next_step="remove it and clear the task of its partition: it finds in place what it had copied",
        ) from None

"""What a volume of a million slices needs, beside `juicefs fsck` on the same volume: `python -m benchmarks.needed`.

MariaDB holds the rows of such a volume (jfs_chunk, jfs_chunk_ref, jfs_node, jfs_edge, made by SQL), the cheap server of
`stub_store` its objects. Every program is a process of its own; who begins rotates. `--run NAME` is one of ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.peers import Place
from benchmarks.population import KIB, Population
from benchmarks.report import PAGE, machine
from benchmarks.stores import stub_stores
from include.juicefs_storage.adapters.manifests import ParquetManifest
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.adapters.needed_files import NeededFiles
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.copy.partitions import cut_partitions
from include.juicefs_storage.copy.run import Transfer
from include.juicefs_storage.copy.segments import Ruler
from include.juicefs_storage.objects.model import KeyRange, ObjectOutcome
from include.juicefs_storage.volume.comparison import NeededBlocks, still_needed
from include.juicefs_storage.volume.difference import missing_blocks
from include.juicefs_storage.volume.layout import ObjectSizes
from include.juicefs_storage.volume.needed import needed_objects, to_pages
from include.juicefs_storage.volume.setting import Setting
from lab.mariadb import MariaDB
from lab.process import LabError, binary, run

SLICES, BYTES = 1_000_000, 4 * KIB
NAME, _PER_FILE = "vol", 100
MOST_MIB = 300
_DEADLINE_S = 600
_BEGIN, _END = "<!-- needed -->", "<!-- end of needed -->"
_TITLES = {
    "needed": "the needed set",
    "needed-hashed": "the needed set, with HashPrefix",
    "needed-tenth": "the needed set, the last tenth (`since_id`)",
    "dag": "the DAG's way: written down, then beside two listings, a manifest row for each block",
    "check": "the needed set beside a listing: missing, cut, extra",
    "fsck": "`juicefs fsck`: missing",
}


class Hook:
    """As much of Airflow's MySqlHook as the adapter takes: Airflow itself is not what is measured."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url.replace("(", "").replace(")", ""))

    def get_conn(self) -> Any:
        """A new connection."""
        import MySQLdb

        return MySQLdb.connect(
            host=self._url.hostname, port=self._url.port, user=self._url.username, password=os.environ["META_PASSWORD"],
            database=self._url.path[1:],
        )  # fmt: skip


def _store(endpoint: str, prefix: str = "") -> S3Store:
    return S3Store(endpoint, "bench", prefix, "stub-key", "stub-secret")


def work(name: str, metaurl: str, endpoint: str, slices: int) -> int:
    """One of our programs; returns how many blocks it counted."""
    # The plots of the benchmarks bring numpy along, and pyarrow would load it: in requirements.txt there is none.
    sys.modules["numpy"] = None  # type: ignore[assignment]
    metadata = MySqlMetadata(Hook(metaurl))
    setting = metadata.read_setting()
    if name == "needed-hashed":
        setting = Setting(json.dumps(json.loads(setting.raw) | {"HashPrefix": True}).encode())
    if name == "check":
        found = missing_blocks(metadata, setting, S3Bucket(_store(endpoint)))
        if found.missing or found.different or found.extra:
            raise LabError(f"expected nothing to be missing, found {found}")
        return found.present
    if name == "dag":
        with tempfile.TemporaryDirectory() as folder:
            return _as_the_dag(metadata, setting, S3Bucket(_store(endpoint, f"{setting.name}/")), Path(folder))
    first_id = slices - slices // 10 + 1 if name == "needed-tenth" else 0
    return sum(1 for _ in needed_objects(metadata, setting, first_id))


def _as_the_dag(metadata: MySqlMetadata, setting: Setting, side: S3Bucket, folder: Path) -> int:
    """plan_partitions and one verify of juicefs_storage_sync, the store being source and target."""
    files, ruler = NeededFiles(folder / "needed"), Ruler()
    track = ruler.track()
    for page in files.write(to_pages(needed_objects(metadata, setting), side.store.prefix)):
        ruler.add_page(track, page)
    cut_partitions(ruler.segments(), KeyRange())
    needed = NeededBlocks("chunks/", ObjectSizes.of(setting), files.pages, still_needed(metadata))
    manifest = ParquetManifest(folder / "verify", "00000", {})
    engine = NativeEngine(side.store, side.store)
    totals = Transfer(side, side, engine, needed=needed).verify(KeyRange(), manifest)
    return totals.objects(ObjectOutcome.SAME)


def fill(mariadb: MariaDB, slices: int) -> None:
    """The rows of a volume with so many slices, a hundred of them in a file."""
    numbers = f"seq_1_to_{slices}"
    mariadb.query(f"INSERT INTO jfs_chunk_ref (chunkid, size, refs) SELECT seq, {BYTES}, 1 FROM {numbers}")  # noqa: S608
    mariadb.query(
        "INSERT INTO jfs_chunk (inode, indx, slices) SELECT 2 + seq DIV %s, seq MOD %s, "  # noqa: S608
        f"CONCAT(UNHEX('00000000'), UNHEX(LPAD(HEX(seq), 16, '0')), UNHEX('{BYTES:08X}00000000{BYTES:08X}')) "
        f"FROM {numbers}",
        (_PER_FILE, _PER_FILE),
    )
    files = f"seq_2_to_{2 + slices // _PER_FILE}"
    mariadb.query(
        "INSERT INTO jfs_node (inode, type, flags, mode, uid, gid, atime, mtime, ctime, nlink, length, parent) "  # noqa: S608
        f"SELECT seq, 1, 0, 420, 0, 0, 0, 0, 0, 1, {_PER_FILE * 64 * KIB * KIB}, 1 FROM {files}"
    )
    mariadb.query(
        f"INSERT INTO jfs_edge (parent, name, inode, type) SELECT 1, CONCAT('f', seq), seq, 1 FROM {files}"  # noqa: S608
    )
    mariadb.query("UPDATE jfs_counter SET value = %s WHERE name = 'nextChunk'", (slices + 1,))


def measured(argv: list[str], password: str) -> tuple[float, float, float, str]:
    """Wall seconds, CPU seconds, peak MiB and output of a program."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("measure.py")), str(result)]
        root = str(Path(__file__).parents[1])
        done = subprocess.run(
            [*launcher, str(_DEADLINE_S), *argv], env={**os.environ, "META_PASSWORD": password, "PYTHONPATH": root},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True,
        )  # fmt: skip
        wall_s, cpu_s, peak_kib, code = result.read_text().split()
    if code != "0":
        raise LabError(f"{argv} ended with exit code {code}\n{done.stdout[-2000:]}")
    return float(wall_s), float(cpu_s), int(peak_kib) / 1024, done.stdout


def race(mariadb: MariaDB, place: Place, slices: int, rounds: int) -> dict[str, list[tuple[float, float, float]]]:
    """Each program in each round.

    Raises:
        LabError: One failed, or did not find what is there.
    """
    ours = [sys.executable, "-m", "benchmarks.needed", f"--meta={mariadb.meta_url}", f"--endpoint={place.endpoint}"]
    ours.append(f"--slices={slices}")
    programs = {name: [*ours, f"--run={name}"] for name in _TITLES if name != "fsck"}
    programs["fsck"] = [str(binary("juicefs")), "fsck", mariadb.meta_url]
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in programs}
    names = list(programs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            *cost, output = measured(programs[name], mariadb.password)
            expected = slices // 10 if name == "needed-tenth" else slices
            said = rf"Used by {expected} slices" if name == "fsck" else rf"^{expected}$"
            if not re.search(said, output, re.MULTILINE):
                raise LabError(f"{name}: expected {expected} in what it says, found\n{output[-2000:]}")
            results[name].append((cost[0], cost[1], cost[2]))
            print(f"  {name:14} {cost[0]:7.2f} s  {cost[1]:7.2f} CPU s  {cost[2]:5.0f} MiB", flush=True)
    return results


def table(results: dict[str, list[tuple[float, float, float]]], slices: int) -> str:
    """The medians, in Markdown."""
    lines = [f"| {slices:,} slices | wall s | CPU s | peak MiB |", "| --- | --- | --- | --- |"]
    for name, runs in results.items():
        wall_s, cpu_s, peak = (statistics.median(run[of] for run in runs) for of in range(3))
        lines.append(f"| {_TITLES[name]} | {wall_s:.1f} | {cpu_s:.1f} | {peak:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Race, print, and with --write put the table into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", type=int, default=SLICES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--run", choices=[name for name in _TITLES if name != "fsck"])
    parser.add_argument("--meta")
    parser.add_argument("--endpoint")
    given = parser.parse_args()
    if given.run:
        print(work(given.run, given.meta, given.endpoint, given.slices))
        return
    where = machine()
    with tempfile.TemporaryDirectory() as folder, stub_stores(Path(folder)) as stores:
        mariadb = MariaDB.start(Path(folder))
        try:
            place = stores.source(Population(0))
            run(
                [
                    binary("juicefs"), "format", "--no-update", "--trash-days=0", "--storage=minio",
                    f"--bucket={place.endpoint}/{place.bucket}", mariadb.meta_url, NAME,
                ],
                env={"META_PASSWORD": mariadb.password, "ACCESS_KEY": "stub-key", "SECRET_KEY": "stub-secret"},
            )  # fmt: skip
            fill(mariadb, given.slices)
            stores.source(Population(given.slices, BYTES))
            results = race(mariadb, place, given.slices, given.rounds)
        finally:
            mariadb.stop()
    rows = table(results, given.slices)
    print(rows)
    if given.write:
        page = PAGE.read_text()
        before, _, rest = page.partition(_BEGIN)
        about = f"{where['date']}, {where['cpu']}, Linux {where['kernel']}, load {where['load']} at the start"
        after = rest.partition(_END)[2]
        PAGE.write_text(f"{before}{_BEGIN}\n\n{about}; {given.rounds} rounds, medians.\n\n{rows}\n\n{_END}{after}")
    most = max(run[2] for name, runs in results.items() if name != "fsck" for run in runs)
    if most > MOST_MIB:
        raise SystemExit(f"expected no more than {MOST_MIB} MiB, found {most:.0f}")


if __name__ == "__main__":
    main()

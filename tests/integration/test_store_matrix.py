"""The same copy to and from every kind of store: what is green is there. What each lacks is in docs/stores.md."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from include.juicefs_storage.adapters.manifests import ManifestReader, ParquetManifest
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.s3.wire.limits import Limits
from include.juicefs_storage.copy.manifest import ManifestRow
from include.juicefs_storage.copy.run import Transfer
from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.model import KeyRange, ObjectOutcome, below
from tests.support import s3_servers
from tests.support.s3_memory import MemoryStore

LIMITS = Limits(connect_s=5, idle_s=10, tries=3, first_delay_s=0.02, max_delay_s=0.5)
#: A volume's blocks, and keys that any store must take.
PLAIN = [
    *(f"myjfs/chunks/0/{folder}/{folder}{number}_0_4194304" for folder in (0, 1, 10) for number in range(4)),
    *("myjfs/juicefs_uuid", "myjfs/meta/dump-2026-01-31.json.gz", "sp ace/a b", "plus+plus", "ünï/日本/é", "~t*r"),
    *("eq=;,@$!'()", "q?x=1#f", "per%cent/%2F", "xml<&>", "\U0001f600", "-dash", "a-b/c", "a.b/c"),
]
LONG = "z" * 1000
#: Keys that stores which keep objects as files refuse, or keep under another key.
HOSTILE = [
    *("a//b", "/lead", "dir/", "x/./y", "a/../b", "./dot", "..", "back\\slash", "ctl\x01key", "nl\nkey", "tab\tkey"),
    *(" lead", "trail ", LONG, "e\u0301", "é", "n", "n/x"),
]
#: Those that mean another one in a path.
PATHS = {"a//b", "/lead", "x/./y", "a/../b", "./dot", ".."}
#: What each kind refuses or keeps under another key, of HOSTILE. A change here belongs into docs/stores.md.
NOT_KEPT = {
    "seaweedfs": {*PATHS, "back\\slash", LONG},
    "minio": PATHS,
    "rclone": {*PATHS, "dir/", "ctl\x01key", LONG},
    "moto": {"nl\nkey"},
}
EVERY = KeyRange()
#: Larger objects go in parts, of the least size that stores take.
PART_BYTES = 5 * 2**20


@pytest.fixture(scope="module", params=["seaweedfs", "minio", "rclone", pytest.param("moto", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def store(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store]:
    with getattr(s3_servers, kind)(tmp_path_factory.mktemp(kind), "bucket") as serving:
        yield serving


@pytest.fixture
def memory() -> Iterator[MemoryStore]:
    with MemoryStore("bucket") as serving:
        yield serving


def of(memory: MemoryStore) -> S3Store:
    return S3Store(memory.url, "bucket", "", "AK", "SK")


def copied(
    source: S3Store, target: S3Store, folder: Path, phase: str = "copy", keys: KeyRange = EVERY
) -> dict[str, ManifestRow]:
    manifest = ParquetManifest(folder, phase, {})
    engine = NativeEngine(source, target, limits=LIMITS, put_limit_bytes=PART_BYTES, part_bytes=PART_BYTES)
    with closing(engine):
        transfer = Transfer(S3Bucket(source, LIMITS), S3Bucket(target, LIMITS), engine, lists_copied=True)
        (transfer.copy if phase == "copy" else transfer.verify)(keys, manifest)
    return {row.key: row for row in ManifestReader(manifest.file).rows(set(ObjectOutcome))}


def green(rows: dict[str, ManifestRow]) -> set[str]:
    return {key for key, row in rows.items() if row.outcome in {"same", "copied"}}


def listed(store: S3Store) -> set[str]:
    return {key for page in S3Bucket(store).pages(EVERY) for key in page.keys}


def test_plain_keys_go_to_it_and_come_back(kind: str, store: S3Store, memory: MemoryStore, tmp_path: Path) -> None:
    """Small, empty, large, and in parts."""
    sizes = [PART_BYTES + 1, 1_500_000, *(3000 if number % 5 else 0 for number in range(2, len(PLAIN)))]
    for key, size in zip(PLAIN, sizes, strict=True):
        memory.put("bucket", key, (key.encode() * size)[:size], content_type="text/x-odd")
    there = replace(store, prefix="plain/")
    assert green(copied(of(memory), there, tmp_path)) == set(PLAIN) == listed(there)
    assert green(copied(of(memory), there, tmp_path, "verify")) == set(PLAIN)
    with MemoryStore("bucket") as back:
        assert green(copied(there, of(back), tmp_path / "back")) == set(PLAIN)
        assert back.bodies("bucket") == memory.bodies("bucket")
        if kind != "rclone":  # it tells the type by the name
            assert back.buckets["bucket"]["a-b/c"].headers["content-type"] == "text/x-odd"


def test_no_key_is_green_that_is_not_there(kind: str, store: S3Store, tmp_path: Path) -> None:
    lost = set()
    for number, key in enumerate(HOSTILE):  # alone, since some keys exclude one another
        there, folder = replace(store, prefix=f"hostile/{number}/"), tmp_path / str(number)
        with MemoryStore("bucket") as source, MemoryStore("bucket") as back:
            source.put("bucket", key, b"" if key.endswith("/") else key.encode())
            try:
                done = green(copied(of(source), there, folder))
                assert done <= listed(there)
            except StorageSwitchError:  # it cannot list what it was given: red as well
                done = set()
            if not done:
                lost.add(key)
                continue
            assert green(copied(of(source), there, folder, "verify")) == {key}
            assert green(copied(there, of(back), folder / "back")) == {key}
            assert back.bodies("bucket") == source.bodies("bucket")
    assert lost == NOT_KEPT[kind]


def test_every_range_of_it_is_listed_whole(kind: str, store: S3Store, memory: MemoryStore, tmp_path: Path) -> None:
    """Wherever a partition may be cut: at a key, in a folder, where nothing is, or where nothing is any more."""
    there, keys = replace(store, prefix="ranges/"), sorted({*PLAIN, "a"} - {"a-b/c", "a.b/c"})
    if kind == "moto":  # the others may refuse a key that has the name of a folder
        keys = sorted({*keys, "myjfs/chunks/0/1"})
    for key in keys:
        memory.put("bucket", key, b"x")
    assert green(copied(of(memory), there, tmp_path)) == set(keys)
    bucket, cuts = S3Bucket(there), [*keys, "myjfs", "myjfs/", "myjfs/chunks/0/1", "myjfs/chunks/0/10/1", "zz"]
    # Deleted between plan and copy: a whole folder, and the first of another one.
    gone = [key for key in keys if key.startswith("myjfs/chunks/0/10/") or key == "myjfs/chunks/0/1/10_0_4194304"]
    assert len(gone) == 5
    for key in gone:
        bucket._change("DELETE", key)
        keys.remove(key)
    for cut in cuts:
        for found, wanted in (
            (KeyRange(cut), [key for key in keys if key > cut]),
            (KeyRange(None, cut), [key for key in keys if key <= cut]),
        ):
            assert [key for page in bucket.pages(found) for key in page.keys] == wanted
    with MemoryStore("bucket") as back:
        parts = (KeyRange(None, gone[2]), KeyRange(gone[2]))
        done = [green(copied(there, of(back), tmp_path / f"{part.after is None}", keys=part)) for part in parts]
        assert done[0] | done[1] == set(keys) == set(back.buckets["bucket"])
    assert [item.key for item in bucket.list("myjfs/meta/")] == ["myjfs/meta/dump-2026-01-31.json.gz"]
    assert [key for page in bucket.pages(below("myjfs/meta/")) for key in page.keys] == [
        "myjfs/meta/dump-2026-01-31.json.gz"
    ]

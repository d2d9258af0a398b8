"""Which blocks a volume needs, beside what `juicefs fsck` says of the same volume.

Each layout is a real volume with a real mount: trash, compaction, clones, hard links, deleted files, leaked blocks.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.volume.block_contents import BlockContents
from include.juicefs_storage.volume.difference import Difference, compare_blocks, missing_blocks
from include.juicefs_storage.volume.layout import ObjectSizes, slice_of
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.needed import needed_objects
from include.juicefs_storage.volume.setting import StorageConfig
from lab.environment import Lab
from lab.mariadb import MariaDB
from lab.process import binary, run
from lab.seaweed import Store
from lab.volume import STORAGE, fresh_mount

KIB = 1024
LOST = re.compile(r"can't find block (?P<folders>\S+)/(?P<block>\d+_\d+_\d+) for file (?P<path>.+): ")


@dataclasses.dataclass(frozen=True)
class World:
    """A volume, and what was done to it."""

    name: str
    mariadb: MariaDB
    store: Store

    @property
    def metadata(self) -> MySqlMetadata:
        return MySqlMetadata.from_metaurl(Metaurl.parse(self.mariadb.meta_url_with_password))

    @property
    def config(self) -> StorageConfig:
        keys = SecretStr(self.store.access_key), SecretStr(self.store.secret_key)
        return StorageConfig(STORAGE, self.store.bucket_url, *keys)

    @property
    def bucket(self) -> S3Bucket:
        return S3Bucket.from_storage(self.config)

    def juicefs(self, *arguments: str, mount: bool = False) -> str:
        env = {"META_PASSWORD": self.mariadb.password}
        keys = {"ACCESS_KEY": self.store.access_key, "SECRET_KEY": self.store.secret_key}
        return run([binary("juicefs"), *arguments], env=env if mount else env | keys)

    def fsck(self) -> tuple[int, dict[str, str]]:
        """Exit code, and the blocks that it misses with the path of a file."""
        done = subprocess.run(
            [binary("juicefs"), "fsck", self.mariadb.meta_url],
            env={**os.environ, "META_PASSWORD": self.mariadb.password},
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        found = {
            f"{self.name}/chunks/{match['folders']}/{match['block']}": match["path"]
            for match in LOST.finditer(done.stdout + done.stderr)
        }
        return done.returncode, found

    def compared(self) -> Difference:
        """The volume's own store against itself: what is lost is all there is to find."""
        return compare_blocks(self.metadata, self.metadata.read_setting(), self.bucket, self.bucket)

    def needed(self) -> dict[str, int]:
        return dict(needed_objects(self.metadata, self.metadata.read_setting()))

    def objects(self) -> dict[str, int]:
        return {key: size for key, (size, _) in self.store.objects(f"{self.name}/chunks/").items()}

    def put(self, key: str, body: bytes) -> None:
        self.store.client().put_object(Bucket=self.store.bucket, Key=key, Body=body)

    def delete(self, key: str) -> bytes:
        body = self.store.client().get_object(Bucket=self.store.bucket, Key=key)["Body"].read()
        self.store.client().delete_object(Bucket=self.store.bucket, Key=key)
        return body


def fill(mount: Path, block: int, world: World) -> None:
    """Files of many kinds; what is left in the trash, of a compaction, and of a file that is gone for good."""
    folder = mount / "dir ü" / "sub"
    folder.mkdir(parents=True)
    for name, size in {"empty": 0, "tiny": 1, "odd": 100_001, "exact": 2 * block, "large": 3 * block + 7}.items():
        (folder / name).write_bytes(os.urandom(size))
    (folder / "zeros").write_bytes(bytes(2 * block))
    os.link(folder / "tiny", folder / "hard link")
    world.juicefs("clone", str(folder / "large"), str(mount / "clone"), mount=True)
    world.juicefs("clone", str(folder / "odd"), str(mount / "clone of a deleted one"), mount=True)
    (folder / "odd").unlink()
    (folder / "exact").unlink()
    with (folder / "rewritten").open("wb") as file:
        for number in range(30):
            file.seek(number * 1000)
            file.write(os.urandom(5000))
            file.flush()
            os.fsync(file.fileno())
    world.juicefs("compact", str(folder), mount=True)
    (folder / "gone").write_bytes(os.urandom(block + 1))
    (folder / "gone").unlink()
    for hour in (mount / ".trash").iterdir():
        for gone in hour.glob("*-gone"):
            gone.unlink()


@pytest.fixture(
    params=[
        ["--block-size=64K", "--compress=none"],
        ["--block-size=1M", "--compress=zstd", "--hash-prefix"],
        ["--block-size=256K", "--compress=lz4"],
    ],
    ids=["plain", "hashed-zstd", "lz4"],
)
def world(lab: Lab, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[World]:
    name = re.sub(r"\W", "", request.node.callspec.id)
    made = World(name, lab.mariadb.add_database(name), lab.old_store)
    made.juicefs(
        "format", "--no-update", "--trash-days=1", f"--storage={STORAGE}", f"--bucket={lab.old_store.bucket_url}",
        *request.param, made.mariadb.meta_url, name,
    )  # fmt: skip
    with fresh_mount(tmp_path, made.mariadb, read_only=False) as mount:
        fill(mount, made.metadata.read_setting().block_bytes, made)
    yield made
    for key in lab.old_store.objects(f"{name}/"):
        lab.old_store.client().delete_object(Bucket=lab.old_store.bucket, Key=key)


def test_nothing_that_fsck_needs_is_missed_and_what_it_misses_is_seen(world: World) -> None:
    needed, objects = world.needed(), world.objects()
    assert len(needed) > 20
    assert needed.keys() <= objects.keys()
    assert world.mariadb.query("SELECT COUNT(*) FROM jfs_delslices")[0][0] > 0, "a compaction left slices in the trash"
    leaked = f"{world.name}/chunks/{'00/' if world.name.startswith('hashed') else ''}0/0/0_9_5"
    world.put(leaked, b"12345")
    contents = BlockContents(world.bucket, ObjectSizes.of(world.metadata.read_setting()))
    assert not any(contents.problems(list(needed.items())))
    assert contents.told_by == {"checksum": len(needed)}, "JuiceFS leaves one with every block"
    whole = world.compared()
    assert (whole.expected, whole.present, whole.lost) == (len(needed), len(needed), 0)
    assert world.fsck() == (0, {})

    # A block that was cut: fsck looks at names alone.
    cut = max(needed, key=lambda key: (objects[key], key))
    body = world.delete(cut)
    world.put(cut, body[:3])
    assert world.fsck() == (0, {})
    found = world.compared()
    assert (found.lost, found.present) == (1, len(needed) - 1)
    assert found.examples == [
        f"lost: {cut} (a block of {needed[cut]} bytes, 3 bytes on the source, 3 bytes on the target)"
    ]
    setting = world.metadata.read_setting()
    if ObjectSizes.of(setting).exact:
        world.put(cut, body[:-1])
        assert world.compared().lost == 1
        assert missing_blocks(world.metadata, setting, world.bucket).different == 1
    else:
        # A size does not tell; what is in it does.
        blocks = BlockContents(world.bucket, ObjectSizes.of(setting))
        world.put(cut, body[: len(body) // 2])
        assert world.compared().lost == 0
        problems = dict(zip(needed, blocks.problems(list(needed.items())), strict=True))
        assert [key for key, problem in problems.items() if problem] == [cut]
        assert f"bytes that do not decompress to a block of {needed[cut]} bytes" in problems[cut]
    world.put(cut, body)
    assert world.compared().lost == 0

    # Everything is gone: both name all that must be there, and the same files.
    for key in objects:
        world.delete(key)
    code, missed = world.fsck()
    assert code == 1
    assert missed.keys() == needed.keys()
    assert world.compared().lost == len(needed)
    paths: dict[int, set[str]] = {}
    for slice_id, path in world.metadata.files_of({slice_of(key) for key in needed}):
        paths.setdefault(slice_id, set()).add(path)
    assert paths.keys() == {slice_of(key) for key in needed}
    named = set().union(*paths.values())
    assert {"/dir ü/sub/large", "/clone", "/clone of a deleted one", "/dir ü/sub/hard link", "/dir ü/sub/tiny"} <= named
    assert [path for path in named if path.startswith("/.trash/") and path.endswith("-exact")]
    for key, path in missed.items():
        described = next(iter(paths[slice_of(key)]))
        # Of what a compaction left, fsck says that the root folder is broken.
        assert path in paths[slice_of(key)] or described.startswith("(replaced by a compaction"), (key, path)

"""What `juicefs sync` and `mc mirror` really do: the facts that their engines rest on, run against the programs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.adapters.tools import juicefs_sync, mc_mirror
from include.juicefs_storage.adapters.tools.juicefs_sync import JuiceFSSync
from include.juicefs_storage.adapters.tools.mc_mirror import McMirror
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.merge import key_filter
from include.juicefs_storage.objects.model import KeyRange, below, misread
from tests.support.labs import lacking
from tests.support.s3_memory import MemoryStore
from tests.support.s3_proxy import S3Proxy

KEYS = ["a", "a1", "a2", "b/1", "b/2", "b/c/3", "b0", "c", "d/"]
SECRET = "the/secret+key"


@pytest.fixture
def stores() -> Iterator[tuple[MemoryStore, MemoryStore]]:
    with MemoryStore("source") as source, MemoryStore("target") as target:
        for key in KEYS:
            source.put("source", key, f"{key}.".encode())
        yield source, target


@pytest.fixture
def sides(stores: tuple[MemoryStore, MemoryStore]) -> tuple[S3Store, S3Store]:
    source, target = stores
    return (
        S3Store(source.url, "source", access_key="ak", secret_key=SECRET),
        S3Store(target.url, "target", access_key="ak", secret_key=SECRET),
    )


@pytest.fixture
def client() -> str:
    try:
        return mc_mirror.find()
    except PermanentError as error:
        lacking(str(error))


def run(argv: list[str], **variables: str) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, env={**os.environ, **variables}, timeout=60, check=False
    )
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "keys",
    [KeyRange(), KeyRange("a1", "b/2"), KeyRange(None, "b/2"), KeyRange("b/1", None), KeyRange("a", "a"), below("b/")],
)
def test_juicefs_sync_keeps_to_a_range(
    stores: tuple[MemoryStore, MemoryStore], sides: tuple[S3Store, S3Store], keys: KeyRange
) -> None:
    said = JuiceFSSync(*sides).mirror(keys, compare="etag", overwrite=False)
    wanted = {
        key for key in KEYS if (keys.after is None or key > keys.after) and (keys.until is None or key <= keys.until)
    }
    assert set(stores[1].bodies("target")) == wanted
    assert (said.found, said.copied, said.checked) == (len(wanted),) * 3
    assert said.copied_bytes == sum(len(key) + 1 for key in wanted)
    assert SECRET not in said.command


def test_juicefs_sync_passes_over_prefixes_when_it_lists_with_several_threads(
    stores: tuple[MemoryStore, MemoryStore],
) -> None:
    """Why `--list-threads` never goes with a range."""
    source, target = stores
    keys = {"MINIO_ACCESS_KEY": "ak", "MINIO_SECRET_KEY": SECRET}
    keys |= {"AWS_ACCESS_KEY_ID": "ak", "AWS_SECRET_ACCESS_KEY": SECRET}
    urls = [source.url.replace("http", "minio") + "/source/", target.url.replace("http", "s3") + "/target/"]
    run([juicefs_sync.find(), "sync", "--no-https", "--start=b/1", "--end=b0", "--list-threads=4", *urls], **keys)
    found = set(target.bodies("target"))
    assert not found & {"b/1", "b/2", "b/c/3"}, "what lies below b/ is within the range"
    assert "c" in found, "what comes after the end is not"


@pytest.mark.parametrize(
    ("include", "exclude"),
    [(["b/*"], []), ([], ["b*"]), (["a*", "*3"], []), (["b*"], ["*2", "b0"]), (["*"], ["d/"]), ([], ["*/*"])],
)
def test_juicefs_sync_takes_the_same_keys_as_we_do(
    stores: tuple[MemoryStore, MemoryStore], sides: tuple[S3Store, S3Store], include: list[str], exclude: list[str]
) -> None:
    JuiceFSSync(*sides, include=include, exclude=exclude).mirror(KeyRange(), compare="etag", overwrite=False)
    taken = key_filter(include, exclude)
    assert taken
    assert set(stores[1].bodies("target")) == {key for key in KEYS if taken(key)}


@pytest.mark.parametrize("tool", [JuiceFSSync, McMirror])
@pytest.mark.parametrize("prefix", ["a//", "a/../b/", "./", "/a/", "a"])
def test_prefixes_that_a_tool_reads_otherwise_are_refused(
    sides: tuple[S3Store, S3Store], tool: type[JuiceFSSync | McMirror], prefix: str, client: str
) -> None:
    for stores in ((replace(sides[0], prefix=prefix), sides[1]), (sides[0], replace(sides[1], prefix=prefix))):
        with pytest.raises(PermanentError, match="no empty part"):
            tool(*stores).mirror(KeyRange(), compare="etag", overwrite=False)


@pytest.mark.parametrize("tool", [JuiceFSSync, McMirror])
def test_patterns_that_a_tool_reads_otherwise_are_refused(
    sides: tuple[S3Store, S3Store], tool: type[JuiceFSSync | McMirror], client: str
) -> None:
    with pytest.raises(PermanentError, match="may read"):
        tool(*sides, exclude=["a[12]"]).mirror(KeyRange(), compare="etag", overwrite=False)


def test_a_session_token_travels_in_the_environment(
    stores: tuple[MemoryStore, MemoryStore], sides: tuple[S3Store, S3Store]
) -> None:
    source, target = (
        S3Store(store.endpoint, store.bucket, access_key="ak", secret_key=SECRET, session_token=f"token/{store.bucket}")
        for store in sides
    )
    said = JuiceFSSync(source, target).mirror(KeyRange(), compare="etag", overwrite=False)
    assert set(stores[1].bodies("target")) == set(KEYS)
    assert "token/" not in said.command


def test_mc_keeps_to_a_prefix_and_refuses_any_other_range(
    stores: tuple[MemoryStore, MemoryStore], sides: tuple[S3Store, S3Store], client: str
) -> None:
    with pytest.raises(PermanentError, match="whole prefixes"):
        McMirror(*sides).mirror(KeyRange("a1", "b/2"), compare="etag", overwrite=False)
    said = McMirror(*sides, exclude=["*2"]).mirror(below("b/"), compare="etag", overwrite=False)
    assert set(stores[1].bodies("target")) == {"b/1", "b/c/3"}
    assert (said.found, said.copied_bytes) == (2, 10)
    assert SECRET not in said.command


@pytest.mark.parametrize("tool", [JuiceFSSync, McMirror])
def test_a_tool_is_given_the_storage_class(
    stores: tuple[MemoryStore, MemoryStore],
    sides: tuple[S3Store, S3Store],
    tool: type[JuiceFSSync | McMirror],
    client: str,
) -> None:
    target = replace(sides[1], storage_class="STANDARD_IA")
    said = tool(sides[0], target).mirror(KeyRange(), compare="etag", overwrite=False)
    assert "--storage-class=STANDARD_IA" in said.command
    assert set(stores[1].bodies("target")) == set(KEYS)


def test_mc_calls_a_refused_put_a_success(
    stores: tuple[MemoryStore, MemoryStore], sides: tuple[S3Store, S3Store], client: str
) -> None:
    """Why the report quotes it only beside our own comparison."""
    for key in KEYS[2:]:
        del stores[0].buckets["source"][key]
    with S3Proxy(sides[1].endpoint) as proxy:
        proxy.read_only = True
        target = S3Store(proxy.url, "target", access_key="ak", secret_key=SECRET)
        said = McMirror(sides[0], target).mirror(KeyRange(), compare="etag", overwrite=False)
    assert said.copied == 2
    assert stores[1].bodies("target") == {}


@pytest.mark.parametrize("key", ["/lead", "e\u0301"])
def test_mc_overwrites_unasked_after_a_key_that_it_misreads(
    stores: tuple[MemoryStore, MemoryStore], sides: tuple[S3Store, S3Store], client: str, key: str
) -> None:
    """Why it is not run where there is such a key (`misread`)."""
    source, target = stores
    source.put("source", key, b"x")
    source.put("source", "f", b"ours")
    target.put("target", "f", b"theirs")
    assert misread(key)
    hosts = {
        f"MC_HOST_{name}": url.replace("//", f"//ak:{SECRET}@") for name, url in (("s", source.url), ("t", target.url))
    }
    run([client, "mirror", "--json", "s/source", "t/target"], **hosts)
    assert target.bodies("target")["f"] == b"ours"


def test_midnight_commander_is_not_taken_for_mc(tmp_path: os.PathLike[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = os.path.join(tmp_path, "mc")  # noqa: PTH118
    with open(fake, "w") as script:  # noqa: PTH123
        script.write("#!/bin/sh\necho GNU Midnight Commander 4.8\n")
    os.chmod(fake, 0o755)  # noqa: PTH101, S103
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(mc_mirror, "_UNPACKED", fake)
    with pytest.raises(PermanentError, match="MinIO's client is not on the worker"):
        mc_mirror.find()

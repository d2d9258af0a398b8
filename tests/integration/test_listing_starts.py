"""Where a listing starts: no key behind the start is left out, whether the start is a key, a folder, or neither."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from include.juicefs_storage.adapters.s3 import listing
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.model import KeyRange, below
from lab.seaweed import Store
from tests.support.s3_memory import MemoryStore, SkippingStore

KEYS = sorted([
    *(f"{folder}/x{number}" for folder in ("aaa", "bbb", "ccc") for number in range(3)),
    *(f"chunks/{high}/{low}/{low}{number}_0_4194304" for high in (0, 10) for low in (0, 1, 99) for number in range(3)),
    "d", "e-f/x", "e.f/x", "m/", "m/x", "n", "n/x", "n/y/", "n/y/z", "zz",
])  # fmt: skip
STARTS = sorted({
    *KEYS,
    *(key[: at + end] for key in KEYS for at, character in enumerate(key) if character == "/" for end in (0, 1)),
    # Neither key nor folder; the last two: of a folder, and of an object, that are gone.
    "0", "aa", "b", "bbb.", "bbb0", "bbb/x", "chunks/0/99/990_0_4194303", "chunks/0/98/980_0_4194304", "d/x",
})  # fmt: skip


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Bucket]:
    store = Store.create(tmp_path_factory.mktemp("store"), "store", "bucket")
    try:
        for key in (*(f"p/{key}" for key in KEYS), "o/q.x", "o/q/y", "o/q/z", "v/w//b"):
            store.client().put_object(Bucket="bucket", Key=key, Body=b"" if key.endswith("/") else b"x")
        yield S3Bucket(S3Store(store.endpoint_url, "bucket", "p/", store.access_key, store.secret_key))
    finally:
        store.stop()


def listed(bucket: S3Bucket, keys: KeyRange) -> list[str]:
    return [key for page in bucket.pages(keys) for key in page.keys]


@pytest.mark.parametrize("start", STARTS)
def test_seaweedfs_lists_what_is_behind_any_start(seaweed: S3Bucket, start: str) -> None:
    behind = [key for key in KEYS if key > start]
    assert listed(seaweed, KeyRange(start)) == behind
    assert seaweed.first_after(start) == next(iter(behind), None)
    for until in (key for key in (f"{start}\U0010ffff", "chunks/10/1/11_0_4194304") if key > start):
        assert listed(seaweed, KeyRange(start, until)) == [key for key in behind if key <= until]


@pytest.mark.parametrize("page_keys", [2, 3, 5, 7])
def test_seaweedfs_leaves_nothing_out_where_a_page_ends(
    seaweed: S3Bucket, monkeypatch: pytest.MonkeyPatch, page_keys: int
) -> None:
    """A page that ends with `n` is not followed by what is in the folder `n/`, where `n` is the next start key."""
    monkeypatch.setattr(listing, "_PAGE_KEYS", page_keys)
    for start in ("", "chunks/0/99", "chunks/10/99/992_0_4194304", "d", "m", "m/", "n"):
        assert listed(seaweed, KeyRange(start or None)) == [key for key in KEYS if key > start]


@pytest.mark.parametrize("page_keys", [1, 2, 1000])
def test_seaweedfs_folder_that_it_lists_too_early_is_refused(
    seaweed: S3Bucket, monkeypatch: pytest.MonkeyPatch, page_keys: int
) -> None:
    """SeaweedFS lists `q/y` before `q.x`, and after `q.w` not at all: nor where a page or a range ends in `q/`."""
    monkeypatch.setattr(listing, "_PAGE_KEYS", page_keys)
    other = S3Bucket(replace(seaweed.store, prefix="o/"))
    for after in (None, "q", "q.w"):
        for until in (None, "q.x", "q/", "q/a", "q/y", "q/z", "q0"):
            with pytest.raises(PermanentError, match="out of order"):
                listed(other, KeyRange(after, until))
    assert listed(other, below("q/")) == ["q/y", "q/z"]
    assert listed(other, KeyRange("q/a", "q/y")) == ["q/y"]


@pytest.mark.parametrize("start", ["w//a", "w//", "w//b", "/", "w/../a"])
def test_seaweedfs_lists_no_key_that_the_start_alone_suggests(seaweed: S3Bucket, start: str) -> None:
    """SeaweedFS keeps `w//b` as `w/b`. After `w//a` it lists both, and below `w//` one that does not begin so."""
    other = S3Bucket(replace(seaweed.store, prefix="v/"))
    assert listed(other, KeyRange(start)) == ["w/b"]
    assert listed(other, KeyRange(start, f"{start}~")) == []


def test_a_store_that_keeps_any_key_is_listed_from_any_start() -> None:
    with MemoryStore("b") as store:
        for number in range(5000):
            store.put("b", f"w//{number:04}", b"")
        bucket = S3Bucket(S3Store(store.url, "b", "", "AK", "SK"))
        assert listed(bucket, KeyRange("w//3999")) == [f"w//{number}" for number in range(4000, 5000)]
        assert store.requests["GET"] <= 3


@pytest.mark.parametrize("start", ["k", "k0000", "k0500x", "k2999", "k3", "k0999x"])
def test_a_store_that_skips_a_key_after_a_start_that_is_none(start: str) -> None:
    keys = [f"k{number:04}" for number in range(3500)]
    with SkippingStore("b") as store:
        for key in keys:
            store.put("b", key, b"")
        bucket = S3Bucket(S3Store(store.url, "b", "", "AK", "SK"))
        assert listed(bucket, KeyRange(start)) == [key for key in keys if key > start]
        assert bucket.first_after(start) == next((key for key in keys if key > start), None)


def test_a_start_costs_no_more_requests_than_pages() -> None:
    with MemoryStore("b") as store:
        for number in range(5000):
            store.put("b", f"chunks/0/{number // 1000}/{number}_0_4194304", b"")
        bucket = S3Bucket(S3Store(store.url, "b", "", "AK", "SK"))
        for start in ("chunks/0/2/2999_0_4194304", "chunks/0/2/2999_0_4194305", "chunks/0/3/"):
            store.requests.clear()
            assert len(listed(bucket, KeyRange(start))) == 2000
            assert store.requests["GET"] <= 3


def test_the_last_key_of_a_page_is_listed_again() -> None:
    """What a page left out behind its last key would show: the next page begins before that key."""
    with MemoryStore("b") as store:
        for number in range(2500):
            store.put("b", f"k{number:04}", b"")
        bucket = S3Bucket(S3Store(store.url, "b", "", "AK", "SK"))
        assert listed(bucket, KeyRange("k")) == sorted(store.buckets["b"])
        assert store.requests["GET"] == 3


def test_keys_that_sort_before_a_folder_cost_an_ordered_store_nothing() -> None:
    with MemoryStore("b") as store:
        for key in ("q.x", "q/y", "q/z", "r"):
            store.put("b", key, b"")
        bucket = S3Bucket(S3Store(store.url, "b", "", "AK", "SK"))
        assert listed(bucket, KeyRange(None, "q/y")) == ["q.x", "q/y"]

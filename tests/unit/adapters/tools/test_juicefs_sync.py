"""URLs and keys for `juicefs sync`."""

from __future__ import annotations

import pytest

from include.juicefs_storage.adapters.tools.juicefs_sync import sync_urls
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD


def _at(url: str) -> StorageConfig:
    return StorageConfig("minio", url, OLD.access_key, OLD.secret_key)


@pytest.mark.parametrize(
    ("source", "target", "urls"),
    [
        ("http://h:1/a", "http://127.0.0.1:2/b", ["minio://h:1/a/p/", "s3://127.0.0.1:2/b/p/"]),
        ("http://h:1/a", "https://n.example:2/b", ["minio://h:1/a/p/", "s3://b.n.example:2/p/"]),
        ("https://o.example/a", "http://n:2/b.c", ["s3://a.o.example/p/", "minio://n:2/b.c/p/"]),
        ("https://o.example/a", "https://n.example/b", ["eos://a.o.example/p/", "s3://b.n.example/p/"]),
    ],
)
def test_sync_urls_hold_no_keys_and_each_side_has_variables_of_its_own(
    source: str, target: str, urls: list[str]
) -> None:
    new = StorageConfig("minio", target, NEW.access_key, NEW.secret_key)
    found, keys = sync_urls(_at(source), new, "p/")
    assert found == urls
    assert sorted(keys.values()) == ["NEWKEY", "OLDKEY", "new-secret-value", "old-secret-value"]


def test_a_bucket_that_juicefs_sync_cannot_address_is_refused() -> None:
    with pytest.raises(PermanentError, match="dot in its name"):
        sync_urls(_at("http://h:1/a"), _at("https://n.example:2/b.c"), "p/")

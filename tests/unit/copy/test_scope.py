"""Which of a volume's blocks the source of a copy holds."""

from __future__ import annotations

import pytest

from include.juicefs_storage.copy.scope import below_prefix, shard_at
from include.juicefs_storage.errors import PermanentError
from tests.support.fakes import setting


def test_where_the_blocks_lie_below_a_prefix() -> None:
    assert below_prefix(setting(), "") == "myjfs/chunks/"
    assert below_prefix(setting(), "myjfs/") == "chunks/"
    for wrong in ("other/", "myjfs/meta/"):
        with pytest.raises(PermanentError, match="source_prefix"):
            below_prefix(setting(), wrong)


def test_which_shard_a_bucket_is() -> None:
    def at(template: str, bucket: str, endpoint: str = "http://inside:9000", shards: int = 3) -> int | None:
        return shard_at(setting(Bucket=template, Shards=shards), endpoint, bucket)

    assert at("http://old:9000/data", "whatever", shards=1) is None
    buckets = "http://old:9000/data-%d"
    assert [at(buckets, f"data-{number}") for number in range(3)] == [0, 1, 2]
    assert at("http://old:9000/data%02d/", "data01") == 1
    for wrong in ("data", "data-3", "data-%d"):
        with pytest.raises(PermanentError, match="expected `data-0`, `data-1`, `data-2`; found `data"):
            at(buckets, wrong)
    # One name at several endpoints: only there do workers need the endpoint that the clients use.
    hosts = "http://old-%d:80/data"
    assert at(hosts, "data", "http://OLD-2/") == 2
    with pytest.raises(PermanentError, match="expected `data`; found `data` at http://inside:9000"):
        at(hosts, "data")
    for template in ("http://old:9000/data", "http://old:9000/%d-%d", "http://old:9000/100%"):
        with pytest.raises(PermanentError, match="one %d"):
            at(template, "data")

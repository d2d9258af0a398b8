"""Keys that may do all below `<volume>/`, and nothing on the bucket as such: no HEAD of it, no LIST of all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.errors import PermanentError
from lab.environment import Lab
from lab.seaweed import Store
from tests.support.harness import Run, Start
from tests.support.s3_proxy import S3Proxy, outside
from tests.support.worker import Fault
from tests.support.world import Sides, assert_nothing_lost, writing

Move = Callable[..., Run]


@pytest.fixture
def move(start: Start) -> Move:
    """Make a run to a store at an address."""

    def make(store: Store, endpoint: str, *faults: Fault, **params: object) -> Run:
        run = start(*faults, **{"target_conn_id": "minio_to", "target_bucket": store.bucket, **params})
        extra = {"endpoint_url": endpoint, "config_kwargs": {"s3": {"addressing_style": "path"}}}
        connection = {"conn_type": "aws", "login": store.access_key, "password": store.secret_key, "extra": extra}
        run.environment["AIRFLOW_CONN_MINIO_TO"] = json.dumps(connection)
        return run

    return make


@pytest.fixture
def limited(fault_lab: Lab, sides: Sides, move: Move) -> Iterator[tuple[S3Proxy, S3Proxy]]:
    """Proxies before both stores, source first. In the end the volume is where it was, at the store's own address."""
    with S3Proxy(sides.source.endpoint_url) as source, S3Proxy(sides.target.endpoint_url) as target:
        for proxy in (source, target):
            proxy.denies = outside(f"{fault_lab.volume.name}/")
            with pytest.raises(PermanentError, match="AccessDenied"):
                S3Bucket(S3Store(proxy.url, sides.source.bucket, "", "AK", "SK")).check()
        yield source, target
        back = move(sides.source, sides.source.endpoint_url)
        assert back.go() == "switched", back.errors


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_volume_moves_between_stores_by_keys_that_are_limited_to_it(
    fault_lab: Lab, sides: Sides, move: Move, limited: tuple[S3Proxy, S3Proxy]
) -> None:
    source, target = limited
    there = move(sides.source, source.url)  # one store by two names
    assert there.go() == "switched", there.errors
    assert there.xcom("plan")["change"]["kind"] == "address"
    failing = move(sides.target, target.url, Fault("prove_no_restarts", "before", error="injected", tries=9))
    run = move(sides.target, target.url)
    with writing(fault_lab, "limited") as writer:
        assert failing.go() == "rolled back", failing.errors
        assert run.go() == "switched", run.errors
    assert run.xcom("plan")["change"]["kind"] == "copied"
    assert_nothing_lost(fault_lab, writer)

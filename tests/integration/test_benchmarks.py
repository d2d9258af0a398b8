"""The benchmark measures what it says: the cheap server is a store, and only a complete copy counts."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.peers import Command, Native, Place, Task, Work
from benchmarks.plan import Volume, plan
from benchmarks.population import KIB, MIB, Population, content, etag
from benchmarks.stores import StubStores, expected_digest, stub_stores
from benchmarks.sync import Case, race
from include.juicefs_storage.adapters.s3.engine import NativeEngine
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.objects.model import ObjectOutcome
from lab.process import LabError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StubStores]:
    with stub_stores(tmp_path_factory.mktemp("stub")) as stores:
        yield stores


def client(endpoint: str) -> S3Client:
    import boto3
    from botocore.config import Config

    return boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="a", aws_secret_access_key="b", region_name="us-east-1",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )  # fmt: skip


def test_what_is_described_can_be_read_in_full_and_in_part(stores: StubStores) -> None:
    population = Population(60, 0)
    place = stores.source(population)
    s3 = client(place.endpoint)
    listed = s3.list_objects_v2(Bucket=place.bucket)["Contents"]
    assert [item["Key"] for item in listed] == sorted(key for key, _, _ in population.objects())
    tags = {item["Key"]: item["ETag"].strip('"') for item in listed}
    for key, size, tail in population.objects():
        body = s3.get_object(Bucket=place.bucket, Key=key)["Body"].read()
        assert body == content(size, tail)
        assert hashlib.md5(body, usedforsecurity=False).hexdigest() == tags[key]
        part = s3.get_object(Bucket=place.bucket, Key=key, Range=f"bytes=100-{size - 10}")["Body"].read()
        assert part == body[100 : size - 9]


@pytest.mark.parametrize("body", [b"", b"short", content(4 * KIB, b"!" * 32), content(4 * MIB, b"?" * 32), b"x" * MIB])
def test_what_is_written_is_there_with_its_md5(stores: StubStores, body: bytes) -> None:
    from botocore.exceptions import ClientError

    place = stores.target(None)
    s3 = client(place.endpoint)
    key = "a b/+%/ü//<&>"
    tag = s3.put_object(Bucket=place.bucket, Key=key, Body=body)["ETag"]
    assert tag.strip('"') == hashlib.md5(body, usedforsecurity=False).hexdigest()
    assert s3.get_object(Bucket=place.bucket, Key=key)["Body"].read() == body
    assert s3.list_objects_v2(Bucket=place.bucket, Delimiter="/")["CommonPrefixes"] == [{"Prefix": "a b/"}]
    with pytest.raises(ClientError, match="PreconditionFailed"):
        s3.put_object(Bucket=place.bucket, Key=key, Body=b"other", IfNoneMatch="*")
    with pytest.raises(ClientError, match="BadDigest"):
        s3.put_object(Bucket=place.bucket, Key=key, Body=body, ContentMD5="AAAAAAAAAAAAAAAAAAAAAA==")


def test_a_listing_continues_from_page_to_page(stores: StubStores) -> None:
    population = Population(2_500)
    place = stores.source(population)
    pages = list(client(place.endpoint).get_paginator("list_objects_v2").paginate(Bucket=place.bucket))
    keys = [item["Key"] for page in pages for item in page["Contents"]]
    assert [len(page["Contents"]) for page in pages] == [1000, 1000, 500]
    assert keys == sorted(key for key, _, _ in population.objects())
    assert stores.digest(place) == expected_digest(population)
    assert stores.digest(place) != expected_digest(Population(2_500, differ_every=2_500))


@pytest.mark.parametrize(("at_once", "per_second"), [(16, 0), (0, 200)])
def test_a_store_that_throttles_is_not_hammered(tmp_path: Path, at_once: int, per_second: int) -> None:
    population = Population(600)
    with stub_stores(tmp_path, 2, at_once, per_second) as stores:
        source, target = (
            S3Store(place.endpoint, place.bucket, "", "a", "b")
            for place in (stores.source(population), stores.target(None))
        )
        with closing(NativeEngine(source, target)) as engine:
            copied = engine.copy([(key, size, etag(size, tail)) for key, size, tail in population.objects()])
        assert {item.outcome for item in copied} == {ObjectOutcome.COPIED}
        made, throttled = stores.requests(*(Place(side.endpoint, side.bucket, "", "", "") for side in (source, target)))
        assert 0 < throttled < 0.2 * (made - throttled)


class Idle:
    """A program that says that all went well."""

    name = "idle"
    does: frozenset[Work] = frozenset(["copy"])

    def version(self) -> str:
        return "0"

    def command(self, task: Task) -> Command:
        assert task.work in self.does
        return Command(["/bin/true"], {})


def test_a_run_that_copies_nothing_does_not_count(stores: StubStores, tmp_path: Path) -> None:
    case = Case("4k", "ten", "copy", Population(10))
    with pytest.raises(LabError, match="does not hold"):
        race(case, [Idle()], stores, tmp_path, 0)  # type: ignore[list-item]


def test_where_a_store_throttles_a_peer_that_copies_nothing_ends_no_race(stores: StubStores, tmp_path: Path) -> None:
    case = Case("4k", "ten", "copy", Population(10), at_once=16)
    (result,) = race(case, [Idle()], stores, tmp_path, 0)  # type: ignore[list-item]
    assert result.failed


@pytest.mark.slow
def test_a_quick_race_counts_every_program(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    cases = ["4k", "mix", "delta", "content"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sync", "--quick", f"--json={file}", "--only", *cases],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(file.read_text())
    ran = {(result["case"], result["peer"]) for result in document["results"]}
    assert ran >= {(case, peer) for case in cases for peer in (Native.name, "juicefs sync")}
    assert all(result["cpu_s"] > 0 and 5 < result["peak_mib"] < 1000 for result in document["results"])
    assert "secret" not in file.read_text()
    assert "stub-key" not in json.dumps(document["commands"])


@pytest.mark.slow
def test_what_a_volume_needs_is_what_fsck_uses() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.needed", "--slices=12000", "--rounds=1"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("| ")]) == 8


def test_a_plan_by_several_processes_counts_every_object_once() -> None:
    cost = plan(Volume(100_000), 100_000, processes=2, shares=3, alone=40)
    assert sum(cost.counts) == 100_000
    assert 40 < cost.requests < 300

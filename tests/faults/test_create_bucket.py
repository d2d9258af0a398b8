"""A new bucket that the run makes itself, after the approval."""

from __future__ import annotations

from dataclasses import replace

import pytest
from pydantic import SecretStr

from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.setting import Setting
from lab.environment import Lab
from tests.support.harness import Start
from tests.support.world import Sides, assert_nothing_lost, row


def _buckets(sides: Sides) -> set[str]:
    return {found["Name"] for found in sides.target.client().list_buckets()["Buckets"]}


@pytest.mark.slow
def test_a_bucket_is_made_after_the_approval_where_that_was_asked_for(
    fault_lab: Lab, sides: Sides, start: Start
) -> None:
    bucket, before = "made-by-the-run", _buckets(sides)
    refused = start(target_bucket=bucket)
    assert refused.go() == "refused"
    dry = start(target_bucket=bucket, create_bucket=True, dry_run=True)
    assert dry.go() == "planned", dry.errors
    shown = dry.xcom("plan", "markdown")
    assert "does not exist and would be created right after the approval" in shown
    assert "The old bucket has versioning: none, object lock: none." in shown
    assert f"1. make the bucket `{sides.target.endpoint_url}/{bucket}`" in shown
    assert _buckets(sides) == before
    run = start(target_bucket=bucket, create_bucket=True)
    seen: list[set[str]] = []
    run.before = {name: lambda: seen.append(_buckets(sides)) for name in ("backup", "copy_ahead")}
    assert run.go() == "switched", run.errors
    assert seen == [before, before | {bucket}]
    assert run.xcom("backup")["bucket_created"]
    assert fault_lab.mariadb.setting()["Bucket"] == f"{sides.target.endpoint_url}/{bucket}"
    assert_nothing_lost(fault_lab)
    made = Setting(row(fault_lab)).config
    S3Bucket.from_storage(made).create()  # a task that was killed tries again
    assert _buckets(sides) == before | {bucket}
    with pytest.raises(PermanentError, match="403"):
        S3Bucket.from_storage(replace(made, secret_key=SecretStr("not the secret key"))).create()
    back = start(target_conn_id="minio_old", target_bucket=fault_lab.old_store.bucket)
    assert back.go() == "switched", back.errors


@pytest.mark.slow
def test_a_bucket_that_goes_away_after_it_was_checked_is_not_made_by_juicefs_config(
    fault_lab: Lab, sides: Sides, start: Start
) -> None:
    bucket, before, was = "gone-again", _buckets(sides), row(fault_lab)
    run = start(target_bucket=bucket, create_bucket=True)

    def remove() -> None:
        s3 = sides.target.client()
        for found in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for item in found.get("Contents", []):
                s3.delete_object(Bucket=bucket, Key=item["Key"])
        s3.delete_bucket(Bucket=bucket)

    run.before = {"write_setting": remove}
    assert run.go() == "failed", run.errors
    assert "expected a bucket, found none" in run.errors["write_setting"]
    assert _buckets(sides) == before
    assert row(fault_lab) == was
    assert_nothing_lost(fault_lab)

"""The URL that JuiceFS calls `Bucket`, read as JuiceFS reads it."""

from __future__ import annotations

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.bucket_url import BucketUrl, parse_bucket_url, with_parameters


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:9000/data", BucketUrl("http://h:9000", "data")),
        ("https://h:9000/data/", BucketUrl("https://h:9000", "data")),
        ("h:9000/data", BucketUrl("http://h:9000", "data")),
        ("h.example/data", BucketUrl("http://h.example", "data")),
        ("http://h:9000/minio/data", BucketUrl("http://h:9000", "data")),
        ("http://h:9000/minio", BucketUrl("http://h:9000", "minio")),
        ("http://h:9000/data/below", BucketUrl("http://h:9000", "data")),
        ("http://[::1]:9000/data", BucketUrl("http://[::1]:9000", "data")),
        ("HTTPS://h/data", BucketUrl("https://h", "data")),
        ("https://h/data?region=eu-west-1", BucketUrl("https://h", "data", "eu-west-1")),
        ("https://h/data?tls-insecure-skip-verify=true", BucketUrl("https://h", "data", verify=False)),
        ("https://h/data?tls-insecure-skip-verify=1&region=r", BucketUrl("https://h", "data", "r", verify=False)),
        ("https://h/data?tls-insecure-skip-verify=false", BucketUrl("https://h", "data")),
    ],
)
def test_minio(url: str, expected: BucketUrl) -> None:
    assert parse_bucket_url("minio", url) == expected
    assert parse_bucket_url("MINIO", url) == expected


def amazon(region: str, bucket: str = "data", suffix: str = "", **more: bool) -> BucketUrl:
    return BucketUrl(f"https://s3.{region}.amazonaws.com{suffix}", bucket, region, **{"virtual_host": True, **more})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://h:9000/data", BucketUrl("https://h:9000", "data")),
        ("https://h:9000/data/below/", BucketUrl("https://h:9000", "data")),
        ("https://h/data?region=eu-west-1", BucketUrl("https://h", "data")),
        ("https://data.h.example:9000", BucketUrl("https://h.example:9000", "data")),
        ("h.example:9000/data", BucketUrl("http://h.example:9000", "data")),
        ("localhost:9000/data", BucketUrl("https://localhost:9000", "data")),
        ("https://[::1]:9000/data", BucketUrl("https://[::1]:9000", "data")),
        ("https://data.s3.eu-west-1.amazonaws.com", amazon("eu-west-1")),
        ("data.s3.eu-west-1.amazonaws.com", amazon("eu-west-1")),
        ("data.s3.eu-west-1.amazonaws.com?tls-insecure-skip-verify=T", amazon("eu-west-1", verify=False)),
        ("https://s3.eu-west-1.amazonaws.com/data", amazon("eu-west-1")),
        ("https://s3-eu-west-1.amazonaws.com/data", amazon("eu-west-1")),
        ("https://data.s3-eu-west-1.amazonaws.com/", amazon("eu-west-1")),
        ("https://data.s3.dualstack.eu-west-1.amazonaws.com", amazon("eu-west-1")),
        ("https://data.s3.amazonaws.com", amazon("us-east-1")),
        ("https://s3.amazonaws.com/data", amazon("us-east-1")),
        ("https://data.s3.cn-north-1.amazonaws.com.cn", amazon("cn-north-1", suffix=".cn")),
        ("https://da.ta.s3.eu-west-1.amazonaws.com", amazon("eu-west-1", "da.ta", virtual_host=False)),
        (
            "https://data.bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com",
            BucketUrl("https://bucket.vpce-1.s3.eu-west-1.vpce.amazonaws.com", "data", "eu-west-1"),
        ),
        ("https://data.s3.gra.cloud.ovh.net", BucketUrl("https://s3.gra.cloud.ovh.net", "data", "gra")),
        (
            "https://data.n.compat.objectstorage.eu-zurich-1.oraclecloud.com",
            BucketUrl("https://n.compat.objectstorage.eu-zurich-1.oraclecloud.com", "data", "eu-zurich-1"),
        ),
        (
            "https://vhcompat.objectstorage.eu-zurich-1.oraclecloud.com/data",
            BucketUrl(
                "https://vhcompat.objectstorage.eu-zurich-1.oraclecloud.com", "data", "eu-zurich-1", virtual_host=True
            ),
        ),
    ],
)
def test_s3(url: str, expected: BucketUrl) -> None:
    assert parse_bucket_url("s3", url) == expected


@pytest.mark.parametrize(
    ("storage", "url"),
    [("minio", "http://h:9000"), ("minio", "http://h:9000/"), ("minio", "http://h//data"), ("s3", "http://h")],
)
def test_a_url_in_which_juicefs_finds_no_bucket_is_refused(storage: str, url: str) -> None:
    with pytest.raises(PermanentError, match="expected http"):
        parse_bucket_url(storage, url)


def test_a_parameter_that_no_client_can_read_is_refused() -> None:
    with pytest.raises(PermanentError, match="expected true or false"):
        parse_bucket_url("minio", "https://h/data?tls-insecure-skip-verify=yes")


def test_parameters_are_appended_as_juicefs_reads_them() -> None:
    assert with_parameters("https://h/data", region="", tls_insecure_skip_verify="") == "https://h/data"
    url = with_parameters("https://h/data", region="eu-1", tls_insecure_skip_verify="true")
    assert url == "https://h/data?region=eu-1&tls-insecure-skip-verify=true"
    assert parse_bucket_url("minio", url) == BucketUrl("https://h", "data", "eu-1", verify=False)


@pytest.mark.parametrize(
    ("storage", "url", "environment", "region", "virtual_host"),
    [
        ("minio", "https://h/data", {"MINIO_REGION": "eu-1", "AWS_REGION": "no"}, "eu-1", False),
        ("minio", "https://h/data?region=r", {"MINIO_REGION": "eu-1"}, "r", False),
        (
            "s3",
            "https://h/data",
            {"AWS_REGION": "eu-1", "AWS_DEFAULT_REGION": "no"},
            "eu-1",
            False,
        ),
        ("s3", "https://h/data", {"AWS_DEFAULT_REGION": "eu-1"}, "eu-1", False),
        ("s3", "https://data.s3.eu-west-1.amazonaws.com", {"AWS_REGION": "no"}, "eu-west-1", True),
        ("s3", "https://s3.amazonaws.com/data", {"AWS_REGION": "no"}, "us-east-1", True),
        ("s3", "https://h/data", {"JFS_S3_VHOST_STYLE": "1"}, "us-east-1", True),
        ("minio", "https://h/data", {"JFS_S3_VHOST_STYLE": "true"}, "us-east-1", True),
        ("minio", "https://h/data", {"JFS_S3_VHOST_STYLE": "0"}, "us-east-1", False),
        ("s3", "https://da.ta.s3.eu-west-1.amazonaws.com", {"JFS_S3_VHOST_STYLE": "1"}, "eu-west-1", False),
        ("s3", "https://data.bucket.vpce-1.s3.r.vpce.amazonaws.com", {"JFS_S3_VHOST_STYLE": "1"}, "r", True),
    ],
)
def test_what_the_url_leaves_open_the_environment_of_the_clients_says(
    storage: str, url: str, environment: dict[str, str], region: str, *, virtual_host: bool
) -> None:
    found = parse_bucket_url(storage, url, environment)
    assert (found.region, found.virtual_host) == (region, virtual_host)

"""What an Airflow connection or a setting says of a store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from include.juicefs_storage.adapters.s3.store import PROMPT, S3Store, connection_storage
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.setting import StorageConfig


@pytest.mark.parametrize("endpoint", ["h:1", "http://k:s@h", "http://h/bucket", "ftp://h"])
def test_endpoints_that_are_refused(endpoint: str) -> None:
    with pytest.raises(PermanentError, match="endpoint"):
        S3Store(endpoint, "b")


class Connections:
    """Airflow connections in the environment."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def add(self, conn_id: str, conn_type: str = "aws", **fields: Any) -> None:
        self._monkeypatch.setenv(
            f"AIRFLOW_CONN_{conn_id.upper()}",
            json.dumps({"conn_type": conn_type, "login": "ak", "password": "sk", **fields}),
        )


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Connections:
    monkeypatch.setenv("AIRFLOW_HOME", str(tmp_path))
    return Connections(monkeypatch)


def test_everything_a_connection_says_is_used(connections: Connections, tmp_path: Path) -> None:
    ca = tmp_path / "ca.crt"
    ca.touch()
    config = {
        "s3": {"addressing_style": "virtual"}, "connect_timeout": 3, "read_timeout": 17,
        "retries": {"total_max_attempts": 1},
    }  # fmt: skip
    extra = {
        "endpoint_url": "https://s3.example:9000", "region_name": "eu-west-1", "aws_session_token": "token",
        "verify": str(ca), "config_kwargs": config,
    }  # fmt: skip
    connections.add("all", extra=extra)
    store = S3Store.from_connection("all", "data", "v/", PROMPT)
    assert (store.endpoint, store.bucket, store.prefix) == ("https://s3.example:9000", "data", "v/")
    assert (store.access_key, store.secret_key, store.session_token) == ("ak", "sk", "token")
    assert (store.region, store.verify, store.virtual_host) == ("eu-west-1", str(ca), True)
    assert (store.limits.connect_s, store.limits.idle_s, store.limits.tries) == (3, 17, 1)
    assert store.limits.total_s == PROMPT.total_s


def test_a_scheme_in_capitals_is_the_same_scheme(connections: Connections) -> None:
    connections.add("capitals", extra={"endpoint_url": "HTTP://Store.example:9000"})
    assert S3Store.from_connection("capitals", "b").endpoint == "http://Store.example:9000"
    assert connection_storage("capitals", "minio", "b").bucket == "http://Store.example:9000/b"
    assert connection_storage("capitals", "minio", "b", "HTTPS://pods:1/").bucket == "https://pods:1/b"


def test_what_a_connection_leaves_out(connections: Connections) -> None:
    connections.add("plain", extra={"service_config": {"s3": {"endpoint_url": "http://[::1]:9000/"}}})
    store = S3Store.from_connection("plain", "data", limits=PROMPT)
    assert store.endpoint == "http://[::1]:9000"
    assert (store.region, store.verify, store.virtual_host, store.session_token) == ("us-east-1", True, False, "")
    assert store.limits == PROMPT


@pytest.mark.parametrize(
    ("given", "verify"), [(False, False), ("false", False), ("False", False), (True, True), ("true", True), ("", True)]
)
def test_verify_as_people_write_it(connections: Connections, given: object, *, verify: bool) -> None:
    connections.add("tls", extra={"endpoint_url": "https://h", "verify": given})
    assert S3Store.from_connection("tls", "b").verify is verify


def test_a_ca_file_that_is_not_there_is_named(connections: Connections) -> None:
    connections.add("tls", extra={"endpoint_url": "https://h", "verify": "/no/such/ca.crt"})
    with pytest.raises(PermanentError, match=r"Connection 'tls'.*extra.verify.*/no/such/ca.crt"):
        S3Store.from_connection("tls", "b")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"extra": {}}, "endpoint_url"),
        ({"login": "", "extra": {"endpoint_url": "http://h"}}, "login"),
        ({"password": "", "extra": {"endpoint_url": "http://h"}}, "(login|password)"),
        ({"conn_type": "http", "extra": {"endpoint_url": "http://h"}}, "type aws"),
        (
            {"extra": {"endpoint_url": "http://h", "service_config": {"s3": {"extra_args": {"SSECustomerKey": "k"}}}}},
            "found SSECustomerKey: such headers",
        ),
        ({"extra": {"endpoint_url": "http://h", "role_arn": "arn:aws:iam::1:role/r"}}, "found role_arn arn:aws"),
    ],
)
def test_a_connection_that_cannot_be_used_is_refused_by_the_field(
    connections: Connections, fields: dict[str, Any], expected: str
) -> None:
    connections.add("lacking", **fields)
    for make in (lambda: S3Store.from_connection("lacking", "b"), lambda: connection_storage("lacking", "minio", "b")):
        with pytest.raises(PermanentError, match=f"Connection 'lacking': expected .*{expected}"):
            make()


def test_juicefs_gets_what_the_connection_says(connections: Connections) -> None:
    connections.add("new", extra={"endpoint_url": "http://h:9000/"})
    config = connection_storage("new", "minio", "data")
    assert config.bucket == "http://h:9000/data"
    assert (config.access_key.get_secret_value(), config.secret_key.get_secret_value()) == ("ak", "sk")
    assert connection_storage("new", "minio", "data", "http://inside:9000").bucket == "http://inside:9000/data"


def given_to_clients(connections: Connections, storage: str = "minio", **extra: Any) -> StorageConfig:
    connections.add("new", extra=extra)
    return connection_storage("new", storage, "data")


def test_clients_check_no_certificate_that_airflow_does_not_check(connections: Connections, tmp_path: Path) -> None:
    insecure = given_to_clients(connections, endpoint_url="https://h:9000/", verify=False)
    assert insecure.bucket == "https://h:9000/data?tls-insecure-skip-verify=true"
    assert not insecure.url.verify
    assert given_to_clients(connections, endpoint_url="http://h:9000", verify=False).bucket == "http://h:9000/data"
    authority = tmp_path / "ca.crt"
    authority.touch()
    own = given_to_clients(connections, endpoint_url="https://h:9000", verify=str(authority))
    assert own.bucket == "https://h:9000/data"


def test_clients_sign_for_the_region_of_the_connection(connections: Connections) -> None:
    url, region = "https://h:9000", "eu-west-1"
    assert given_to_clients(connections, endpoint_url=url, region_name=region).bucket == f"{url}/data?region={region}"
    assert given_to_clients(connections, endpoint_url=url, region_name="us-east-1").bucket == f"{url}/data"
    assert given_to_clients(connections, endpoint_url=url).bucket == f"{url}/data"
    assert given_to_clients(connections, "s3", endpoint_url=url, region_name=region).bucket == f"{url}/data"


def test_airflow_signs_for_the_region_in_an_endpoint(connections: Connections) -> None:
    connections.add("amazon", extra={"endpoint_url": "https://s3.eu-west-1.amazonaws.com"})
    assert S3Store.from_connection("amazon", "data").region == "eu-west-1"


def test_clients_get_the_session_token(connections: Connections) -> None:
    config = given_to_clients(connections, endpoint_url="http://h", aws_session_token="token")
    assert config.session_token.get_secret_value() == "token"
    assert "token" not in config.bucket


def test_a_setting_names_endpoint_bucket_and_keys() -> None:
    store = S3Store.from_storage(StorageConfig("minio", "http://h:9000/data", SecretStr("ak"), SecretStr("sk")))
    assert (store.endpoint, store.bucket, store.access_key, store.secret_key) == ("http://h:9000", "data", "ak", "sk")
    assert store.origin == "the volume's setting"


def test_a_setting_says_how_its_clients_reach_the_store() -> None:
    url = "https://h:9000/data?region=eu-1&tls-insecure-skip-verify=true"
    store = S3Store.from_storage(StorageConfig("minio", url, SecretStr("ak"), SecretStr("sk"), SecretStr("token")))
    assert (store.endpoint, store.bucket, store.region) == ("https://h:9000", "data", "eu-1")
    assert (store.verify, store.session_token, store.virtual_host) == (False, "token", False)
    amazon = StorageConfig("s3", "data.s3.eu-west-1.amazonaws.com", SecretStr("ak"), SecretStr("sk"))
    store = S3Store.from_storage(amazon)
    assert (store.endpoint, store.region) == ("https://s3.eu-west-1.amazonaws.com", "eu-west-1")
    assert (store.verify, store.session_token, store.virtual_host) == (True, "", True)

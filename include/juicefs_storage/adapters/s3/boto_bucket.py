"""One bucket of an S3 store, through Airflow's S3Hook or with the keys of the volume's setting."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.ports import StoredObject
from include.juicefs_storage.volume.setting import ENDPOINT, StorageConfig

if TYPE_CHECKING:
    from airflow.sdk import Connection
    from botocore.config import Config
    from mypy_boto3_s3 import S3Client

_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S, _TRIES = 5, 30, 3
_CHUNK_BYTES = 2**20
#: Answers that do not go away by themselves, with what to do about each.
_REMEDIES = {
    "404": "make the bucket, or correct its name: it is never created from here",
    "NoSuchBucket": "make the bucket, or correct its name: it is never created from here",
    "403": "correct the keys of the connection, or their policy on this bucket",
    "AccessDenied": "correct the keys of the connection, or their policy on this bucket",
    "InvalidAccessKeyId": "correct the access key (login) of the connection",
    "SignatureDoesNotMatch": "correct the secret key (password) of the connection",
}


def aws_connection(conn_id: str, endpoint: str | None = None) -> tuple[Connection, str]:
    """An Airflow connection of type `aws` with both keys, and the endpoint it names.

    Args:
        conn_id: login = access key, password = secret key; extra: endpoint_url, or service_config.s3.endpoint_url.
        endpoint: Taken instead of the connection's.

    Raises:
        PermanentError: The connection lacks a field.
    """
    from airflow.sdk import BaseHook

    connection = BaseHook.get_connection(conn_id)
    extra = connection.extra_dejson
    service = (extra.get("service_config") or {}).get("s3") or {}
    endpoint = endpoint or service.get("endpoint_url") or extra.get("endpoint_url")
    for field, value in (
        ("type aws", connection.conn_type == "aws"),
        ("a login (access key)", connection.login),
        ("a password (secret key)", connection.password),
        ("extra.endpoint_url", endpoint),
    ):
        if not value:
            raise PermanentError(
                f"Connection {conn_id!r}: expected {field}, found none.",
                next_step="correct the connection in Airflow (Admin → Connections)",
            )
    return connection, str(endpoint)


def connection_storage(conn_id: str, storage: str, bucket: str, endpoint: str | None = None) -> StorageConfig:
    """What JuiceFS is told about a store that an Airflow connection of type `aws` describes.

    Args:
        conn_id: See aws_connection.
        storage: JuiceFS' name of the store's kind.
        bucket: The bucket's name.
        endpoint: The endpoint as the JuiceFS clients reach it, where that differs from the connection's.

    Raises:
        PermanentError: The connection lacks a field.
    """
    connection, endpoint = aws_connection(conn_id, endpoint)
    if not ENDPOINT.match(endpoint):
        raise PermanentError(
            f"Connection {conn_id!r}: expected an endpoint of the form http(s)://host[:port], found one with a path, "
            "keys, or no scheme: JuiceFS would read another bucket from it.",
            next_step="correct extra.endpoint_url in Airflow (Admin → Connections)",
        )
    return StorageConfig(
        storage,
        f"{endpoint.rstrip('/')}/{bucket}",
        SecretStr(connection.login or ""),
        SecretStr(connection.password or ""),
    )


def _limits() -> Config:
    """How long a request may take: `_TRIES` times a timeout, and a few seconds between the tries."""
    from botocore.config import Config

    return Config(
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _TRIES},
    )


class S3Bucket:
    """`ports.ObjectStore` on one bucket."""

    def __init__(self, client: S3Client, bucket: str) -> None:
        self._client, self._bucket = client, bucket

    @classmethod
    def from_connection(cls, conn_id: str, bucket: str) -> S3Bucket:
        """Use an Airflow connection of type `aws`."""
        from airflow.providers.amazon.aws.hooks.s3 import S3Hook
        from airflow.sdk import BaseHook
        from botocore.config import Config

        BaseHook.get_connection(conn_id)  # S3Hook would go on without one, with whatever keys the worker has
        # The connection's own `config_kwargs` win; without any, botocore waits up to five times a minute.
        config = _limits().merge(S3Hook(aws_conn_id=conn_id).conn_config.botocore_config or Config())
        return cls(S3Hook(aws_conn_id=conn_id, config=config).get_conn(), bucket)

    @classmethod
    def from_storage(cls, config: StorageConfig) -> S3Bucket:
        """Use the endpoint and keys that the volume's clients use."""
        import boto3
        from botocore.config import Config

        endpoint, bucket = config.endpoint_and_bucket
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=config.access_key.get_secret_value(),
            aws_secret_access_key=config.secret_key.get_secret_value(),
            config=_limits().merge(Config(s3={"addressing_style": "path"})),
        )
        return cls(client, bucket)

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            where = f"{action} in bucket {self._bucket} at {self._client.meta.endpoint_url}"
            if code in _REMEDIES:
                raise PermanentError(f"{where}: the store answered {code}.", next_step=_REMEDIES[code]) from None
            raise TransientError(f"{where}: the store answered {code}.", next_step="look at the store") from None
        except BotoCoreError as error:
            raise TransientError(
                f"{action} in bucket {self._bucket}: {self._client.meta.endpoint_url} cannot be used "
                f"({type(error).__name__}).",
                next_step="check the endpoint and that it is reachable from the Airflow workers",
            ) from None

    def check_bucket(self) -> None:
        """HEAD the bucket."""
        with self._explained("HEAD"):
            self._client.head_bucket(Bucket=self._bucket)

    def probe(self, key: str) -> None:
        """PUT, GET, LIST and DELETE one object of our own; it is deleted whatever happens in between."""
        body = uuid.uuid4().hex.encode()
        with self._explained("PUT"):
            self._client.put_object(Bucket=self._bucket, Key=key, Body=body)
        try:
            if self.read(key) != body:
                raise PermanentError(
                    f"Bucket {self._bucket} gave back other content than was written to {key}.",
                    next_step="look at the store: a cache or a second site behind the same endpoint?",
                )
            if key not in {item.key for item in self.list(key)}:
                raise PermanentError(
                    f"Bucket {self._bucket} does not list {key} right after it was written.",
                    next_step="check that the keys may list the bucket",
                )
        finally:
            with self._explained("DELETE"):
                self._client.delete_object(Bucket=self._bucket, Key=key)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        """ListObjectsV2, page by page."""
        with self._explained("LIST"):
            for page in self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=prefix):
                for item in page.get("Contents", ()):
                    yield StoredObject(item["Key"], item["Size"], item.get("ETag", "").strip('"'))

    def read(self, key: str) -> bytes | None:
        """GET one small object."""
        with self._explained(f"GET {key}"):
            try:
                return self._client.get_object(Bucket=self._bucket, Key=key)["Body"].read()
            except self._client.exceptions.NoSuchKey:
                return None

    def digest(self, key: str) -> str | None:
        """GET one object and hash it chunk by chunk."""
        from botocore.exceptions import ClientError

        with self._explained(f"GET {key}"):
            try:
                body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"]
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in {"404", "NoSuchKey"}:
                    return None
                raise
            sha256 = hashlib.sha256()
            for chunk in body.iter_chunks(_CHUNK_BYTES):
                sha256.update(chunk)
        return sha256.hexdigest()

    def head(self, key: str) -> StoredObject | None:
        """HEAD one object; None where there is none."""
        from botocore.exceptions import ClientError

        with self._explained(f"HEAD {key}"):
            try:
                found = self._client.head_object(Bucket=self._bucket, Key=key)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in {"404", "NoSuchKey"}:
                    return None
                raise
        return StoredObject(key, found["ContentLength"], found.get("ETag", "").strip('"'))

    def exists(self, key: str) -> bool:
        """HEAD one object."""
        return self.head(key) is not None

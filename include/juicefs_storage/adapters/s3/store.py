"""What says where a bucket is and with which keys: an Airflow connection, or the setting of a volume."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.adapters.s3.wire.limits import Limits
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.bucket_url import parse_bucket_url, with_parameters

if TYPE_CHECKING:
    from airflow.providers.amazon.aws.utils.connection_wrapper import AwsConnectionWrapper

    from include.juicefs_storage.volume.setting import StorageConfig

#: The param that takes a connection for each side of a move.
_GIVEN_IN = {"old store": "in `source_conn_id`", "new store": "in `target_conn_id`"}
_ENDPOINT = re.compile(r"https?://[^/\s?#@]+/?")
#: Of calls that a cut-over waits for.
PROMPT = Limits(connect_s=5, idle_s=30, tries=3, total_s=100)
#: Of a look whether anything answers: a store that takes connections and is silent costs ten seconds.
LOOK = Limits(connect_s=5, idle_s=5, tries=2, total_s=10)
_CORRECT = "correct the connection in Airflow (Admin → Connections)"


@dataclass(frozen=True, slots=True)
class S3Store:
    """One bucket of an S3 store, where it is and with which keys.

    Attributes:
        endpoint: `http(s)://host[:port]`.
        bucket: Its name.
        prefix: What every key begins with. It is used as it is: a folder's ends with `/`.
        access_key: Not in `repr`.
        secret_key: Not in `repr`.
        region: That requests are signed for.
        session_token: Of temporary keys; not in `repr`.
        verify: Whether a certificate is checked, or the file (or folder) of the authorities to trust.
        virtual_host: The bucket is part of the host's name instead of the path.
        origin: Where this was configured, for messages.
        storage_class: Of new objects; empty: the bucket's own.
        side: Which store of a move this is, for messages; empty: there is no move.
        limits: Of each call.
    """

    endpoint: str
    bucket: str
    prefix: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    region: str = "us-east-1"
    session_token: str = field(default="", repr=False)
    verify: bool | str = True
    virtual_host: bool = False
    origin: str = "the connection"
    storage_class: str = ""
    side: str = ""
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not _ENDPOINT.fullmatch(self.endpoint):
            raise PermanentError(
                "Expected an endpoint of the form http(s)://host[:port], found one with a path, keys, or no scheme.",
                next_step="correct extra.endpoint_url of the connection",
            )
        object.__setattr__(self, "endpoint", self.endpoint.rstrip("/"))

    @property
    def name(self) -> str:
        """Bucket, prefix and endpoint, for messages."""
        return f"{self.bucket}/{self.prefix} at {self.endpoint}"

    @property
    def where(self) -> str:
        """The side and where it was configured, before the name, for messages that must be told apart."""
        return f"The {self.side}, by {self.origin}, {self.name}" if self.side else self.name

    @property
    def connection(self) -> str:
        """What has fields of its own for region, addressing and TLS: a setting has none."""
        if "connection" in self.origin:
            return self.origin
        return f"a connection that is given to the run {_GIVEN_IN.get(self.side, 'for this store')}"

    @classmethod
    def from_connection(cls, conn_id: str, bucket: str, prefix: str = "", limits: Limits | None = None) -> S3Store:
        """Read an Airflow connection of type `aws`, as the Amazon provider's hooks read it.

        Args:
            conn_id: login = access key, password = secret key; extra: endpoint_url or service_config.s3.endpoint_url,
                region_name, aws_session_token, verify (false, or the file of a CA), config_kwargs: s3.addressing_style,
                connect_timeout, read_timeout, retries.total_max_attempts.
            bucket: The bucket's name.
            prefix: What every key begins with.
            limits: Of each call, where config_kwargs does not say otherwise.

        Raises:
            PermanentError: The connection lacks a field, names a file that cannot be read, or a role to assume.
        """
        aws, endpoint = _aws_connection(conn_id)
        extra = aws.extra_config
        config = {**(extra.get("config_kwargs") or {}), **_of_s3(aws)}
        return cls(
            endpoint=endpoint,
            bucket=bucket,
            prefix=prefix,
            access_key=aws.aws_access_key_id or "",
            secret_key=aws.aws_secret_access_key or "",
            region=_region(aws) or parse_bucket_url("s3", f"{endpoint.rstrip('/')}/{bucket}").region,
            session_token=aws.aws_session_token or "",
            verify=_verify(conn_id, aws.verify),
            virtual_host=(config.get("s3") or {}).get("addressing_style") == "virtual",
            origin=f"connection {conn_id!r}",
            limits=_limits(config, limits or Limits()),
        )

    @classmethod
    def from_storage(
        cls,
        config: StorageConfig,
        prefix: str = "",
        limits: Limits | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> S3Store:
        """Read the setting of a JuiceFS volume.

        Args:
            config: What the volume's clients use.
            prefix: What every key begins with.
            limits: Of each call.
            environment: The clients', see `parse_bucket_url`.

        Raises:
            PermanentError: The bucket's URL is not one of an endpoint and a bucket.
        """
        url = parse_bucket_url(config.storage, config.bucket, environment)
        return cls(
            url.endpoint,
            url.bucket,
            prefix,
            config.access_key.get_secret_value(),
            config.secret_key.get_secret_value(),
            region=url.region,
            session_token=config.session_token.get_secret_value(),
            verify=url.verify,
            virtual_host=url.virtual_host,
            origin="the volume's setting",
            limits=limits or Limits(),
        )


def connection_storage(conn_id: str, storage: str, bucket: str, endpoint: str | None = None) -> StorageConfig:
    """Describe a store to JuiceFS as an Airflow connection of type `aws` describes it to Airflow.

    The clients are given what the connection says of keys, session token, region and `verify=false`. The file of a CA
    is for Airflow alone: the clients trust what their image trusts.

    Args:
        conn_id: See S3Store.from_connection.
        storage: JuiceFS' name of the store's kind.
        bucket: The bucket's name.
        endpoint: The endpoint as the JuiceFS clients reach it, where that differs from the connection's.

    Raises:
        PermanentError: The connection lacks a field.
    """
    from pydantic import SecretStr

    from include.juicefs_storage.volume.setting import ENDPOINT, StorageConfig

    aws, endpoint = _aws_connection(conn_id, endpoint)
    if not ENDPOINT.match(endpoint):
        raise PermanentError(
            f"Connection {conn_id!r}: expected an endpoint of the form http(s)://host[:port], found one with a path, "
            "keys, or no scheme: JuiceFS would read another bucket from it.",
            next_step="correct extra.endpoint_url in Airflow (Admin → Connections)",
        )
    url, region = f"{endpoint.rstrip('/')}/{bucket}", _region(aws)
    # Of other kinds JuiceFS reads no such parameter.
    named = storage == "minio" and region != parse_bucket_url(storage, url).region
    insecure = url.startswith("https://") and _verify(conn_id, aws.verify) is False
    return StorageConfig(
        storage,
        with_parameters(url, region=region if named else "", tls_insecure_skip_verify="true" if insecure else ""),
        SecretStr(aws.aws_access_key_id or ""),
        SecretStr(aws.aws_secret_access_key or ""),
        SecretStr(aws.aws_session_token or ""),
    )


def _region(aws: AwsConnectionWrapper) -> str:
    """The region that a connection names; empty where it names none."""
    config = {**(aws.extra_config.get("config_kwargs") or {}), **_of_s3(aws)}
    return str(aws.region_name or config.get("region_name") or "")


def _of_s3(aws: AwsConnectionWrapper) -> dict[str, Any]:
    return aws.get_service_config("s3").get("config_kwargs") or {}


def _aws_connection(conn_id: str, endpoint: str | None = None) -> tuple[AwsConnectionWrapper, str]:
    """Read a connection that has both keys, and the endpoint that it names or that is given."""
    from airflow.providers.amazon.aws.utils.connection_wrapper import AwsConnectionWrapper
    from airflow.sdk import BaseHook

    with missing_connections_explained():
        connection = BaseHook.get_connection(conn_id)
    found = f"Connection {conn_id!r}: expected"
    if connection.conn_type != "aws":
        raise PermanentError(f"{found} type aws, found {connection.conn_type!r}.", next_step=_CORRECT)
    aws = AwsConnectionWrapper(connection)
    if aws.role_arn:
        raise PermanentError(
            f"{found} keys that last, found role_arn {aws.role_arn}: a role's keys expire during a copy, and clients "
            "do not renew them.",
            next_step="remove role_arn from its extra, and give an access key that may use the bucket",
        )
    if given := aws.get_service_config("s3").get("extra_args") or aws.extra_config.get("extra_args"):
        raise PermanentError(
            f"{found} no extra_args, found {', '.join(sorted(given))}: such headers (encryption, ACL) are not sent.",
            next_step="remove extra_args from its extra; set encryption and ACL as defaults of the bucket",
        )
    endpoint = endpoint or aws.get_service_endpoint_url("s3")
    for field_name, value in (
        ("a login (access key)", aws.aws_access_key_id),
        ("a password (secret key)", aws.aws_secret_access_key),
        ("extra.endpoint_url", endpoint),
    ):
        if not value:
            raise PermanentError(f"{found} {field_name}, found none.", next_step=_CORRECT)
    # A scheme has no case (RFC 3986, 3.1); JuiceFS and what this project looks for take the small letters.
    scheme, mark, rest = str(endpoint).partition("://")
    return aws, f"{scheme.lower()}{mark}{rest}"


def _verify(conn_id: str, given: object) -> bool | str:
    """Return the connection's `verify`: JSON or text, a truth value or a path."""
    if given is None or given == "":
        return True
    text = str(given)
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if not Path(text).exists():
        raise PermanentError(
            f"Connection {conn_id!r}: expected the file of a CA in extra.verify, found nothing at {text}.",
            next_step="correct extra.verify, or mount the file into every Airflow worker",
        )
    return text


def _limits(config: dict[str, Any], limits: Limits) -> Limits:
    """Return what the connection's botocore options say of time-outs and tries."""
    retries = config.get("retries") or {}
    tries = retries.get("total_max_attempts") or (retries["max_attempts"] + 1 if "max_attempts" in retries else None)
    return replace(
        limits,
        connect_s=float(config.get("connect_timeout") or limits.connect_s),
        idle_s=float(config.get("read_timeout") or limits.idle_s),
        tries=int(tries or limits.tries),
    )

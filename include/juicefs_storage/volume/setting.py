"""The row `format` of table `jfs_setting`: where a JuiceFS volume keeps its data."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.bucket_url import BucketUrl, parse_bucket_url

#: The fields of the setting that a switch changes. Everything else in the row is left as it is found.
STORAGE_FIELDS = ("Storage", "Bucket", "AccessKey", "SecretKey", "SessionToken", "KeyEncrypted")
#: What JuiceFS and S3 clients read in the same way; a path or keys in it they do not.
ENDPOINT = re.compile(r"^https?://[^/\s?#@]+/?$", re.IGNORECASE)
_NONCE_BYTES = 12
_NO_TOKEN = SecretStr("")
#: The fields that JuiceFS encrypts and a switch reads, with what they are called.
_SEALED = {"SecretKey": "secret key", "SessionToken": "session token"}


@dataclass(frozen=True, slots=True)
class StorageConfig:
    """Where a volume's objects live and with which keys, in JuiceFS' own terms.

    Attributes:
        storage: JuiceFS' name of the store's kind: `minio`, `s3`.
        bucket: The URL that JuiceFS calls `Bucket`: endpoint and bucket in one.
        access_key: Masked in every `repr`.
        secret_key: Masked in every `repr`.
        session_token: Of temporary keys, else empty. Masked in every `repr`.
    """

    storage: str
    bucket: str
    access_key: SecretStr
    secret_key: SecretStr
    session_token: SecretStr = _NO_TOKEN

    @property
    def url(self) -> BucketUrl:
        """What the clients take from storage and bucket, see `parse_bucket_url`."""
        return parse_bucket_url(self.storage, self.bucket)

    @property
    def endpoint_and_bucket(self) -> tuple[str, str]:
        """Endpoint and the bucket's name, see `endpoint_and_bucket`."""
        return endpoint_and_bucket(self.storage, self.bucket)

    @property
    def secrets(self) -> tuple[str, ...]:
        """The plain keys and the token, for masks: those that there are."""
        values = (self.secret_key, self.session_token, self.access_key)
        return tuple(filter(None, (value.get_secret_value() for value in values)))

    @property
    def place(self) -> tuple[str, str]:
        """Endpoint and bucket in one form: equal where two storages name the same bucket with other keys."""
        endpoint, bucket = self.endpoint_and_bucket
        return normal_endpoint(endpoint), bucket


def endpoint_and_bucket(storage: str, bucket: str) -> tuple[str, str]:
    """Return `https://host:port` and the bucket's name, of the URL that JuiceFS calls `Bucket`.

    Raises:
        PermanentError: JuiceFS finds no bucket in it.
    """
    url = parse_bucket_url(storage, bucket)
    return url.endpoint, url.bucket


def normal_endpoint(endpoint: str) -> str:
    """Return an endpoint in one form: lower case, no default port, no `/` at the end."""
    scheme, _, host = endpoint.lower().rstrip("/").partition("://")
    return f"{scheme}://{host.removesuffix({'http': ':80', 'https': ':443'}.get(scheme, ''))}"


def masked(value: SecretStr) -> str:
    """Return an access key as plans and reports show it: enough to tell two keys apart, not enough to use one."""
    text = value.get_secret_value()
    return f"{text[:2]}…{text[-2:]}" if len(text) >= 12 else ("…" if text else "(none)")


@dataclass(frozen=True)
class Setting:
    """The setting as one immutable value; `raw` is the row's exact bytes and holds key material: never log it."""

    raw: bytes

    def __repr__(self) -> str:
        return f"Setting(name={self.name!r}, bucket={self.bucket!r})"

    @cached_property
    def _fields(self) -> dict[str, Any]:
        try:
            fields = json.loads(self.raw)
        except ValueError:
            fields = None
        if not isinstance(fields, dict) or not {"Name", "UUID", "Storage", "Bucket", "BlockSize"} <= fields.keys():
            raise PermanentError(
                "The row `format` of jfs_setting is not the JSON of a JuiceFS volume.",
                next_step="compare the metadata connection with the Secret's metaurl",
            ) from None
        return fields

    @cached_property
    def name(self) -> str:
        """The volume's name: the first part of every object key."""
        return str(self._fields["Name"])

    @property
    def uuid(self) -> str:
        """The volume's UUID; the key of its encrypted fields derives from it."""
        return str(self._fields["UUID"])

    @property
    def storage(self) -> str:
        """The store's kind in lower case, as JuiceFS reads it: `minio`, `s3`, …"""
        return str(self._fields["Storage"]).lower()

    @property
    def storage_class(self) -> str:
        """The class that clients give to new blocks (`juicefs format --storage-class`); empty: the bucket's own."""
        return str(self._fields.get("StorageClass") or "")

    @property
    def bucket(self) -> str:
        """The URL of endpoint and bucket."""
        return str(self._fields["Bucket"])

    @cached_property
    def block_bytes(self) -> int:
        """The length of a full block in bytes (`BlockSize` is in KiB)."""
        return int(self._fields["BlockSize"]) * 1024

    @cached_property
    def hash_prefix(self) -> bool:
        """Whether keys are spread over 256 prefixes."""
        return bool(self._fields.get("HashPrefix"))

    @property
    def shards(self) -> int:
        """Over how many buckets the keys are spread; 0 and 1 mean one."""
        return int(self._fields.get("Shards") or 0)

    @property
    def shard_places(self) -> tuple[tuple[str, str], ...]:
        """Endpoint and bucket of each shard: the number, from 0, in place of the `%d` of `Bucket`.

        As `NewSharded` does it (pkg/object/sharding.go of JuiceFS 1.4).

        Raises:
            PermanentError: The bucket's URL has no such place, or is none of S3's.
        """
        try:
            urls = [self.bucket % shard for shard in range(self.shards)]
        except (TypeError, ValueError):
            raise PermanentError(
                f"The Bucket of volume {self.name}, which has {self.shards} shards: expected one %d in it.",
                next_step="compare Bucket and Shards in the setting: juicefs status METAURL",
            ) from None
        return tuple(endpoint_and_bucket(self.storage, url) for url in urls)

    @property
    def compression(self) -> str:
        """How blocks are compressed: `lz4`, `zstd`; empty: not at all."""
        return str(self._fields.get("Compression") or "").lower().removeprefix("none")

    @property
    def encrypted(self) -> bool:
        """Whether blocks are encrypted."""
        return bool(self._fields.get("EncryptKey"))

    @cached_property
    def config(self) -> StorageConfig:
        """The storage in use, with the secret key and the session token decrypted.

        Raises:
            PermanentError: One of them cannot be decrypted.
        """
        access_key = SecretStr(str(self._fields.get("AccessKey", "")))
        secret_key, session_token = (SecretStr(self._decrypted(name)) for name in _SEALED)
        return StorageConfig(self.storage, self.bucket, access_key, secret_key, session_token)

    def _decrypted(self, name: str) -> str:
        """A field of `_SEALED`: base64(nonce ‖ AES-128-GCM) under MD5(UUID) (pkg/meta/config.go of JuiceFS 1.4)."""
        value = str(self._fields.get(name) or "")
        if not value or not self._fields.get("KeyEncrypted"):
            return value
        try:
            sealed = base64.b64decode(value, validate=True)
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], None).decode()
        except (ValueError, InvalidTag):
            raise PermanentError(
                f"The {_SEALED[name]} in the setting of volume {self.name} cannot be decrypted.",
                next_step="give the old store's keys as a connection in `source_conn_id`",
            ) from None

    @property
    def _cipher(self) -> AESGCM:
        return AESGCM(hashlib.md5(self.uuid.encode(), usedforsecurity=False).digest())

    def reencrypted(self) -> Setting:
        """Re-encrypt the secret key: other bytes with the same meaning, which every client takes for a change.

        Raises:
            PermanentError: The secret key is stored unencrypted, so it cannot be re-encrypted.
        """
        if not self._fields.get("KeyEncrypted") or not self._fields.get("SecretKey"):
            raise PermanentError(
                f"The secret key in the setting of volume {self.name} is not encrypted and cannot be re-encrypted.",
                next_step="juicefs config METAURL --encrypt-secret, which every client reads as a change",
            )
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, self.config.secret_key.get_secret_value().encode(), None)
        fields = self._fields | {"SecretKey": base64.b64encode(sealed).decode()}
        return Setting(json.dumps(fields, indent=0, ensure_ascii=False).encode())

    def uses(self, config: StorageConfig) -> bool:
        """Return whether the setting names exactly this storage and these keys."""
        return self.config == config

    def uses_one_of(self, configs: Collection[StorageConfig]) -> bool:
        """Return whether the setting names one of these storages, with the session token of any of them.

        The driver's `format` knows no session token, and keeps the one that is there.
        """
        tokens = {config.session_token for config in configs}
        return any(self.uses(replace(config, session_token=token)) for config in configs for token in tokens)

    @property
    def other_fields(self) -> Mapping[str, Any]:
        """The fields beside the storage's. Empty ones are left out, since JuiceFS leaves out some of them."""
        return {key: value for key, value in self._fields.items() if key not in STORAGE_FIELDS and value}

    def with_fields_of(self, other: Setting, names: Collection[str]) -> Setting:
        """Return this setting with some fields of another; everything else stays as it is."""
        merged = {key: value for key, value in self._fields.items() if key not in names}
        merged |= {key: value for key, value in other._fields.items() if key in names}
        return Setting(json.dumps(merged, indent=0, ensure_ascii=False).encode())

    def with_storage_of(self, other: Setting) -> Setting:
        """Return this setting with the storage fields of another; everything else stays as it is now.

        Where nothing else differs the result is the other's exact bytes.
        """
        merged = {key: value for key, value in self._fields.items() if key not in STORAGE_FIELDS}
        merged |= {key: other._fields[key] for key in STORAGE_FIELDS if key in other._fields}
        if merged == other._fields:
            return other
        return Setting(json.dumps(merged, indent=0, ensure_ascii=False).encode())

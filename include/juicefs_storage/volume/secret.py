"""The Kubernetes Secrets that hold a copy of the storage's values."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.ports import Cluster, SecretObject
from include.juicefs_storage.volume.metaurl import same_metadata
from include.juicefs_storage.volume.setting import StorageConfig

_ALIASES = {
    "storage": ("storage",),
    "bucket": ("bucket",),
    "access-key": ("access-key", "accesskey"),
    "secret-key": ("secret-key", "secretkey"),
}


def holds_volume(secret: SecretObject, main: SecretObject) -> bool:
    """Whether a Secret belongs to the same volume as another: the same metadata, and no other volume's name."""
    named = secret.data.get("name") in {None, main.data.get("name")}
    return named and same_metadata(secret.data.get("metaurl", ""), main.data.get("metaurl", ""))


def desired_values(secret: SecretObject, config: StorageConfig) -> dict[str, str]:
    """The values that a Secret should hold for a storage: key -> value.

    Every alias that is present is set. Keys come in pairs with a bucket: where a Secret has `bucket` it is given keys.
    `storage` and `bucket` are never added: a Secret without them makes starting mount pods leave the setting alone.
    """
    values = {
        "storage": config.storage,
        "bucket": config.bucket,
        "access-key": config.access_key.get_secret_value(),
        "secret-key": config.secret_key.get_secret_value(),
    }
    wanted: dict[str, str] = {}
    for canonical, aliases in _ALIASES.items():
        present = [alias for alias in aliases if alias in secret.data]
        if not present and "bucket" in secret.data and canonical.endswith("-key"):
            present = [canonical]
        wanted |= dict.fromkeys(present, values[canonical])
    return wanted


def storage_values(values: Mapping[str, str]) -> dict[str, str]:
    """Those values of a Secret that a switch may change."""
    return {key: values[key] for aliases in _ALIASES.values() for key in aliases if key in values}


def written_by_format(values: Mapping[str, str]) -> StorageConfig | None:
    """What a starting mount pod writes into the setting by these values of a Secret; None where it writes nothing."""
    found = {
        canonical: next((values[alias] for alias in aliases if values.get(alias)), "")
        for canonical, aliases in _ALIASES.items()
    }
    if not found["storage"] or not found["bucket"]:
        return None
    return StorageConfig(
        found["storage"], found["bucket"], SecretStr(found["access-key"]), SecretStr(found["secret-key"])
    )


def volume_secrets(cluster: Cluster, secret_name: str, volume: str) -> list[SecretObject]:
    """The Secret of the volume and every other Secret of its namespace with its metadata, the driver's copies included.

    Raises:
        PermanentError: The Secret belongs to another volume or lacks its metaurl.
    """
    main = cluster.secret(secret_name)
    if not main.data.get("metaurl") or main.data.get("name") != volume:
        raise PermanentError(
            f"Secret {main.namespace}/{main.name}: expected keys metaurl and name={volume!r}, "
            f"found name={main.data.get('name')!r} and keys {', '.join(sorted(main.data))}.",
            next_step="correct `secret_name`, `namespace` or `meta_conn_id`",
        )
    return [main, *(secret for secret in cluster.secrets() if secret.name != main.name and holds_volume(secret, main))]

"""The Kubernetes Secrets that hold a copy of the storage's values."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.ports import Cluster, SecretObject
from include.juicefs_storage.volume.bucket_url import ENVIRONMENT
from include.juicefs_storage.volume.metaurl import MetadataId, Metaurl, forms_of
from include.juicefs_storage.volume.setting import StorageConfig

_ALIASES = {
    "storage": ("storage",),
    "bucket": ("bucket",),
    "access-key": ("access-key", "accesskey"),
    "secret-key": ("secret-key", "secretkey"),
}


def environment(secret: SecretObject) -> dict[str, str]:
    """Read the variables that the driver gives to the volume's clients: the key `envs`, JSON or YAML.

    Raises:
        PermanentError: The driver cannot read it either.
    """
    import yaml

    try:
        found = yaml.safe_load(secret.data.get("envs", "")) or {}
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise PermanentError(
            f"Secret {secret.namespace}/{secret.name}: its `envs` is neither a JSON object nor a YAML mapping.",
            next_step='correct it: {"NAME": "value"}',
        )
    return {str(name): str(value) for name, value in found.items()}


def addressing(secret: SecretObject) -> dict[str, str]:
    """Return the variables of a volume's clients that say how a store is addressed: no secret is among them."""
    return {name: value for name, value in environment(secret).items() if name in ENVIRONMENT}


def metaurl_of(secret: SecretObject) -> Metaurl:
    """Read the metadata URL of a volume's Secret, with the password that its clients use.

    Raises:
        PermanentError: The Secret has no metaurl, or one that cannot be used.
    """
    if not secret.data.get("metaurl"):
        raise PermanentError(
            f"Secret {secret.namespace}/{secret.name} has no key `metaurl`.",
            next_step="correct `namespace` and `secret_name`",
        )
    return Metaurl.parse(secret.data["metaurl"], environment(secret))


def metaurl_secrets(secret: SecretObject) -> tuple[str, ...]:
    """List every form in which the password of a Secret's metaurl may be printed, for masks."""
    try:
        variables = environment(secret)
    except PermanentError:
        variables = {}
    return forms_of(secret.data.get("metaurl", ""), variables)


def metadata_id(secret: SecretObject, namespace: str) -> MetadataId | None:
    """Return what tells a Secret's metadata apart from others'; None where its metaurl cannot be used.

    Args:
        secret: Any Secret.
        namespace: The driver's, where the clients run.
    """
    try:
        return Metaurl.parse(secret.data.get("metaurl", "")).identity(namespace)
    except PermanentError:
        return None


def holds_volume(secret: SecretObject, main: SecretObject) -> bool:
    """Return whether a Secret belongs to the same volume as another: the same tables, and no other volume's name.

    Args:
        secret: The Secret in question.
        main: A Secret of the volume, in the driver's namespace.
    """
    if secret.data.get("name") not in {None, main.data.get("name")} or not secret.data.get("metaurl"):
        return False
    if secret.data["metaurl"] == main.data.get("metaurl"):
        return True
    found = metadata_id(secret, main.namespace)
    return found is not None and found == metadata_id(main, main.namespace)


def desired_values(secret: SecretObject, config: StorageConfig) -> dict[str, str]:
    """Return the values that a Secret should hold for a storage: key -> value.

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
    """Return those values of a Secret that a switch may change."""
    return {key: values[key] for aliases in _ALIASES.values() for key in aliases if key in values}


def written_by_format(values: Mapping[str, str]) -> StorageConfig | None:
    """Return what a starting mount pod writes into the setting by these values; None where it writes nothing."""
    found = {
        canonical: next((values[alias] for alias in aliases if values.get(alias)), "")
        for canonical, aliases in _ALIASES.items()
    }
    if not found["storage"] or not found["bucket"]:
        return None
    return StorageConfig(
        found["storage"].lower(), found["bucket"], SecretStr(found["access-key"]), SecretStr(found["secret-key"])
    )


def volume_secrets(cluster: Cluster, secret_name: str, volume: str) -> list[SecretObject]:
    """Read the volume's Secret and every other Secret of its namespace with its metadata, the driver's copies included.

    Args:
        cluster: Where they are.
        secret_name: The volume's Secret.
        volume: The volume's name.

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

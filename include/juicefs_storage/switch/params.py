"""The params of the DAGs as frozen models: validated once, in the first task of a run."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.params import BUCKET_NAME, refused
from include.juicefs_storage.volume.setting import ENDPOINT

Consistency = Literal["off", "sample", "listing", "metadata", "content"]


Runner = Literal["controller", "worker"]


OnFailure = Literal["rollback", "hold"]


class SwitchParams(BaseModel):
    """The params of `juicefs_storage_switch`. Field names are the public interface; docs/switch.md lists them."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    volume: str | None = None
    kubernetes_conn_id: str = "kubernetes_default"
    namespace: str = "juicefs"
    secret_name: str = "juicefs-sc-secret"  # noqa: S105  the name of a Kubernetes Secret
    meta_conn_id: str | None = None
    target_conn_id: str = Field(min_length=1, examples=["minio_new"])
    target_bucket: str = Field(examples=["juicefs-data"])
    target_endpoint: str | None = Field(default=None, examples=["https://minio.new.example:9000"])
    source_conn_id: str | None = None
    juicefs_runner: Runner = "controller"
    dry_run: bool = True
    require_approval: bool = True
    consistency: Consistency = "listing"
    catch_up: bool = True
    restart_csi: bool = True
    on_failure: OnFailure = "rollback"
    client_timeout_s: Annotated[int, Field(ge=5, le=3600)] = 60
    rollout_timeout_s: Annotated[int, Field(ge=10, le=7200)] = 300
    settle_s: Annotated[int, Field(ge=0, le=3600)] = 40
    late_commit_s: Annotated[int, Field(ge=0, le=1800)] = 360
    fence_conn_id: str | None = None

    @field_validator("target_bucket")
    @classmethod
    def _bucket_name(cls, value: str) -> str:
        if not BUCKET_NAME.match(value):
            raise ValueError("expected the bucket's name alone: 3 to 63 of a-z 0-9 . -, without endpoint or path")
        return value

    @field_validator("target_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None and not ENDPOINT.match(value):
            raise ValueError("expected http(s)://host[:port] without bucket, path or keys")
        return value.rstrip("/") if value else value


#: What an entry of the registry may fill in: where a volume lives and where it may move. Never the safety params.
REGISTRY_FIELDS = frozenset(
    {
        "kubernetes_conn_id", "namespace", "secret_name", "meta_conn_id", "juicefs_runner",
        "target_conn_id", "target_bucket", "target_endpoint", "source_conn_id",
    }
)  # fmt: skip


def resolve_params(given: dict[str, Any], registry: dict[str, dict[str, Any]]) -> SwitchParams:
    """Validate the params of a run, filled in from the registry.

    Args:
        given: The params as Airflow hands them over.
        registry: `include/volumes.yaml`: volume name -> params that fill in what the run leaves null.

    Raises:
        PermanentError: A param is unknown or has a value that is not allowed; all of them are named.
    """
    name = given.get("volume")
    entry: dict[str, Any] = {}
    if name is not None:
        if name not in registry:
            known = ", ".join(sorted(registry)) or "none"
            raise PermanentError(
                f"Param `volume`: {name!r} is not in include/volumes.yaml; registered: {known}.",
                next_step="register the volume, or leave `volume` empty and fill in the other params",
            )
        entry = registry[name]
        if unknown := sorted(entry.keys() - REGISTRY_FIELDS):
            raise PermanentError(
                f"include/volumes.yaml, volume {name!r}: {', '.join(unknown)} cannot be set there; "
                f"allowed: {', '.join(sorted(REGISTRY_FIELDS))}.",
                next_step="correct the entry and trigger the DAG again",
            )
    defaults = {field: info.default for field, info in SwitchParams.model_fields.items()}
    # The registry speaks where the run says nothing of its own: null, or what the form shows by default.
    chosen = {key: value for key, value in given.items() if value is not None and value != defaults.get(key)}
    try:
        return SwitchParams.model_validate({**entry, **chosen})
    except ValidationError as error:
        raise refused(error, SwitchParams) from None


class RevertForm(BaseModel):
    """The params of `juicefs_storage_revert`. What is null is taken from the run that made the backup."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    backup_id: str | None = None
    kubernetes_conn_id: str | None = None
    namespace: str | None = None
    secret_name: str | None = None
    meta_conn_id: str | None = None
    source_conn_id: str | None = None
    target_conn_id: str | None = None
    dry_run: bool = True
    require_approval: bool = True
    consistency: Consistency = "listing"
    catch_up: bool = True
    restart_csi: bool = True
    on_failure: OnFailure = "rollback"
    juicefs_runner: Runner | None = None
    client_timeout_s: int | None = None
    rollout_timeout_s: int | None = None
    settle_s: int | None = None
    late_commit_s: int | None = None
    fence_conn_id: str | None = None


class RevertParams(SwitchParams):
    """The params of a run that goes back to a backup, resolved: the new store is the one in the backup.

    Attributes:
        backup_id: The backup.
        target_conn_id: How Airflow reaches the store in the backup; empty: with its endpoint and keys.
    """

    backup_id: str = Field(min_length=1)
    target_conn_id: str = ""


def check_revert_form(given: dict[str, Any]) -> RevertForm:
    """Validate the params of a revert as they were given.

    Raises:
        PermanentError: A param is unknown or has a value that is not allowed; all of them are named.
    """
    try:
        return RevertForm.model_validate(given)
    except ValidationError as error:
        raise refused(error, RevertForm) from None


#: What a revert takes from the run that made the backup, where it is not given.
_FROM_BACKUP = (
    "kubernetes_conn_id", "namespace", "secret_name", "meta_conn_id", "juicefs_runner",
    "client_timeout_s", "rollout_timeout_s", "settle_s", "late_commit_s",
)  # fmt: skip


def resolve_revert_params(
    form: RevertForm, backup_id: str, recorded: dict[str, Any], recorded_bucket: str, *, still_there: bool
) -> RevertParams:
    """Fill in from the run that made the backup what the form leaves open.

    Args:
        form: As given.
        backup_id: The backup, given or chosen.
        recorded: The params of the run that made it.
        recorded_bucket: The bucket's name in the setting that was backed up.
        still_there: Whether the volume is where that run moved it: how Airflow reached that store holds then.

    Raises:
        PermanentError: A param has a value that is not allowed.
    """
    values = {field: recorded[field] for field in _FROM_BACKUP if recorded.get(field) is not None}
    # The stores change places: that run's old store is where this one goes.
    values["target_conn_id"] = recorded.get("source_conn_id") or ""
    values["source_conn_id"] = (recorded.get("target_conn_id") or None) if still_there else None
    given = {field: value for field, value in form.model_dump().items() if value is not None}
    try:
        return RevertParams.model_validate(
            {**values, **given, "backup_id": backup_id, "target_bucket": recorded_bucket}
        )
    except ValidationError as error:
        raise refused(error, RevertForm) from None

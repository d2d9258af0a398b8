"""The params of `juicefs_storage_sync`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.model import Compare, KeyRange
from include.juicefs_storage.params import BUCKET_NAME, refused
from include.juicefs_storage.volume.setting import normal_endpoint

Mode = Literal["copy", "verify", "copy+verify"]
PlanBy = Literal["listing", "metadata"]
EngineName = Literal["native", "juicefs", "mc"]


class SyncParams(BaseModel):
    """The params of `juicefs_storage_sync`. Field names are the public interface; docs/sync.md lists them."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    source_conn_id: str = Field(min_length=1, examples=["minio_old"])
    source_bucket: str = Field(examples=["juicefs-data"])
    source_prefix: str = ""
    target_conn_id: str = Field(min_length=1, examples=["minio_new"])
    target_bucket: str = Field(examples=["juicefs-data"])
    target_prefix: str = ""
    plan: PlanBy = "listing"
    volume: str | None = Field(default=None, examples=["myjfs"])
    meta_conn_id: str | None = Field(default=None, examples=["juicefs_meta"])
    since_id: Annotated[int, Field(ge=0)] = 0
    mode: Mode = "copy+verify"
    compare: Compare = "etag"
    dry_run: bool = True
    overwrite: bool = False
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    after: str | None = Field(default=None, examples=["chunks/0/99/"])
    until: str | None = Field(default=None, examples=["chunks/0/~"])
    engine: EngineName = "native"
    partitions: Annotated[int, Field(ge=1, le=100_000)] | None = None
    recut_from: str | None = Field(default=None, examples=["manual__2026-11-23T08:00:00+00:00"])
    concurrency: Annotated[int, Field(ge=1, le=512)] = 32
    bandwidth_mib_s: Annotated[float, Field(gt=0)] | None = None

    @field_validator("source_bucket", "target_bucket")
    @classmethod
    def _bucket_name(cls, value: str) -> str:
        if not BUCKET_NAME.match(value):
            raise ValueError("expected the bucket's name alone: 3 to 63 of a-z 0-9 . -, without endpoint or path")
        return value

    @field_validator("source_prefix", "target_prefix")
    @classmethod
    def _folder(cls, value: str) -> str:
        if value.startswith("/"):
            raise ValueError("expected no `/` at the start: keys do not begin with one")
        # `data` would hold `database/…` as well.
        return value if not value or value.endswith("/") else f"{value}/"

    @field_validator("include", "exclude")
    @classmethod
    def _globs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("expected patterns such as chunks/*, one a line, none of them empty")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SyncParams:
        if self.after is not None and self.until is not None and self.after >= self.until:
            raise ValueError("`after` and `until`: expected keys in this order, for nothing is after one and up to "
                             "the other")  # fmt: skip
        ranged = self.include or self.after is not None or self.until is not None
        if self.engine == "mc" and (ranged or self.recut_from or (self.partitions or 1) > 1):
            raise ValueError("`engine`: mc mirrors everything below a prefix, so `include`, `after`, `until`, "
                             "`recut_from` and more than one of `partitions` do not go with it")  # fmt: skip
        if self.plan == "listing" and (self.volume or self.meta_conn_id or self.since_id):
            raise ValueError("`plan`: `volume`, `meta_conn_id` and `since_id` go with plan=metadata alone")
        if self.plan == "metadata" and not (self.volume or self.meta_conn_id):
            raise ValueError("`plan`: metadata needs `meta_conn_id`, or a `volume` of the registry")
        if self.plan == "metadata" and (self.engine != "native" or self.recut_from):
            raise ValueError("`plan`: metadata does not go with `recut_from`, nor with another engine than native, "
                             "which would copy what no file refers to")  # fmt: skip
        if self.source_conn_id == self.target_conn_id:
            refuse_overlap(self.source_place("one endpoint"), self.target_place("one endpoint"))
        return self

    @property
    def keys(self) -> KeyRange:
        """The keys that are copied, of those below the prefixes."""
        return KeyRange(self.after, self.until)

    def source_place(self, endpoint: str) -> tuple[str, str, str]:
        """Endpoint, bucket, prefix."""
        return endpoint, self.source_bucket, self.source_prefix

    def target_place(self, endpoint: str) -> tuple[str, str, str]:
        """Endpoint, bucket, prefix."""
        return endpoint, self.target_bucket, self.target_prefix


def refuse_overlap(source: tuple[str, str, str], target: tuple[str, str, str]) -> None:
    """Refuse a copy into itself.

    Args:
        source: Endpoint, bucket, prefix.
        target: The same.

    Raises:
        ValueError: The two are the same place, or one is inside the other.
    """
    nested = source[2].startswith(target[2]) or target[2].startswith(source[2])
    if source[:2] == target[:2] and nested:
        raise ValueError(
            f"expected two places, found bucket {source[1]!r} of {source[0]} on both sides, with prefixes "
            f"{source[2]!r} and {target[2]!r}: one is the other, or inside of it"
        )


def resolve_sync_params(given: dict[str, Any]) -> SyncParams:
    """Validate the params of a run.

    Raises:
        PermanentError: A param is unknown or has a value that is not allowed; all of them are named.
    """
    chosen = {key: value for key, value in given.items() if value is not None}
    try:
        return SyncParams.model_validate(chosen)
    except ValidationError as error:
        raise refused(error, SyncParams) from None


def check_places(params: SyncParams, source_endpoint: str, target_endpoint: str) -> None:
    """Refuse two connections that lead to the same objects.

    Raises:
        PermanentError: Source and target are one place, or one is inside the other.
    """
    try:
        refuse_overlap(
            params.source_place(normal_endpoint(source_endpoint)), params.target_place(normal_endpoint(target_endpoint))
        )
    except ValueError as error:
        raise PermanentError(f"Params refused: {error}.", next_step="correct the target") from None

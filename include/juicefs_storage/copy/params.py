"""The params of `juicefs_storage_sync`."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator, model_validator

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.model import Compare, KeyRange
from include.juicefs_storage.objects.one_store import may_be_one, new_probe_key, shows_up
from include.juicefs_storage.params import BUCKET_NAME, Params, param
from include.juicefs_storage.volume.setting import normal_endpoint

Mode = Literal["copy", "verify", "copy+verify"]
PlanBy = Literal["listing", "metadata"]
EngineName = Literal["native", "juicefs", "mc"]


class SyncParams(Params):
    """The params of `juicefs_storage_sync`."""

    source_conn_id: str = param(
        "Source",
        "Source's connection",
        "Type `aws`: login = access key, password = secret key, extra `endpoint_url`. Only read.",
        min_length=1,
        examples=["minio_old"],
    )
    source_bucket: str = param(
        "Source", "Source bucket", "The bucket's name alone.", min_length=3, examples=["juicefs-data"]
    )
    source_prefix: str = param(
        "Source", "Source prefix", "Copy what is below it; for a volume `<name>/`. A `/` is added at its end.", ""
    )
    target_conn_id: str = param(
        "Target", "Target's connection", "As for the source.", min_length=1, examples=["minio_new"]
    )
    target_bucket: str = param("Target", "Target bucket", "It must exist.", min_length=3, examples=["juicefs-data"])
    target_prefix: str = param(
        "Target", "Target prefix", "Where the keys go: it takes the place of the source's prefix.", ""
    )
    storage_class: str | None = param(
        "Target",
        "Storage class",
        "Of new objects, such as STANDARD_IA. Empty: what the bucket gives them.",
        None,
        pattern="^[A-Z0-9_]{1,64}$",
        examples=["STANDARD_IA"],
    )
    plan: PlanBy = param(
        "What",
        "Plan by",
        "`listing`: a listing of the source. `metadata`: a JuiceFS volume's metadata, "
        "[the blocks that its files refer to](#by-the-metadata-of-a-volume), each proven to be there.",
        "listing",
    )
    volume: str | None = param(
        "What", "Volume", "With `plan=metadata`: its name in `include/volumes.yaml`.", None, examples=["myjfs"]
    )
    meta_conn_id: str | None = param(
        "What",
        "Metadata's connection",
        "With `plan=metadata`: type `mysql`. Empty: what the registry says of the volume, else its Secret's `metaurl`.",
        None,
        examples=["juicefs_meta"],
    )
    since_id: int = param(
        "What",
        "From slice id",
        "With `plan=metadata`: only blocks of slices from this id on. Every report names the next.",
        0,
        ge=0,
        le=9_000_000_000_000_000,
    )
    mode: Mode = param(
        "What", "What to do", "Copy, compare the two sides, or both, one after the other.", "copy+verify"
    )
    compare: Compare = param(
        "What",
        "Compare by",
        "Size; size and ETag, from the listings; or contents, both sides read in full. "
        "[How objects are compared](#how-objects-are-compared).",
        "etag",
    )
    include: tuple[str, ...] = param(
        "What",
        "Include",
        "Patterns of keys below the prefix, such as `chunks/*`, one a line; `*` matches `/` too. Empty: every key.",
        (),
    )
    exclude: tuple[str, ...] = param("What", "Exclude", "Patterns of keys that are left out, one a line.", ())
    after: str | None = param(
        "What",
        "After key",
        "Only keys behind this one, in the order of UTF-8 bytes.",
        None,
        examples=["chunks/0/99/"],
    )
    until: str | None = param(
        "What", "Until key", "Only keys up to this one, itself included.", None, examples=["chunks/0/~"]
    )
    dry_run: bool = param("Safety", "Dry run", "Stop after the plan. Nothing is changed.", True)
    overwrite: bool = param(
        "Safety", "Overwrite", "Replace objects of the target that differ from the source's.", False
    )
    accept_deleted: bool = param(
        "Safety",
        "Accept deletions",
        "End green where objects left the source between its listing and the copy. Off: such a run is red, and "
        "[a new one](#when-objects-are-deleted-meanwhile) tells whether that is all.",
        False,
    )
    engine: EngineName = param(
        "Advanced",
        "Engine",
        "[What moves the objects](#engines): this project's own engine, `juicefs sync`, or `mc mirror`.",
        "native",
    )
    partitions: int | None = param(
        "Advanced",
        "Partitions",
        "Empty: of about 250,000 objects or 256 GiB each, whichever comes first.",
        None,
        ge=1,
        le=100_000,
    )
    recut_from: str | None = param(
        "Advanced",
        "Cut as in run",
        "The id of an earlier run: its manifests tell where to cut, and the source is not listed for that.",
        None,
        examples=["manual__2026-11-23T08:00:00+00:00"],
    )
    planners: int | None = param(
        "Advanced",
        "Planners",
        "Tasks that list the source for the plan. Empty: none up to four million objects, else two for each task that "
        "may work at once.",
        None,
        ge=1,
        le=256,
    )
    concurrency: int | None = param(
        "Advanced",
        "Concurrency",
        "The most objects at once in each task. Empty: [it finds itself](#how-many-objects-at-once). "
        "[A Variable](#slow-it-down-pause-it-watch-it) changes it while the copy runs.",
        None,
        ge=1,
        le=512,
    )
    bandwidth_mib_s: int | None = param(
        "Advanced",
        "Bandwidth (MiB/s)",
        "Of all tasks of the run together, read and written each. Empty or 0: no limit. "
        "[A Variable](#slow-it-down-pause-it-watch-it) changes it while the copy runs.",
        None,
        ge=0,
        le=1_000_000,
    )

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
        if self.accept_deleted and "copy" not in self.mode:
            raise ValueError("`accept_deleted`: mode=verify copies nothing, so that no deletion is in its way")
        if self.planners and (self.plan == "metadata" or self.recut_from):
            raise ValueError("`planners`: neither plan=metadata nor `recut_from` lists the source for the plan")
        if self.source_conn_id == self.target_conn_id:
            refuse_overlap(self.source_place("one endpoint"), self.target_place("one endpoint"))
        return self

    @property
    def keys(self) -> KeyRange:
        """The keys that are copied, of those below the prefixes."""
        return KeyRange(self.after, self.until)

    def source_place(self, endpoint: str) -> tuple[str, str, str]:
        """Return endpoint, bucket, prefix."""
        return endpoint, self.source_bucket, self.source_prefix

    def target_place(self, endpoint: str) -> tuple[str, str, str]:
        """Return endpoint, bucket, prefix."""
        return endpoint, self.target_bucket, self.target_prefix


def overlap(one: str, other: str) -> bool:
    """Return whether two prefixes of one bucket hold a key in common."""
    return one.startswith(other) or other.startswith(one)


def refuse_overlap(source: tuple[str, str, str], target: tuple[str, str, str]) -> None:
    """Refuse a copy into itself.

    Args:
        source: Endpoint, bucket, prefix.
        target: The same.

    Raises:
        ValueError: The two are the same place, or one is inside the other.
    """
    if source[:2] == target[:2] and overlap(source[2], target[2]):
        raise ValueError(
            f"expected two places, found bucket {source[1]!r} of {source[0]} on both sides, with prefixes "
            f"{source[2]!r} and {target[2]!r}: one is the other, or inside of it"
        )


def check_places(params: SyncParams, source_endpoint: str, target_endpoint: str) -> None:
    """Refuse two connections that lead to the same objects.

    Args:
        params: The run's params.
        source_endpoint: Where the source's connection leads.
        target_endpoint: Where the target's connection leads.

    Raises:
        PermanentError: Source and target are one place, or one is inside the other.
    """
    try:
        refuse_overlap(
            params.source_place(normal_endpoint(source_endpoint)), params.target_place(normal_endpoint(target_endpoint))
        )
    except ValueError as error:
        raise PermanentError(f"Params refused: {error}.", next_step="correct the target") from None


def refuse_one_store(params: SyncParams, source: Bucket, target: Bucket) -> None:
    """Refuse a copy into itself, whatever the store is called: by an object that shows up at the source.

    The object is written to the target only where reading cannot tell the two apart, and is deleted again.

    Args:
        params: The run's params.
        source: The source's bucket, without a prefix.
        target: The target's bucket, without a prefix.

    Raises:
        PermanentError: Source and target are one place, or one is inside the other.
    """
    prefixes = params.source_prefix, params.target_prefix
    if not overlap(*prefixes) or not may_be_one(source, target, params.source_prefix):
        return
    if shows_up(new_probe_key(max(prefixes, key=len)), target, source):
        raise PermanentError(
            f"Expected two places, found one by two names: what is written to {target.name} shows up in {source.name}, "
            f"and prefixes {prefixes[0]!r} and {prefixes[1]!r} overlap.",
            state="nothing was copied; the object that was written is deleted again",
            next_step="correct the target, or give prefixes that do not overlap",
        )

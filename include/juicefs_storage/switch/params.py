"""The params of the DAGs that move a volume: validated once, in the first task of a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.params import BUCKET_NAME, Params, describe, describe_field, param, refused, without_empty
from include.juicefs_storage.volume.setting import ENDPOINT
from include.juicefs_storage.volume.storage_kinds import why_not

Consistency = Literal["off", "sample", "listing", "metadata", "content", "target", "target_content"]
Runner = Literal["controller", "worker"]
TargetStorage = Literal["minio", "s3"]
OnFailure = Literal["rollback", "hold"]


class MoveParams(Params):
    """What every run that moves a volume can be given: a switch, a revert, a fleet."""

    dry_run: bool = param("Safety", "Dry run", "Stop after the plan. Nothing is changed.", True)
    require_approval: bool = param(
        "Safety", "Require approval", "Wait for a human who has read the plan, for 24 hours at most.", True
    )
    consistency: Consistency = param(
        "Safety",
        "Compare the stores",
        "How the new store is compared with the old one before the switch. `off`: not at all, with a warning; "
        "`sample`: 200 blocks by content; `listing`: every block by key and size; `metadata`: every block that files "
        "refer to, by key and size, and names those that are lost already; `content`: every block by content; "
        "`target`: those that files refer to, by key and size, on the new store alone, which is done by itself where "
        "the old store does not serve; `target_content`: the same, and each is read and compared with the checksum "
        "that JuiceFS left with it. "
        "[What each costs](refusals.md#the-blocks-check_consistency).",
        "listing",
    )
    accept_lost_blocks: int = param(
        "Safety",
        "Accept lost blocks",
        "How many blocks that files refer to may be [lost on the old store](refusals.md#lost-blocks) already, for each "
        "volume. More are refused.",
        0,
        ge=0,
        le=10_000,
    )
    catch_up: bool = param(
        "Safety", "Catch up", "Copy what clients write to the old store until they have moved.", True
    )
    restart_csi: bool = param("Safety", "Restart CSI", "Restart the CSI controller and node components.", True)
    require_closed_door: bool = param(
        "Safety",
        "Require a closed door",
        "Refuse the run where a restart of a pod that was made with the old values could bring them back, or the old "
        "store still takes the old key. Off: with a warning. See [finish](finish.md#why-a-green-run-is-not-the-end).",
        False,
    )


class SwitchParams(MoveParams):
    """The params of `juicefs_storage_switch`."""

    volume: str | None = param(
        "Volume",
        "Registered volume",
        "A name in `include/volumes.yaml`. Its entry fills in what is left at its default; it cannot set the safety "
        "params.",
        None,
    )
    kubernetes_conn_id: str = param(
        "Volume", "Kubernetes connection", "The cluster of the CSI driver.", "kubernetes_default"
    )
    more_kubernetes_conn_ids: tuple[str, ...] = param(
        "Volume",
        "More Kubernetes connections",
        "Other clusters that [have the volume mounted](changes.md#clients-in-other-clusters), one a line. The CSI "
        "driver and the Secret have the same namespace and name there.",
        (),
        examples=[["kubernetes_east"]],
    )
    namespace: str = param("Volume", "Namespace", "Where the CSI driver and its Secret are.", "juicefs")
    secret_name: str = param(
        "Volume", "Secret", "The Secret that the CSI driver uses for the volume.", "juicefs-sc-secret"
    )
    meta_conn_id: str | None = param(
        "Volume", "Metadata connection", "Type MySQL. Empty: from the Secret's `metaurl`.", None
    )
    target_conn_id: str = param(
        "New storage",
        "New store's connection",
        "Type `aws`: login = access key, password = secret key, extra `endpoint_url`. "
        "**Another store**, to which the data was copied: its address and keys. "
        "**Other keys** for the same bucket: the new keys, the same address. "
        "**Another address** of one store, or **a store that moved as a whole**: the new address. "
        "The run finds out [which change it is](changes.md), and the plan begins with it.",
        min_length=1,
        examples=["minio_new"],
    )
    target_bucket: str = param(
        "New storage", "New bucket", "The bucket's name alone.", min_length=3, examples=["juicefs-data"]
    )
    target_endpoint: str | None = param(
        "New storage",
        "Endpoint for the clients",
        "`http(s)://host[:port]` as the JuiceFS clients reach it, where that differs from the connection's.",
        None,
        examples=["https://minio.new.example:9000"],
    )
    create_bucket: bool = param(
        "New storage",
        "Create the bucket",
        "Make the new bucket right after the approval, where there is none. Its versioning, object lock and policies "
        "are [left to you](switch.md#create-the-bucket).",
        False,
    )
    target_storage: TargetStorage | None = param(
        "New storage",
        "Kind of the new storage",
        "What the clients are given as JuiceFS' `--storage`. Empty: the kind that the volume has. See "
        "[the kind of storage](switch.md#the-kind-of-storage).",
        None,
    )
    source_conn_id: str | None = param(
        "New storage", "Old store's connection", "Empty: the endpoint and keys in the setting.", None
    )
    accept_clients: tuple[str, ...] = param(
        "Safety",
        "Accept clients",
        "Clients that are no mount pods (`juicefs gateway`, WebDAV, Java SDK, hosts, sidecars), one a line: "
        "`host:mountpoint`, where `*` stands for anything, or a session id, as the refusal prints them. They are "
        "[not proven](changes.md#clients-of-other-kinds).",
        (),
        examples=[["vm-7:/mnt/data"]],
    )
    on_failure: OnFailure = param(
        "Safety",
        "On failure",
        "`rollback`, or `hold`: leave things as they are for a human. See [rollback](rollback.md).",
        "rollback",
    )
    juicefs_runner: Runner = param(
        "Advanced",
        "Where juicefs runs",
        "`controller`: in the CSI controller pod. `worker`: on the Airflow worker, which then needs `juicefs`, FUSE, "
        "the right to mount, and a way to the metadata and both stores.",
        "controller",
    )
    client_timeout_s: int = param(
        "Advanced",
        "Client timeout (s)",
        "How long the clients may take to follow. A longer heartbeat is refused.",
        60,
        ge=5,
        le=3600,
    )
    rollout_timeout_s: int = param(
        "Advanced", "Rollout timeout (s)", "How long the CSI restarts may take.", 300, ge=10, le=7200
    )
    settle_s: int = param(
        "Advanced",
        "Settle (s)",
        "How long the setting is guarded against pods that start with old values; at least three heartbeats "
        "(12 s each by default).",
        40,
        ge=0,
        le=3600,
    )
    late_commit_s: int = param(
        "Advanced",
        "Late commits (s)",
        "How long after the last client moved a slice may still be "
        "[committed](fine-print.md#blocks-that-are-committed-late). Then the blocks are copied and proven once more. "
        "`0`: not at all. Below 300: with a warning.",
        360,
        ge=0,
        le=1800,
    )
    wait_for_quiet_s: int = param(
        "Advanced",
        "Wait for quiet (s)",
        "How long to wait right before the cut-over until no client uploads. When the time is over the run goes ahead: "
        "no block is lost either way, fewer are left to copy where it is quiet. `0`: do not wait.",
        0,
        ge=0,
        le=3600,
    )
    fence_conn_id: str | None = param(
        "Advanced",
        "Write fence's connection",
        "Type `aws`, for MinIO alone: an administrator of the store that the volume leaves. From right before the "
        "setting is written its clients' key [may not write there](fine-print.md#a-write-fence-on-the-old-store). "
        "Empty: no fence.",
        None,
    )

    @model_validator(mode="after")
    def _each_cluster_once(self) -> SwitchParams:
        require_each_once([self.kubernetes_conn_id, *self.more_kubernetes_conn_ids])
        return self

    @field_validator("more_kubernetes_conn_ids")
    @classmethod
    def _without_blanks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(filter(None, value))

    @field_validator("accept_clients")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            host, colon, mount_point = pattern.partition(":")
            if not pattern.isdecimal() and not (colon and host.strip("*?") and mount_point.strip("*?")):
                raise ValueError(
                    f"expected `host:mountpoint`, each with more than `*`, or a session id; {pattern!r} is neither"
                )
        return value

    @field_validator("target_bucket")
    @classmethod
    def _bucket_name(cls, value: str) -> str:
        if not BUCKET_NAME.match(value):
            raise ValueError("expected the bucket's name alone: 3 to 63 of a-z 0-9 . -, without endpoint or path")
        return value

    @field_validator("target_storage", mode="before")
    @classmethod
    def _known_storage(cls, value: Any) -> Any:
        kind = str(value).lower() if value is not None else value
        if kind is not None and (reason := why_not(kind)):
            raise ValueError(f"{reason}; expected `s3` with the S3 endpoint of the store, where it has one, or `minio`")
        return kind

    @field_validator("target_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None and not ENDPOINT.match(value):
            raise ValueError("expected http(s)://host[:port] without bucket, path or keys")
        return value.rstrip("/") if value else value


def require_each_once(conn_ids: Sequence[str]) -> None:
    """Require that the clusters of a volume are all different, as far as their connections tell.

    Raises:
        ValueError: A connection is given twice.
    """
    if twice := sorted(name for name, count in Counter(conn_ids).items() if count > 1):
        raise ValueError(
            "`kubernetes_conn_id`, `more_kubernetes_conn_ids`: expected each connection once, found "
            f"{', '.join(twice)} more often"
        )


#: What an entry of the registry may fill in: where a volume lives and where it may move. Never the safety params.
REGISTRY_FIELDS = frozenset(
    {
        "kubernetes_conn_id", "more_kubernetes_conn_ids", "namespace", "secret_name", "meta_conn_id", "juicefs_runner",
        "target_conn_id", "target_bucket", "target_endpoint", "target_storage",
        "source_conn_id",
    }
)  # fmt: skip


def resolve_switch_params(given: dict[str, Any], registry: dict[str, dict[str, Any]]) -> SwitchParams:
    """Validate the params of a run, filled in from the registry.

    Args:
        given: The params as Airflow hands them over.
        registry: `include/volumes.yaml`: volume name -> params that fill in what the run leaves null.

    Raises:
        PermanentError: A param is unknown or has a value that is not allowed; all of them are named.
    """
    given = without_empty(given)
    name = given.get("volume")
    entry: dict[str, Any] = {}
    if name is not None:
        if name not in registry:
            known = ", ".join(sorted(registry)) or "none"
            raise PermanentError(
                f"Param `volume`: {name!r} is not in include/volumes.yaml; registered: {known}.",
                next_step="register the volume, or leave `volume` empty and fill in the other params",
            )
        entry = without_empty(registry[name])
        if unknown := sorted(entry.keys() - REGISTRY_FIELDS):
            raise PermanentError(
                f"include/volumes.yaml, volume {name!r}: {', '.join(unknown)} cannot be set there; "
                f"allowed: {', '.join(sorted(REGISTRY_FIELDS))}.",
                next_step="correct the entry and trigger the DAG again",
            )
    defaults = {name: field["default"] for name, field in describe(SwitchParams).items() if "default" in field}
    # The registry fills in what the run left empty, or at the default that the form shows.
    chosen = {
        key: value
        for key, value in given.items()
        if (list(value) if isinstance(value, tuple) else value) != defaults.get(key)
    }
    return SwitchParams.validated({**entry, **chosen})


def as_recorded(name: str) -> Any:
    """Describe a param of a switch that a revert takes from the run that made the backup, where it is not given."""
    field = SwitchParams.model_fields[name]
    limits = describe_field(field)
    return Field(
        None,
        title=field.title,
        description=f"{str(field.description).partition(' Empty:')[0]} Empty: as the run that made the backup.",
        json_schema_extra={"section": "Advanced", "as_recorded": True},
        ge=limits.get("minimum"),
        le=limits.get("maximum"),
    )


_ACCEPT_CLIENTS: Any = SwitchParams.model_fields["accept_clients"]


class RevertForm(MoveParams):
    """The params of `juicefs_storage_revert`. What is null is taken from the run that made the backup."""

    backup_id: str | None = param(
        "Backup", "Backup", "Empty: choose among those that are there, in the task `choose_backup`.", None
    )
    accept_clients: tuple[str, ...] = _ACCEPT_CLIENTS
    on_failure: OnFailure = param(
        "Safety", "On failure", "Roll back to the current store, or hold for a human.", "rollback"
    )
    kubernetes_conn_id: str | None = as_recorded("kubernetes_conn_id")
    more_kubernetes_conn_ids: tuple[str, ...] | None = as_recorded("more_kubernetes_conn_ids")
    namespace: str | None = as_recorded("namespace")
    secret_name: str | None = as_recorded("secret_name")
    meta_conn_id: str | None = as_recorded("meta_conn_id")
    source_conn_id: str | None = param(
        "Advanced",
        "Current store's connection",
        "Type `aws`. Empty: as that run reached its new store, where the volume still is there; else the endpoint and "
        "keys in the setting.",
        None,
    )
    target_conn_id: str | None = param(
        "Advanced",
        "Backup's store's connection",
        "Type `aws`: how Airflow reaches it. The clients get the keys of the backup. Empty: as that run reached its "
        "old store.",
        None,
    )
    juicefs_runner: Runner | None = as_recorded("juicefs_runner")
    client_timeout_s: int | None = as_recorded("client_timeout_s")
    rollout_timeout_s: int | None = as_recorded("rollout_timeout_s")
    settle_s: int | None = as_recorded("settle_s")
    late_commit_s: int | None = as_recorded("late_commit_s")
    wait_for_quiet_s: int | None = as_recorded("wait_for_quiet_s")
    fence_conn_id: str | None = param(
        "Advanced",
        "Write fence's connection",
        "Type `aws`, for MinIO alone: an administrator of the **current** store. From right before the setting is "
        "written its clients' key [may not write there](fine-print.md#a-write-fence-on-the-old-store). Empty: no "
        "fence, whatever that run had.",
        None,
    )


class RehearsalParams(Params):
    """The params of `juicefs_storage_rehearsal`."""

    volume: str | None = param(
        "Volume", "Registered volume", "A name in `include/volumes.yaml`. Empty: all of them.", None
    )


class RevertParams(SwitchParams):
    """The params of a run that goes back to a backup, resolved: the new store is the one in the backup.

    Attributes:
        backup_id: The backup.
        target_conn_id: How Airflow reaches the store in the backup; empty: with its endpoint and keys.
    """

    backup_id: str = Field(min_length=1)
    target_conn_id: str = ""


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
    taken = {name for name, schema in describe(RevertForm).items() if "as_recorded" in schema}
    values = {name: value for name, value in without_empty(recorded).items() if name in taken}
    # The stores change places: that run's old store is where this one goes.
    values["target_conn_id"] = recorded.get("source_conn_id")
    values["source_conn_id"] = recorded.get("target_conn_id") if still_there else None
    given = without_empty(form.model_dump())
    try:
        return RevertParams.model_validate(
            {**values, **given, "backup_id": backup_id, "target_bucket": recorded_bucket}
        )
    except ValidationError as error:
        raise refused(error, RevertForm) from None

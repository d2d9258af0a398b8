"""The params of `juicefs_storage_finish`."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator, model_validator

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.params import Params, param, without_empty
from include.juicefs_storage.switch.params import Runner, SwitchParams, require_each_once


def _as_in_switch(name: str) -> Any:
    """Describe a param as the switch does."""
    return SwitchParams.model_fields[name]


class FinishParams(Params):
    """The params of `juicefs_storage_finish`."""

    volume: str | None = param(
        "Volume", "Registered volume", "A name in `include/volumes.yaml`. Its entry fills in what is left empty.", None
    )
    kubernetes_conn_id: str = _as_in_switch("kubernetes_conn_id")
    more_kubernetes_conn_ids: tuple[str, ...] = _as_in_switch("more_kubernetes_conn_ids")
    namespace: str = _as_in_switch("namespace")
    secret_name: str = _as_in_switch("secret_name")
    meta_conn_id: str | None = _as_in_switch("meta_conn_id")
    store_conn_id: str | None = param(
        "Volume",
        "Store's connection",
        "Type `aws`: how Airflow reaches the store that the volume is on now. Empty: the endpoint and keys in the "
        "setting.",
        None,
    )
    dry_run: bool = param("Safety", "Dry run", "Stop after the plan. Nothing is changed.", True)
    require_approval: bool = _as_in_switch("require_approval")
    refresh_mount_pods: bool = param(
        "Refresh",
        "Replace mount pods",
        "Replace each mount pod that carries other values, one after the other, by the driver's smooth upgrade. Off: "
        "they are named, and nothing is changed.",
        False,
    )
    pause_s: int = param(
        "Refresh",
        "Pause (s)",
        "How long to wait after each mount pod that was replaced, before its client is proven and the next one begins.",
        30,
        ge=0,
        le=3600,
    )
    most_pods: int = param(
        "Refresh",
        "Batch size",
        "How many mount pods this run replaces at most. Begin with 1, the canary, and look at the application; a later "
        "run takes the others. `0`: all.",
        1,
        ge=0,
        le=10_000,
    )
    close_door: bool = param(
        "Old store",
        "Close the door",
        "Prove that the old store refuses the writes of the old key. With `fence_conn_id` the run has it refuse them, "
        "and leaves it so; else you do. See [the door](finish.md#close-the-door).",
        False,
    )
    fence_conn_id: str | None = param(
        "Old store",
        "Administrator's connection",
        "Type `aws`, for MinIO alone: an administrator of the old store. Empty: the old store is not told anything.",
        None,
    )
    rehearse_off_s: int = param(
        "Old store",
        "Rehearse switching off (s)",
        "For so long the old store denies the old key reads and writes; it is undone at the first request of a client "
        "that fails. `0`: not at all. See [the rehearsal](finish.md#rehearse-switching-off).",
        0,
        ge=0,
        le=3600,
    )
    watch: bool = param(
        "Watch",
        "Watch",
        "Before it certifies, watch the old store, the sessions, the setting and the clients until nothing was found "
        "for `idle_s`. Holds no worker slot. See [what is watched](finish.md#watch).",
        False,
    )
    watch_every_s: int = param(
        "Watch",
        "Between two looks (s)",
        "How long the watch waits between two looks.",
        300,
        ge=10,
        le=86_400,
    )
    certify: bool = param(
        "Certify",
        "Certify",
        "Prove that the move is finished, and sign what was proven with the key of connection `juicefs_certificate`. "
        "See [what is certified](finish.md#certify).",
        False,
    )
    idle_s: int = param(
        "Certify",
        "Idle (s)",
        "For how long no block may have come to the old store, by its own dates, and the watch must find nothing.",
        86_400,
        ge=60,
        le=90 * 86_400,
    )
    old_conn_id: str | None = param(
        "Certify",
        "Old store's connection",
        "Type `aws`: how Airflow looks at the old store, whose old key is withdrawn. It needs to list there alone. "
        "Empty: the endpoint and keys in the backup.",
        None,
    )
    juicefs_runner: Runner = _as_in_switch("juicefs_runner")

    @field_validator("more_kubernetes_conn_ids")
    @classmethod
    def _without_blanks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(filter(None, value))

    @model_validator(mode="after")
    def _each_cluster_once(self) -> FinishParams:
        require_each_once([self.kubernetes_conn_id, *self.more_kubernetes_conn_ids])
        return self

    @model_validator(mode="after")
    def _administrator(self) -> FinishParams:
        if self.rehearse_off_s and not self.fence_conn_id:
            raise ValueError("`rehearse_off_s` takes `fence_conn_id`: nobody else can deny the old key, and allow it")
        return self


#: What an entry of the registry may fill in here.
_BY_REGISTRY = frozenset(
    {"kubernetes_conn_id", "more_kubernetes_conn_ids", "namespace", "secret_name", "meta_conn_id", "juicefs_runner"}
)


def resolve_finish_params(given: dict[str, Any], registry: dict[str, dict[str, Any]]) -> FinishParams:
    """Validate the params of a run, filled in from the registry.

    Args:
        given: The params as Airflow hands them over.
        registry: `include/volumes.yaml`.

    Raises:
        PermanentError: The volume is not registered, or a param is unknown or has a value that is not allowed.
    """
    given = without_empty(given)
    name = given.get("volume")
    if name is None:
        return FinishParams.validated(given)
    if name not in registry:
        known = ", ".join(sorted(registry)) or "none"
        raise PermanentError(
            f"Param `volume`: {name!r} is not in include/volumes.yaml; registered: {known}.",
            next_step="register the volume, or leave `volume` empty and fill in the other params",
        )
    entry = {key: value for key, value in without_empty(registry[name]).items() if key in _BY_REGISTRY}
    defaults = {field: info.default for field, info in FinishParams.model_fields.items()}
    chosen = {key: value for key, value in given.items() if value not in (defaults.get(key), [])}
    return FinishParams.validated({**entry, **chosen})

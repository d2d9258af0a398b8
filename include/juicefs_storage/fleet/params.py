"""The params of a fleet, and those of each volume's run that follow from them."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

from pydantic import field_validator, model_validator

from include.juicefs_storage.names import SIDE_BY_SIDE
from include.juicefs_storage.params import param, without_empty
from include.juicefs_storage.switch.params import MoveParams, Runner, SwitchParams, TargetStorage, resolve_switch_params
from include.juicefs_storage.volume.setting import ENDPOINT

OnFailure = Literal["stop", "continue"]


def as_in_switch(name: str) -> Any:
    """Describe a param that each volume's run takes over, as the switch does."""
    return SwitchParams.model_fields[name]


class FleetParams(MoveParams):
    """The params of `juicefs_storage_fleet`."""

    source_endpoint: str | None = param(
        "Volumes",
        "Old endpoint",
        "`http(s)://host[:port]`: every volume whose setting names it. Or give the volumes below.",
        None,
        examples=["http://minio.old.example:9000"],
    )
    volumes: tuple[str, ...] = param(
        "Volumes",
        "Registered volumes",
        "Names in `include/volumes.yaml`, one a line, instead of the old endpoint.",
        (),
    )
    exclude: tuple[str, ...] = param("Volumes", "Leave out", "Names of volumes, one a line.", ())
    kubernetes_conn_id: str = param(
        "Volumes", "Kubernetes connection", "The cluster of the CSI driver.", "kubernetes_default"
    )
    more_kubernetes_conn_ids: tuple[str, ...] = param(
        "Volumes",
        "More Kubernetes connections",
        "Other clusters that [have the volumes mounted](changes.md#clients-in-other-clusters), one a line. Volumes are "
        "looked for in the first cluster alone.",
        (),
    )
    namespace: str = param("Volumes", "Namespace", "Where the CSI driver and the Secrets are.", "juicefs")
    target_conn_id: str | None = param(
        "New storage",
        "New store's connection",
        "Type `aws`. Empty: by the registry. Required with `source_endpoint`.",
        None,
        examples=["minio_new"],
    )
    target_bucket: str | None = param(
        "New storage",
        "New bucket",
        "One bucket for all. Empty: by the registry, else the name of each volume's old bucket.",
        None,
    )
    target_endpoint: str | None = as_in_switch("target_endpoint")
    target_storage: TargetStorage | None = as_in_switch("target_storage")
    source_conn_id: str | None = param(
        "New storage", "Old store's connection", "Empty: the endpoint and keys in each setting.", None
    )
    canary: str | None = param(
        "Waves",
        "Canary",
        "The volume that goes first. Empty: the one with the fewest clients, but at least one.",
        None,
    )
    approve_after_canary: bool = param(
        "Waves", "Approve after the canary", "Wait for a human before the others, for 24 hours at most.", True
    )
    wave_size: int = param(
        "Waves",
        "Wave size",
        "How many volumes move side by side after the canary.",
        3,
        ge=1,
        le=SIDE_BY_SIDE,
    )
    soak_s: int = param(
        "Waves",
        "Soak (s)",
        "How long each volume is watched after its move, before the next wave. Less than 360 proves the blocks before "
        "those that are [committed late](fine-print.md#blocks-that-are-committed-late).",
        600,
        ge=0,
        le=7 * 86400,
    )
    on_failure: OnFailure = param(
        "Waves",
        "On failure",
        "`stop`: start no other volume, and refuse the plan where a volume is blocked. `continue`: leave blocked ones "
        "out, and continue with the next wave after a failure. The volume itself is rolled back by its own run.",
        "stop",
    )
    restart_csi: bool = param(
        "Safety", "Restart CSI", "Restart the CSI components with the canary, and once after the last wave.", True
    )
    juicefs_runner: Runner = as_in_switch("juicefs_runner")
    client_timeout_s: int = as_in_switch("client_timeout_s")
    rollout_timeout_s: int = as_in_switch("rollout_timeout_s")
    settle_s: int = as_in_switch("settle_s")
    late_commit_s: int = as_in_switch("late_commit_s")
    wait_for_quiet_s: int = as_in_switch("wait_for_quiet_s")
    fence_conn_id: str | None = as_in_switch("fence_conn_id")

    @field_validator("source_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is not None and not ENDPOINT.match(value):
            raise ValueError("expected http(s)://host[:port] without bucket, path or keys")
        return value

    @field_validator("volumes", "exclude")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := sorted(name for name, count in Counter(value).items() if count > 1 or not name):
            raise ValueError(f"expected each name once, found {', '.join(map(repr, twice))} more often, or empty")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> FleetParams:
        if bool(self.source_endpoint) == bool(self.volumes):
            raise ValueError("`source_endpoint`, `volumes`: expected one of them: all volumes on a store, or a list")
        if self.source_endpoint and not self.target_conn_id:
            raise ValueError("`target_conn_id`: expected the new store's connection together with `source_endpoint`")
        return self


#: The fleet decides these by itself, run by run.
_OF_THE_FLEET_ALONE = {"dry_run", "require_approval", "on_failure"}


def _passed_on(fleet: FleetParams) -> dict[str, Any]:
    """Return what every volume's run takes over, where a volume's entry in the registry says nothing else."""
    shared = FleetParams.model_fields.keys() & SwitchParams.model_fields.keys() - _OF_THE_FLEET_ALONE
    return {name: getattr(fleet, name) for name in shared}


def registered_volume(fleet: FleetParams, registry: dict[str, dict[str, Any]], name: str) -> SwitchParams:
    """Resolve the params of the run of a registered volume.

    Args:
        fleet: The fleet's params.
        registry: The registered volumes.
        name: The volume's name there.

    Raises:
        PermanentError: It is not registered, or no target is known.
    """
    # Resolved here and now: what is approved does not change with the registry.
    return resolve_switch_params({**_passed_on(fleet), "volume": name}, registry).model_copy(update={"volume": None})


def found_volume(
    fleet: FleetParams, registry: dict[str, dict[str, Any]], secret_name: str, bucket: str = "unknown"
) -> SwitchParams:
    """Resolve the params of the run of a volume that was found by its Secret.

    Args:
        fleet: The fleet's.
        registry: An entry with this cluster, namespace and Secret fills in what the fleet leaves open.
        secret_name: The volume's Secret in the driver's namespace.
        bucket: The old bucket's name, which the new one takes where neither the fleet nor the registry names one.

    Raises:
        PermanentError: No target is known, or a param has a value that is not allowed.
    """
    here = {"kubernetes_conn_id": fleet.kubernetes_conn_id, "namespace": fleet.namespace, "secret_name": secret_name}
    defaults = {field: SwitchParams.model_fields[field].default for field in here}
    entries = {name: without_empty(entry) for name, entry in registry.items()}
    name = next((name for name, entry in entries.items() if {**defaults, **entry}.items() >= here.items()), None)
    given = {**_passed_on(fleet), "volume": name, "secret_name": secret_name}
    given["target_bucket"] = fleet.target_bucket or entries.get(name or "", {}).get("target_bucket") or bucket
    return resolve_switch_params(given, registry).model_copy(update={"volume": None})

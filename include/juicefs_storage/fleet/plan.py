"""A fleet: all volumes on a store, moved in waves, a canary first. Who belongs to it, in what order, whose turn?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.markdown import bullets
from include.juicefs_storage.params import refused
from include.juicefs_storage.ports import SecretObject
from include.juicefs_storage.records import Frozen
from include.juicefs_storage.switch.params import Consistency, Runner, SwitchParams, resolve_params
from include.juicefs_storage.switch.report import MEANING as RUN_MEANING
from include.juicefs_storage.volume.secret import holds_volume
from include.juicefs_storage.volume.setting import ENDPOINT, normal_endpoint

SWITCH = "juicefs_storage_switch"
#: How many runs of that DAG go side by side: no wave is larger, and further dry runs wait.
SIDE_BY_SIDE = 8
#: On the driver's copies of a Secret, one a volume.
_DRIVERS_COPY = ("juicefs/secret", "true")

OnFailure = Literal["stop", "continue"]
#: Where a volume stands. `left out` was never started, `failed` is whatever is not proven on the new store.
VolumeState = Literal["waits", "under way", "moved", "failed", "left out"]
Turn = Literal["go", "wait", "stop"]
FleetOutcome = Literal["moved", "planned", "refused", "rejected", "stopped", "incomplete"]

MEANING: Mapping[FleetOutcome, str] = {
    "moved": "Every volume of the fleet is on the new store, and was well for `soak_s` after its move.",
    "planned": "Dry run: nothing was changed. Trigger again with dry_run=false to carry the plan out.",
    "refused": "Nothing was changed. Remove what blocks volumes, or leave them out (`exclude`), then trigger again.",
    "rejected": "The plan was not approved. Nothing was changed.",
    "stopped": "The fleet stopped: what was moved stays moved, what had not begun was not touched. See the runs of "
    "those that failed, then trigger a new run for the rest.",
    "incomplete": "The fleet went to its end, and not every volume is proven on the new store. See the runs of "
    "those that failed, then trigger a new run for the rest.",
}


class FleetParams(BaseModel):
    """The params of `juicefs_storage_fleet`. Field names are the public interface; docs/fleet.md lists them."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_strip_whitespace=True)

    source_endpoint: str | None = Field(default=None, examples=["http://minio.old.example:9000"])
    volumes: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    kubernetes_conn_id: str = "kubernetes_default"
    namespace: str = "juicefs"
    target_conn_id: str | None = None
    target_bucket: str | None = None
    target_endpoint: str | None = None
    source_conn_id: str | None = None
    canary: str | None = None
    approve_after_canary: bool = True
    wave_size: Annotated[int, Field(ge=1, le=SIDE_BY_SIDE)] = 3
    soak_s: Annotated[int, Field(ge=0, le=7 * 86400)] = 600
    on_failure: OnFailure = "stop"
    dry_run: bool = True
    require_approval: bool = True
    consistency: Consistency = "listing"
    catch_up: bool = True
    restart_csi: bool = True
    juicefs_runner: Runner = "controller"
    client_timeout_s: Annotated[int, Field(ge=5, le=3600)] = 60
    rollout_timeout_s: Annotated[int, Field(ge=10, le=7200)] = 300
    settle_s: Annotated[int, Field(ge=0, le=3600)] = 40
    late_commit_s: Annotated[int, Field(ge=0, le=1800)] = 360
    fence_conn_id: str | None = None

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


#: What every volume's run takes over, where a volume's entry in the registry says nothing else.
_PASSED_ON = (
    "kubernetes_conn_id", "namespace", "target_conn_id", "target_bucket", "target_endpoint", "source_conn_id",
    "consistency", "catch_up", "restart_csi", "juicefs_runner", "client_timeout_s", "rollout_timeout_s", "settle_s",
    "late_commit_s", "fence_conn_id",
)  # fmt: skip


def check_fleet_params(given: Mapping[str, Any]) -> FleetParams:
    """Validate the params of a fleet's run.

    Raises:
        PermanentError: A param is unknown or has a value that is not allowed; all of them are named.
    """
    try:
        return FleetParams.model_validate({key: value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise refused(error, FleetParams) from None


def registered_volume(fleet: FleetParams, registry: dict[str, dict[str, Any]], name: str) -> SwitchParams:
    """The params of the run of a volume that the registry names.

    Raises:
        PermanentError: It is not registered, or no target is known.
    """
    given = {field: getattr(fleet, field) for field in _PASSED_ON}
    # Resolved here and now: what is approved does not change with the registry.
    return resolve_params({**given, "volume": name}, registry).model_copy(update={"volume": None})


def found_volume(
    fleet: FleetParams, registry: dict[str, dict[str, Any]], secret_name: str, bucket: str = "unknown"
) -> SwitchParams:
    """The params of the run of a volume that was found by its Secret.

    Args:
        fleet: The fleet's.
        registry: An entry with this cluster, namespace and Secret fills in what the fleet leaves open.
        secret_name: The volume's Secret in the driver's namespace.
        bucket: The old bucket's name: the new one has the same where nobody says otherwise.
    """
    defaults = {field: info.default for field, info in SwitchParams.model_fields.items()}
    here = {"kubernetes_conn_id": fleet.kubernetes_conn_id, "namespace": fleet.namespace, "secret_name": secret_name}
    name = next(
        (
            name
            for name, entry in registry.items()
            if all(entry.get(field, defaults[field]) == value for field, value in here.items())
        ),
        None,
    )
    given = {field: getattr(fleet, field) for field in _PASSED_ON} | {"volume": name, "secret_name": secret_name}
    given["target_bucket"] = fleet.target_bucket or registry.get(name or "", {}).get("target_bucket") or bucket
    return resolve_params(given, registry).model_copy(update={"volume": None})


def volumes_by_secret(secrets: Sequence[SecretObject], namespace: str) -> list[tuple[SecretObject, bool]]:
    """One Secret for each volume that some Secret names, and whether a switch can patch it: those of `namespace`.

    Copies of a Secret (the same metadata and name) are one volume. The driver's own copies are left out.
    """
    groups: list[list[SecretObject]] = []
    key, value = _DRIVERS_COPY
    for secret in secrets:
        if not secret.data.get("metaurl") or not secret.data.get("name") or secret.labels.get(key) == value:
            continue
        group = next((group for group in groups if holds_volume(secret, group[0])), None)
        if group is None:
            groups.append([secret])
        else:
            group.append(secret)

    def rank(secret: SecretObject) -> tuple[bool, bool, str]:
        return secret.namespace != namespace, "bucket" not in secret.data, secret.name

    chosen = [min(group, key=rank) for group in groups]
    return [(secret, secret.namespace == namespace) for secret in chosen]


def on_endpoint(bucket_endpoint: str, endpoint: str) -> bool:
    """Whether two endpoints are one, however they are written."""
    return normal_endpoint(bucket_endpoint) == normal_endpoint(endpoint)


class Member(Frozen):
    """A volume of the fleet: plain data, never a secret.

    Attributes:
        key: Its name, made unique within the fleet; part of the ids of its runs.
        secret: `namespace/name`.
        uuid: Empty where the setting could not be read.
        before: The bucket by the setting.
        after: The bucket that the dry run planned.
        fingerprint: A keyed digest of the target with its keys, from the dry run's plan.
        params: Of its runs, resolved.
        there: It is on the target already.
        blockers: What forbids its move, each with its remedy.
        warnings: How many the dry run found.
        clients: Mount pods.
        missing: Blocks that are not on the new store yet.
    """

    key: str
    secret: str
    uuid: str = ""
    before: str = ""
    after: str = ""
    fingerprint: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    there: bool = False
    blockers: tuple[str, ...] = ()
    warnings: int = 0
    clients: int = 0
    missing: int | None = None

    @property
    def ready(self) -> bool:
        """Whether it is to be moved and can be."""
        return not self.there and not self.blockers

    def conf(self, *, dry_run: bool, restart_csi: bool) -> dict[str, Any]:
        """The params of a run of its own: the fleet's plan was approved, the run asks nobody again."""
        return {**self.params, "dry_run": dry_run, "require_approval": False, "restart_csi": restart_csi}


def unique_keys(members: Sequence[Member]) -> list[Member]:
    """The volumes with keys that no two have: where names are the same, part of the UUID follows."""
    count = Counter(member.key for member in members)
    return [
        member if count[member.key] == 1 else member.model_copy(update={"key": f"{member.key}-{member.uuid[:8] or n}"})
        for n, member in enumerate(members)
    ]


def run_of(fleet: str, key: str, *, dry_run: bool = False) -> str:
    """The id of the run that moves a volume, or rehearses that: always the same, so that a cleared task finds it."""
    return f"{fleet}.{key}{'.plan' if dry_run else ''}"


class FleetPlan(Frozen):
    """What a fleet will do, and what it will not.

    Attributes:
        run_id: Of the fleet's run.
        waves: Keys of the volumes; the first wave is the canary alone.
    """

    run_id: str
    params: FleetParams
    members: tuple[Member, ...]
    waves: tuple[tuple[str, ...], ...]

    def member(self, key: str) -> Member:
        """The volume of this key."""
        return next(member for member in self.members if member.key == key)

    def wave_of(self, key: str) -> int | None:
        """The number of its wave, 0 for the canary; None where it is not to be moved."""
        return next((number for number, wave in enumerate(self.waves) if key in wave), None)

    @property
    def keys(self) -> list[str]:
        """Everybody who is to be moved, in order."""
        return [key for wave in self.waves for key in wave]

    @property
    def blocked(self) -> list[Member]:
        """Everybody who cannot be moved."""
        return [member for member in self.members if member.blockers]

    @property
    def title(self) -> str:
        """What is planned, in a line."""
        return f"Move {len(self.keys)} volumes from {self.params.source_endpoint or 'their stores'}, in waves"

    def to_markdown(self) -> str:
        """The plan for the person who approves it."""
        lines = [f"## {self.title}", ""]
        lines += ["| wave | volume | Secret | from | to | clients | blocks to copy | warnings | dry run |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        order = {key: number for number, key in enumerate(self.keys)}
        for member in sorted(self.members, key=lambda member: order.get(member.key, len(order))):
            # One without params was not rehearsed.
            link = f"[plan]({plan_page(run_of(self.run_id, member.key, dry_run=True))})" if member.params else "none"
            missing = "" if member.missing is None else member.missing
            lines.append(
                f"| {self._place(member)} | `{member.key}` | `{member.secret}` | `{member.before or '?'}` "
                f"| `{member.after or '?'}` | {member.clients} | {missing} | {member.warnings} | {link} |"
            )
        blockers = [f"`{member.key}`: {line}" for member in self.blocked for line in member.blockers]
        lines += ["", "### What blocks", *bullets([" ".join(line.split()) for line in blockers])]
        if steps := [f"{number}. {step}" for number, step in enumerate(self._steps(), 1)]:
            lines += ["", "### Steps, in this order", *steps]
        return "\n".join(lines)

    def _place(self, member: Member) -> str:
        number = self.wave_of(member.key)
        if number is None:
            return "already there" if member.there else "**blocked**"
        return "canary" if number == 0 else str(number)

    def _steps(self) -> Iterator[str]:
        params = self.params
        if not self.waves:
            return
        watched = f"watch it for {params.soak_s} s: clients proven, no restarts; then no block missing"
        yield f"switch `{self.waves[0][0]}`, the canary, in a run of its own; {watched}"
        if len(self.waves) > 1:
            if params.approve_after_canary:
                yield "ask for approval once more"
            waves = ["`, `".join(wave) for wave in self.waves[1:]]
            yield f"switch the others wave by wave, each watched before the next: `{'`; `'.join(waves)}`"
            if params.restart_csi:
                yield f"restart the CSI components once, at the end, and wait up to {params.rollout_timeout_s} s"
        stop = "start no other volume" if params.on_failure == "stop" else "go on with the next wave"
        yield f"if a volume fails: its own run rolls it back; {stop}, leave those that are moved"


def run_page(run_id: str) -> str:
    """A volume's run in Airflow, relative to the root of the UI."""
    return f"dags/{SWITCH}/runs/{quote(run_id, safe='')}"


def plan_page(run_id: str) -> str:
    """The plan of a volume's run, relative to the root of the UI."""
    return f"juicefs-storage/runs/{SWITCH}/{quote(run_id, safe='')}/plan"


def make_waves(ready: Sequence[Member], canary: str | None, size: int) -> tuple[tuple[str, ...], ...]:
    """A canary, then waves; those with the fewest clients first.

    Args:
        ready: The volumes that can be moved.
        canary: The key of the one that goes first; None: the one with the fewest clients, but some, which prove it.
        size: Of a wave, at most.

    Raises:
        PermanentError: There is no such volume to go first.
    """
    order = [member.key for member in sorted(ready, key=lambda member: (member.clients, member.key))]
    if canary and canary not in order:
        raise PermanentError(
            f"Param `canary`: {canary!r} is not among the volumes that can be moved: {', '.join(order) or 'none'}.",
            state="nothing was changed",
            next_step="choose another, or leave it empty",
        )
    if not order:
        return ()
    first = canary or next(
        (member.key for key in order for member in ready if member.key == key and member.clients), order[0]
    )
    order.remove(first)
    return ((first,), *(tuple(order[start : start + size]) for start in range(0, len(order), size)))


def stands(start: str, end: str) -> VolumeState:
    """Where a volume stands, by the states of the two tasks that start its run and watch it."""
    if start in {"skipped", "upstream_failed", "removed"}:
        return "left out"
    if start == "failed" or end in {"failed", "upstream_failed"}:
        return "failed"
    if end == "success":
        return "moved"
    return "under way" if start == "success" else "waits"


def whose_turn(
    waves: Sequence[Sequence[str]],
    key: str,
    standing: Mapping[str, VolumeState],
    *,
    running: bool,
    on_failure: OnFailure,
) -> Turn:
    """Whether a volume may be started now: never beside another wave, and after a failure only where that is wanted.

    Args:
        waves: As planned.
        key: The volume.
        standing: Of every volume.
        running: Whether a run of a volume of another wave is queued or running, whatever became of the tasks.
        on_failure: Of the fleet.
    """
    mine = next(number for number, wave in enumerate(waves) if key in wave)
    if on_failure == "stop" and any(standing[other] == "failed" for wave in waves for other in wave if other != key):
        return "stop"
    before = {standing[other] for wave in waves[:mine] for other in wave}
    return "wait" if running or before & {"waits", "under way"} else "go"


def waves_ahead(waves: Sequence[Sequence[str]], key: str, standing: Mapping[str, VolumeState]) -> int:
    """How many waves have to end before this volume's may begin."""
    mine = next(number for number, wave in enumerate(waves) if key in wave)
    return sum(any(standing[other] in {"waits", "under way"} for other in wave) for wave in waves[:mine])


def explain_run(outcome: str | None, run_id: str) -> str:
    """What became of a volume's run, for the person who reads the fleet's report."""
    meaning = next((text for name, text in RUN_MEANING.items() if name == outcome), "It left no report.")
    return f"run {run_id} ended {outcome or 'without a report'}: {meaning}"


class VolumeEnd(Frozen):
    """One line of the fleet's report."""

    key: str
    wave: str
    state: str
    detail: str = ""
    run_id: str | None = None


def fleet_markdown(title: str, meaning: str, ends: Sequence[VolumeEnd]) -> str:
    """The table of the volumes and their states; no table where there are none."""
    lines = [f"## {title}", meaning]
    if not ends:
        return "\n".join(lines)
    lines += ["", "| wave | volume | state | | run |", "|---|---|---|---|---|"]
    for end in ends:
        link = f"[run]({run_page(end.run_id)})" if end.run_id else ""
        lines.append(f"| {end.wave} | `{end.key}` | {end.state} | {' '.join(end.detail.split())} | {link} |")
    return "\n".join(lines)

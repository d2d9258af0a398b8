"""What a switch records before it touches anything, so that everything can be put back at any later time."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.ports import Vault
from include.juicefs_storage.switch.plan import Plan, has_fingerprint
from include.juicefs_storage.volume.clusters import FIRST
from include.juicefs_storage.volume.secret import storage_values
from include.juicefs_storage.volume.setting import Setting, StorageConfig

#: The format that this version writes; it reads every format up to this one. docs/backups.md describes them.
FORMAT = 3
#: What is kept beside a backup, under its id, a dot and this name.
KEPT_BESIDE = ("switched", "rolled-back", "diagnostics", "watch")
#: Begins the names of what fleets keep in the same folder.
FLEET_PREFIX = "_fleet."
#: Begins every name that is no backup's; no volume's name can.
_NO_VOLUME = "_"
#: Without these there is no way back. Whatever else a record holds may be missing or may not be understood.
_ESSENTIAL = frozenset({"setting_hex", "secrets"})
_EXAMPLES = 5
#: What a plan with hundreds of pods takes.
_PLAN_BYTES = 128 * 1024


class ClusterBackup(BaseModel):
    """What is recorded of a cluster other than the first: as in `Backup`. Holds secrets."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    secrets: dict[str, dict[str, str]] = Field(repr=False)
    templates: dict[str, Any] = Field(default_factory=dict, repr=False)


class Backup(BaseModel):
    """The state before a switch. Holds secrets: it exists in memory and in the vault, nowhere else.

    Attributes:
        format: Of the record; early versions wrote none, which is 1.
        setting_hex: The exact bytes of the row `format`; the volume's name and UUID are in them.
        secrets: Name of a Secret -> its values; in format 1 only those that a switch may change.
        namespace: Of the Secrets, in every cluster; empty in format 1.
        triggered_at: When the run was triggered: tells two runs of one id apart.
        templates: The pod templates of the CSI workloads.
        more_clusters: The same of every cluster but the first, by the names of their connections; none before format 3.
        target: The storage that the run moves to, keys included: what was approved is what is done and undone, even
            when the connection changes.
        params: The params of the run: names and flags, no secret.
        moved_before: The backups of the runs that were marked, by then, as having moved a volume of this name.
    """

    model_config = ConfigDict(frozen=True, defer_build=True)

    format: int = 1
    backup_id: str = ""
    run_id: str = ""
    created_at: datetime = datetime.min.replace(tzinfo=UTC)
    setting_hex: str = Field(repr=False)
    secrets: dict[str, dict[str, str]] = Field(repr=False)
    namespace: str = ""
    triggered_at: datetime | None = None
    templates: dict[str, Any] = Field(default_factory=dict, repr=False)
    more_clusters: dict[str, ClusterBackup] = Field(default_factory=dict)
    target: Annotated[tuple[str, ...], Field(min_length=4, max_length=5)] | None = Field(default=None, repr=False)
    plan: Plan | None = None
    params: dict[str, Any] = Field(default_factory=dict)
    moved_before: tuple[str, ...] = ()

    @staticmethod
    def target_of(config: StorageConfig) -> tuple[str, ...]:
        """A storage as `target` records it; without a session token in four values, as before there were tokens."""
        secrets = (config.access_key, config.secret_key, *([config.session_token] if config.session_token else []))
        return (config.storage, config.bucket, *(secret.get_secret_value() for secret in secrets))

    @property
    def new(self) -> StorageConfig:
        """The storage that the run moves to.

        Raises:
            PermanentError: The backup does not record it.
        """
        if self.target is None:
            raise PermanentError(
                f"Backup {self.backup_id} does not record where its run moved the volume to.",
                next_step="start a new run; juicefs_storage_revert goes back to this backup all the same",
            )
        storage, bucket, *secrets = self.target
        return StorageConfig(storage, bucket, *map(SecretStr, secrets))

    @property
    def setting(self) -> Setting:
        """The setting as it was."""
        try:
            return Setting(bytes.fromhex(self.setting_hex))
        except ValueError:
            raise PermanentError(
                f"Backup {self.backup_id} does not hold the bytes of a setting.", next_step="use an older backup"
            ) from None

    @property
    def lost_before(self) -> frozenset[str]:
        """Keys of the blocks that were lost before the run, and that a person accepted as lost."""
        return frozenset(self.plan.lost_blocks) if self.plan else frozenset()

    @property
    def secrets_by_cluster(self) -> dict[str, dict[str, dict[str, str]]]:
        """Name of a cluster -> name of a Secret -> its values."""
        return {FIRST: self.secrets, **{name: found.secrets for name, found in self.more_clusters.items()}}

    @property
    def storage_values(self) -> dict[str, dict[str, dict[str, str]]]:
        """Name of a cluster -> name of a Secret -> the values that a switch may change, as they were.

        Only these go back: the other values of a Secret, such as `metaurl`, may have changed for good reasons since.
        """
        return {
            cluster: {name: storage_values(values) for name, values in secrets.items()}
            for cluster, secrets in self.secrets_by_cluster.items()
        }

    def to_bytes(self) -> bytes:
        """Serialise for the vault."""
        return self.model_dump_json().encode()

    @classmethod
    def from_bytes(cls, content: bytes, backup_id: str = "") -> Backup:
        """Read what `to_bytes` wrote, in this version or an earlier one.

        A part that is not needed to go back, and cannot be understood, is left out.

        Args:
            content: The bytes.
            backup_id: Names the backup in errors.

        Raises:
            PermanentError: It is no backup, or was written in a newer format.
        """
        try:
            fields = json.loads(content)
        except ValueError:
            fields = None
        if not isinstance(fields, dict) or not fields.keys() >= _ESSENTIAL:
            raise _not_a_backup(backup_id)
        found = fields.get("format", 1)
        if not isinstance(found, int) or found > FORMAT:
            raise PermanentError(
                f"Backup {backup_id} is of format {found!r}; this version reads formats up to {FORMAT}.",
                next_step="use the version that wrote it, or a newer one",
            )
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            unclear = {detail["loc"][0] for detail in error.errors()}
        if unclear & _ESSENTIAL:
            # Without the validator's text: it quotes what it found.
            raise _not_a_backup(backup_id)
        return cls.model_validate({name: value for name, value in fields.items() if name not in unclear})


def _not_a_backup(backup_id: str) -> PermanentError:
    return PermanentError(
        f"{backup_id} can be decrypted and is not a backup.",
        next_step="trigger the DAG without `backup_id`: it offers the backups that can be read",
    )


def backup_size(setting: Setting, recorded: Sequence[Mapping[str, Any]]) -> int:
    """Estimate how large a backup will be, in bytes; rather more than less.

    Args:
        setting: The setting as it is.
        recorded: The values of each of the volume's Secrets, and the pod templates of the CSI workloads.
    """
    return _PLAN_BYTES + 2 * (2 * len(setting.raw) + len(json.dumps([dict(part) for part in recorded])))


def backup_id(volume: str, run_id: str) -> str:
    """Return the id of a run's backup: one per run, so that a repeated task finds what it wrote before."""
    return f"{volume}.{re.sub(r'[^A-Za-z0-9._-]+', '-', run_id)}"


def backup_ids(vault: Vault, volume: str | None = None) -> list[str]:
    """Return the ids of the backups in a vault, without what lies beside them, such as how a run ended.

    Args:
        vault: Where they lie.
        volume: Only those of volumes of this name.
    """
    names = set(vault.ids())
    beside = {f"{name}.{what}" for name in names for what in KEPT_BESIDE}
    own = {name for name in names - beside if not name.startswith(_NO_VOLUME)}
    return sorted(name for name in own if volume is None or name.startswith(f"{volume}."))


def read_backup(vault: Vault, backup_id: str) -> Backup:
    """Read a backup that must be there.

    Raises:
        PermanentError: There is none of this id, or it cannot be read.
    """
    content = vault.load(backup_id)
    if content is None:
        volume = backup_id.partition(".")[0]
        known = ", ".join(backup_ids(vault, volume)[-_EXAMPLES:]) or "none"
        raise PermanentError(
            f"There is no backup {backup_id!r}; backups of volume {volume!r}: {known}.",
            next_step="trigger the DAG without `backup_id`: it offers the backups that can be read",
        )
    return Backup.from_bytes(content, backup_id).model_copy(update={"backup_id": backup_id})


def foreign_to(backup: Backup, plan: Plan, keys: Sequence[bytes], triggered_at: datetime | None) -> str:
    """Return why a backup that lies under a run's id is not this run's; empty where it is.

    Ids come again: another volume of the same name in the same folder, or a run that was deleted and triggered again.

    Args:
        backup: What was found.
        plan: What this run planned.
        keys: Those that the plan's fingerprint may have been made with.
        triggered_at: When this run was triggered; None where that is not known.
    """
    if backup.setting.uuid != plan.uuid:
        return f"it is of volume {backup.setting.uuid}, this run's volume is {plan.uuid}"
    if not (triggered_at and backup.triggered_at):
        return deviation(backup, plan, keys)
    if backup.triggered_at != triggered_at:
        return f"an earlier run with the same id made it, triggered at {backup.triggered_at:%Y-%m-%d %H:%M:%S} UTC"
    return ""


def deviation(backup: Backup, plan: Plan, keys: Sequence[bytes]) -> str:
    """Return how the move that a backup records differs from a plan, and so from what was approved; empty: not at all.

    Args:
        backup: The backup.
        plan: The plan.
        keys: Those that the plan's fingerprint may have been made with.
    """
    if backup.target and not has_fingerprint(backup.new, plan.target_fingerprint, keys):
        return f"it records a move to {backup.new.bucket} with keys of its own, the plan is for {plan.after.bucket}"
    if backup.plan and backup.plan.backup_id != plan.backup_id:
        goes, planned = (made_for.backup_id or "no backup" for made_for in (backup.plan, plan))
        return f"it records a move back to {goes}, the plan is for {planned}"
    return ""

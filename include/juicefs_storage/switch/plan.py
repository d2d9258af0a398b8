"""The plan of a switch: made once from what was observed, shown to a human, and then carried out."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from pydantic import SecretStr

from include.juicefs_storage.markdown import bullets
from include.juicefs_storage.records import Record
from include.juicefs_storage.switch.change import MEANING, Change
from include.juicefs_storage.switch.findings import Finding, findings_markdown
from include.juicefs_storage.switch.forecast import forecast_lines
from include.juicefs_storage.volume.clusters import name_in
from include.juicefs_storage.volume.mount_pods import MountPod
from include.juicefs_storage.volume.setting import StorageConfig, masked
from include.juicefs_storage.volume.users import PodIdentity

#: What no run can see, for the person who approves it.
UNSEEN = (
    (
        "Writers without a session: `juicefs gc --compact`, a machine that is suspended now. Stop them before the "
        "switch. What they write to the old store after it is missing on the new one, unless the old key is withdrawn "
        "or a write fence stays up."
    ),
)


class StorageView(Record):
    """A storage as plans and reports show it."""

    storage: str
    bucket: str
    access_key: str
    session_token: str = masked(SecretStr(""))

    @classmethod
    def of(cls, config: StorageConfig) -> StorageView:
        """Mask a storage."""
        return cls(
            storage=config.storage,
            bucket=config.bucket,
            access_key=masked(config.access_key),
            session_token=masked(config.session_token),
        )


class SecretChange(Record):
    """The keys of one Secret that the switch sets. `cluster` is empty for the first one."""

    namespace: str
    name: str
    keys: tuple[str, ...]
    cluster: str = ""


class Plan(Record):
    """Everything that a switch will change, and everything that must not change."""

    volume: str
    uuid: str
    before: StorageView
    after: StorageView
    target_fingerprint: str
    secrets: tuple[SecretChange, ...]
    workloads: tuple[str, ...]
    mount_pods: tuple[MountPod, ...]
    business_pods: tuple[PodIdentity, ...]
    missing_objects: int | None
    steps: tuple[str, ...]
    findings: tuple[Finding, ...]
    #: The backup that the run goes back to; None in a switch.
    backup_id: str | None = None
    #: How the storage changes.
    change: Change = Change()
    #: Keyed digests of the secret key, now and after: two are equal where the keys are; empty where not recorded.
    secret_keys: tuple[str, str] = ("", "")
    #: Blocks a second, as Airflow read the old store; None: not measured.
    blocks_s: float | None = None
    #: Keys of the blocks that were lost on the old store when the plan was made, and that were accepted as lost.
    lost_blocks: tuple[str, ...] = ()
    #: The new bucket does not exist: the run makes it.
    creates_bucket: bool = False
    #: Clients that are no mount pods, and that a person accepted as not proven.
    accepted_clients: tuple[str, ...] = ()
    #: The code that made the plan; empty in plans of before this was recorded.
    code: str = ""
    #: The connections of the clusters beside the first.
    more_clusters: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Return a text that is the same for every plan that moves this volume to this storage with these keys."""
        return f"{self.uuid}/{self.target_fingerprint}"

    @property
    def title(self) -> str:
        """What is planned, in a line."""
        return (
            f"Revert volume {self.volume} to backup {self.backup_id}"
            if self.backup_id
            else f"Switch the storage of {self.volume}"
        )

    @property
    def refusals(self) -> list[Finding]:
        """What forbids the switch."""
        return [finding for finding in self.findings if finding.level == "refusal"]

    def to_markdown(self) -> str:
        """Render the plan for the person who approves it."""
        rows = [
            ("storage", self.before.storage, self.after.storage),
            ("bucket", self.before.bucket, self.after.bucket),
            ("access key", self.before.access_key, self.after.access_key),
            ("secret key, its digest", *self.secret_keys),
            ("session token", self.before.session_token, self.after.session_token),
        ]
        if self.before.session_token == self.after.session_token:
            del rows[-1]
        clients = [
            f"`{pod.name}` on {pod.node}, heartbeat {pod.heartbeat_s:g} s; {pod.load}" for pod in self.mount_pods
        ]
        secrets = [
            f"`{name_in(change.cluster, f'{change.namespace}/{change.name}')}`: {', '.join(change.keys)}"
            for change in self.secrets
        ]
        lines = [
            f"## Switch of volume `{self.volume}`"
            if self.backup_id is None
            else f"## Revert of volume `{self.volume}` to backup `{self.backup_id}`",
            f"**{MEANING[self.change.kind]}**",
            "",
            f"UUID `{self.uuid}`",
            "",
            "| | now | after |",
            "|---|---|---|",
            *(f"| {name} | `{before}` | `{after}` |" for name, before, after in rows),
            "",
            "### Findings",
            *findings_markdown(self.findings),
            "",
            "### Steps, in this order",
            *(f"{number}. {step}" for number, step in enumerate(self.steps, 1)),
            "",
            "### What is left, and how long it takes",
            *bullets(self._forecast()),
            "",
            "### What no run can see",
            *bullets(UNSEEN),
            "",
            "### Secrets that will be patched",
            *bullets(secrets),
            "",
            "### Clients that will be proven on the new store",
            *bullets(clients or ["none: no mount pod has the volume now, so that no client is proven"]),
            "",
            *self._accepted(),
            "### Pods that must not restart",
            f"{len(self.mount_pods)} mount pods, {len(self.business_pods)} business pods",
            *self._clusters(),
        ]
        return "\n".join(lines)

    def _clusters(self) -> list[str]:
        if not self.more_clusters:
            return []
        names = bullets([f"`{name}`" for name in self.more_clusters])
        return ["", "### Other clusters; what is in them is named after them", *names]

    def _accepted(self) -> list[str]:
        if not self.accepted_clients:
            return []
        names = bullets([f"`{name}`" for name in self.accepted_clients])
        return ["### Clients that are accepted and will not be proven", *names, ""]

    def _forecast(self) -> list[str]:
        heartbeats = [pod.heartbeat_s for pod in self.mount_pods]
        if self.change.copies:
            return forecast_lines(self.missing_objects, self.blocks_s, heartbeats)
        return ["nothing is copied", *forecast_lines(0, None, heartbeats)[1:]]


def digest(value: SecretStr, key: bytes) -> str:
    """Return a keyed digest of a secret value: tells two values apart and nothing else."""
    return hmac.new(key, value.get_secret_value().encode(), hashlib.sha256).hexdigest()[:8]


def has_fingerprint(config: StorageConfig, found: str, keys: Iterable[bytes]) -> bool:
    """Return whether a fingerprint is a storage's, by any of the keys that it may have been made with.

    Args:
        config: The storage.
        found: The fingerprint.
        keys: Of the folder of backups: the current one, and those from before a rotation.
    """
    return found in {fingerprint(config, key) for key in keys}


def fingerprint(config: StorageConfig, key: bytes) -> str:
    """Return a keyed digest of a storage with its keys: tells whether a connection changed since the plan was made."""
    values = (config.access_key, config.secret_key, *([config.session_token] if config.session_token else []))
    text = "\0".join((config.storage, config.bucket, *(value.get_secret_value() for value in values)))
    return hmac.new(key, text.encode(), hashlib.sha256).hexdigest()[:16]

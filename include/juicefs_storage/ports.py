"""What core needs of the outside world, as Protocols and frozen value types. `adapters` fulfils them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, Protocol

from include.juicefs_storage.volume.setting import Setting, StorageConfig

#: How a problem begins where a store did not answer in time.
NO_ANSWER = "no answer"
WorkloadKind = Literal["StatefulSet", "DaemonSet"]
DumpKind = Literal[
    "pods",
    "events",
    "statefulsets",
    "daemonsets",
    "persistentvolumes",
    "persistentvolumeclaims",
    "csidrivers",
    "csinodes",
]


@dataclass(frozen=True, slots=True)
class Session:
    """A client of the volume, from `jfs_session2`."""

    sid: int
    version: str
    host: str
    mount_point: str
    expires: datetime


class MetadataStore(Protocol):
    """The volume's metadata database."""

    def read_setting(self) -> Setting:
        """Read the row `format` of `jfs_setting`."""

    def now(self) -> float:
        """Return the time by the database's clock, in seconds since the epoch."""

    def replace_setting(self, expected: Setting, new: Setting, *, not_after: float | None = None) -> bool:
        """Compare and set in one statement.

        Args:
            expected: What must be there, byte by byte.
            new: What takes its place.
            not_after: Until when it may be written, by the database's clock in seconds since the epoch.

        Returns:
            False (and no change) where something else is there, or it is too late.
        """

    def confirm_writable(self) -> None:
        """Try what `replace_setting` does, and change nothing.

        Raises:
            PermanentError: The account lacks the right, or the server takes no writes.
        """

    def sessions(self) -> Sequence[Session]:
        """Return the clients whose session has not expired, by the server's clock."""

    def expired_sessions(self, within_s: float) -> Sequence[Session]:
        """Return the clients whose session expired in the last `within_s` seconds and is still listed."""

    def slices(self, first_id: int = 0, end_id: int | None = None) -> Iterator[tuple[int, int]]:
        """Yield id and size in bytes of every slice that some file refers to (`jfs_chunk_ref`, refs > 0), in id order.

        Args:
            first_id: The lowest id wanted.
            end_id: No id as high as this one or higher; None: no bound.
        """

    def still_needed(self, slice_ids: Collection[int]) -> set[int]:
        """Return those of the slices that some file refers to."""

    def files_of(self, slice_ids: Collection[int]) -> Iterator[tuple[int, str]]:
        """Yield slices of these, each with the path of a file that refers to it. Brackets describe what has no path.

        Reads every chunk of the volume once.
        """

    def slices_of_files(self, prefix: str) -> set[int]:
        """Return the slices of the files in the volume's root whose names begin with this. One small query."""

    def next_slice(self) -> int:
        """Read the lowest id that no slice of this volume has yet (`nextChunk` of `jfs_counter`)."""


@dataclass(frozen=True, slots=True)
class Right:
    """One permission in RBAC terms; `name` where it is needed for one object alone."""

    verb: str
    resource: str
    group: str = ""
    subresource: str = ""
    namespace: str | None = None
    name: str | None = None

    def __str__(self) -> str:
        resource = "/".join(part for part in (self.resource, self.subresource) if part)
        group = f".{self.group}" if self.group else ""
        where = f" in namespace {self.namespace}" if self.namespace else " cluster-wide"
        return f"{self.verb} {resource}{group}{f' {self.name}' if self.name else ''}{where}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a folder lies.

    Attributes:
        what: What it is for, in words.
        url: The folder.
        volume: The JuiceFS volume on whose mount it lies; empty: on none, as far as can be seen.
        store: Host and port of the object store; empty: not on one, or not known.
    """

    what: str
    url: str
    volume: str = ""
    store: str = ""


@dataclass(frozen=True)
class SecretObject:
    """A Kubernetes Secret. `data` is decoded and holds secrets: it is left out of `repr`.

    Attributes:
        owners: The objects that own and control it, as `Kind/name`. An owner that does not control it only decides
            how long it lives.
        immutable: The API server refuses every change of its data.
    """

    namespace: str
    name: str
    resource_version: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict, repr=False)
    owners: tuple[str, ...] = ()
    immutable: bool = False
    data: Mapping[str, str] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Workload:
    """A StatefulSet or DaemonSet with what tells whether its rollout is done."""

    kind: WorkloadKind
    name: str
    args: tuple[str, ...]
    annotations: Mapping[str, str]
    rolled_out: bool
    progress: str


@dataclass(frozen=True, slots=True)
class WorkloadTemplate:
    """What makes a workload restart or replace its pods.

    Attributes:
        annotations: Its own and those of its pod template.
        secrets: The Secrets that its pods take environment variables or volumes from.
        args: Of its containers, with their commands.
    """

    kind: str
    namespace: str
    name: str
    annotations: Mapping[str, str]
    secrets: frozenset[str]
    args: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as the proofs need it.

    Attributes:
        restarts: The sum over its containers.
        problem: Why a container of it waits, such as CrashLoopBackOff; empty where none does.
        waiting_container: Which container that is.
        unready_since: Since when it is not ready (UTC); None where it is, or where nobody has said so yet.
        phase: Pending, Running, Succeeded, Failed or Unknown.
        terminating: It is being deleted.
        started_at: When the last of its containers started (UTC); None where none runs.
    """

    namespace: str
    name: str
    uid: str
    node: str
    ready: bool
    restarts: int
    problem: str
    labels: Mapping[str, str]
    commands: tuple[str, ...]
    claims: tuple[str, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    waiting_container: str = ""
    unready_since: datetime | None = None
    phase: str = "Running"
    terminating: bool = False
    started_at: datetime | None = None

    @property
    def ended(self) -> bool:
        """No process of it runs any more, and none will."""
        return self.phase in {"Succeeded", "Failed"}


@dataclass(frozen=True, slots=True)
class PersistentVolume:
    """A PV of the JuiceFS CSI driver and the claim bound to it."""

    name: str
    volume_handle: str
    secret_namespace: str
    secret_name: str
    claim_namespace: str
    claim_name: str
    mount_options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StorageClass:
    """A StorageClass of the JuiceFS CSI driver: what the next PV will be like. The Secret's name may be a template."""

    name: str
    secret_namespace: str
    secret_name: str
    mount_options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExecResult:
    """What a command in a pod (or on the worker) printed, and how it ended."""

    returncode: int
    stdout: str
    stderr: str


@dataclass(frozen=True, slots=True)
class Lease:
    """A Lease of coordination.k8s.io. Times are UTC. `holder` is empty where it was given back."""

    name: str
    holder: str
    duration_s: int
    acquired_at: datetime
    renewed_at: datetime
    transitions: int = 0
    resource_version: str = ""


class LeaseStore(Protocol):
    """Where Leases are kept: `Cluster` is one."""

    @property
    def namespace(self) -> str:
        """Of the Leases."""

    def lease(self, name: str) -> Lease | None:
        """Read a Lease; None where there is none."""

    def write_lease(self, lease: Lease) -> bool:
        """Write a Lease as it was read and changed (create it where it has no `resource_version`).

        Returns:
            False (and no change) where somebody else wrote, created or deleted it since.
        """


class PodAccess(Protocol):
    """The pods of the CSI driver's namespace: of one cluster, or of several together."""

    @property
    def namespace(self) -> str:
        """Of the CSI driver."""

    def pods(self, label_selector: str = "") -> Sequence[Pod]:
        """Read the pods."""

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        """Run a command in a pod, and wait until it ends.

        Args:
            pod: The pod's name.
            container: Its container.
            command: The command and its arguments; no secret, since the API server's audit log shows it.
            stdin: Its standard input.
            timeout_s: How long it may run, in seconds.
        """

    def log_tail(self, pod: str, lines: int = 20, container: str = "", since_s: float | None = None) -> str:
        """Return the last lines of a pod's log, as they are.

        Args:
            pod: Its name.
            lines: How many at most.
            container: Where the pod has several.
            since_s: None older than so many seconds; None: of any age.
        """


class Cluster(PodAccess, LeaseStore, Protocol):
    """A Kubernetes cluster, seen from one namespace: the CSI driver's."""

    def allows(self, right: Right) -> bool:
        """Ask the API server whether the connection's user may do this."""

    def secret(self, name: str) -> SecretObject:
        """Read one Secret."""

    def secrets(self, label_selector: str = "") -> Sequence[SecretObject]:
        """Read the Secrets, where wanted those with a label."""

    def secrets_everywhere(self) -> Sequence[SecretObject] | None:
        """Read the Secrets of all namespaces; None where the connection's user may not."""

    def patch_secret(self, secret: SecretObject, values: Mapping[str, str]) -> None:
        """Set values by JSON patch; refused by the server where the Secret changed since it was read."""

    def workload(self, kind: WorkloadKind, name: str) -> Workload:
        """Read one workload."""

    def workload_templates(self) -> Sequence[WorkloadTemplate]:
        """Return the Deployments, StatefulSets and DaemonSets."""

    def deployments_everywhere(self) -> Sequence[WorkloadTemplate] | None:
        """Return the Deployments of all namespaces; None where the connection's user may not list them."""

    def stamp_template(self, kind: WorkloadKind, name: str, annotations: Mapping[str, str]) -> None:
        """Set annotations of the pod template, which makes the workload replace its pods.

        Args:
            kind: The workload's kind.
            name: The workload's name.
            annotations: Name -> value, beside those that are there.
        """

    def templates(self) -> Mapping[str, Any]:
        """Return the pod templates of the CSI workloads, for the backup."""

    def pods(self, label_selector: str = "", namespace: str | None = None) -> Sequence[Pod]:
        """Read the pods of the driver's namespace, or of another one."""

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        """Return the PVs of driver csi.juicefs.com."""

    def storage_classes(self) -> Sequence[StorageClass]:
        """Return the StorageClasses of driver csi.juicefs.com."""

    def driver_mount_options(self) -> Sequence[str]:
        """Return the mount options in the driver's own configuration, for whichever volumes."""

    def dump(self, kind: DumpKind) -> Sequence[Mapping[str, Any]]:
        """Return objects as the API server sends them; of claims and volumes those of driver csi.juicefs.com alone."""


class JuiceFS(Protocol):
    """The juicefs command line, wherever it runs."""

    def version(self) -> str:
        """Return the version of the executable, such as `1.4.2+2026-01-01.abcdef`."""

    def now(self) -> float:
        """Return the time by the clock of where the command runs, in seconds since the epoch."""

    def write_storage(self, config: StorageConfig, *, not_after: float) -> None:
        """Set storage, bucket and keys by `juicefs config`; refused where it starts later than `not_after` of `now`."""

    def await_config(self, *, timeout_s: float) -> None:
        """Wait until no `juicefs config` of this volume runs: one whose caller is gone may write yet."""

    def status(self) -> Mapping[str, Any]:
        """Run `juicefs status`."""

    def mount_fresh(self, canary: str, lost_files: Sequence[str] = ()) -> Sequence[str]:
        """Mount with an empty cache, read, write a file `canary` and list; the object keys of what was written.

        Args:
            canary: The name of the file that is written.
            lost_files: Paths inside of the volume that are not read: their blocks were lost before.
        """

    def unmount_fresh(self, canary: str) -> None:
        """Remove that file and the mount."""

    def try_storage(self, config: StorageConfig, write_below: str = "", *, timeout_s: int = 30) -> str | None:
        """Open a storage as the clients do, by its kind and URL and with its keys, and list in it. Needs no volume.

        Args:
            config: The storage.
            write_below: The volume below whose name an object is written, read and removed; empty: nothing is written.
            timeout_s: For how long an answer is waited for at each step, in seconds.

        Returns:
            What does not work, `NO_ANSWER` at its beginning where nothing came in time; empty where all does; None
            where it cannot be tried here.
        """

    def probe_storage(self, config: StorageConfig, blocks: Sequence[str], probe_key: str | None) -> str:
        """Use a storage with its own keys, from where juicefs runs: as the clients use it.

        Args:
            config: The storage.
            blocks: Keys of objects, one of which must be readable; empty where the volume has none.
            probe_key: Where a small object is written, read back and removed; None leaves that out. There must be
                nothing under it.

        Returns:
            What does not work; empty where all does.
        """


class WriteFence(Protocol):
    """Keeps the volume's clients from writing to a store that can refuse one key. Each call may be made again."""

    def is_up(self) -> bool:
        """Return whether the store refuses their writes."""

    def up(self) -> None:
        """Refuse from now on what would change the volume's objects with the clients' key; reads still work."""

    def down(self) -> None:
        """Allow it again."""


class Vault(Protocol):
    """Where backups lie, encrypted."""

    def save(self, backup_id: str, content: bytes) -> None:
        """Encrypt and write; then read back and compare."""

    def load(self, backup_id: str) -> bytes | None:
        """Read and decrypt; None where there is no such backup."""

    def ids(self) -> Sequence[str]:
        """Return the ids under which something lies here, sorted."""

    def check_room(self, size_bytes: int) -> None:
        """Prove that a file of a size can be written, read back and removed."""

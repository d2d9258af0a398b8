"""The ports, on a simulated world. Each call takes time; whoever calls may be killed or paused before and after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

from include.juicefs_storage.errors import LostAnswerError, PermanentError, StillAwayError, TransientError
from include.juicefs_storage.ports import (
    ExecResult,
    JuiceFS,
    Lease,
    MetadataStore,
    PersistentVolume,
    Pod,
    Right,
    SecretObject,
    Session,
    StorageClass,
    Vault,
    Workload,
    WorkloadKind,
    WorkloadTemplate,
    WriteFence,
)
from include.juicefs_storage.volume import canary, mount_pods, reach
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from tests.simulation.clients import Client
from tests.simulation.world import NAMESPACE, SECRET, VOLUME_ID, World
from tests.support.bare import BareCluster
from tests.support.fakes import setting

_Result = TypeVar("_Result")
_KEYS = (b"k" * 32,)
_CONTROLLER = "juicefs-csi-controller-0"
#: Of the answers, where some are lost.
_LOST = 0.5


@dataclass(frozen=True)
class Ask:
    """How the product asks the world.

    Attributes:
        world: Which world.
    """

    world: World

    def __call__(self, what: str) -> None:
        """Let a request take its time on the way there."""
        self.world.on_request(what)
        self.world.scheduler.sleep(self.world.random.uniform(0.002, 0.05))

    def change(self, what: str, function: Callable[[], _Result]) -> _Result:
        """Change something; whoever asks may not live to see the answer."""
        self(what)
        result = function()
        self(f"answer to {what}")
        if self.world.loses_answers and self.world.random.random() < _LOST:
            raise TransientError(f"The answer to {what} was lost.", next_step="the task tries again")
        return result


class SimulatedMetadata(MetadataStore):
    """The metadata database."""

    def __init__(self, ask: Ask) -> None:
        self._ask, self._world = ask, ask.world

    def _admit(self, what: str) -> None:
        self._ask(f"metadata: {what}")
        if not self._world.metadata_up:
            raise StillAwayError("The metadata database does not answer.", next_step="start it")

    def read_setting(self) -> Setting:
        self._admit("read the setting")
        return self._world.row

    def now(self) -> float:
        self._admit("time")
        return self._world.scheduler.now

    def replace_setting(self, expected: Setting, new: Setting, *, not_after: float | None = None) -> bool:
        self._admit("replace the setting")

        def replace_it() -> bool:
            late = not_after is not None and self._world.scheduler.now > not_after
            if late or self._world.row.raw != expected.raw:
                return False
            self._world.write_row(new, "compare-and-set")
            return True

        return self._ask.change("replace the setting", replace_it)

    def confirm_writable(self) -> None:
        self._admit("try an update")

    def sessions(self) -> Sequence[Session]:
        self._admit("sessions")
        expires = datetime.fromtimestamp(self._world.scheduler.now + 300, UTC)
        return [
            Session(number, "1.4.2+2026-01-01.abc", client.name, client.mount_path, expires)
            for number, client in enumerate(self._world.clients, 1)
        ]

    def expired_sessions(self, within_s: float) -> Sequence[Session]:
        self._admit("expired sessions")
        return []

    def slices(self, first_id: int = 0, end_id: int | None = None) -> Iterator[tuple[int, int]]:
        self._admit("slices")
        rows = sorted(self._world.slices.items())
        return iter([(n, size) for n, (size, _) in rows if n >= first_id and (end_id is None or n < end_id)])

    def still_needed(self, slice_ids: Collection[int]) -> set[int]:
        self._admit("slices still needed")
        return set(slice_ids) & self._world.slices.keys()

    def files_of(self, slice_ids: Collection[int]) -> Iterator[tuple[int, str]]:
        self._admit("files")
        return iter([(n, self._world.slices[n][1]) for n in sorted(slice_ids) if n in self._world.slices])

    def slices_of_files(self, prefix: str) -> set[int]:
        self._admit("slices of files")
        return {n for n, (_, path) in self._world.slices.items() if path.startswith(f"/{prefix}")}

    def next_slice(self) -> int:
        self._admit("next slice")
        return self._world.next_slice


class SimulatedJuiceFS(JuiceFS):
    """The juicefs command in a pod: what was started there goes on, whoever asked for it."""

    def __init__(self, ask: Ask) -> None:
        self._ask, self._world = ask, ask.world

    def _admit(self, what: str) -> None:
        self._ask(f"juicefs: {what}")
        if not self._world.cluster_up:
            raise TransientError("The cluster does not answer.", next_step="start it")

    def version(self) -> str:
        self._admit("version")
        return "1.4.2+2026-01-01.abc"

    def now(self) -> float:
        self._admit("time")
        return self._world.scheduler.now

    def write_storage(self, config: StorageConfig, *, not_after: float) -> None:
        self._admit("config")
        world, ended = self._world, list[bool]()
        if world.scheduler.now > not_after:
            raise TransientError("juicefs config was not started: it is too late.", next_step="the task tries again")
        row = world.row

        def write() -> None:
            # The command writes all of the row as it has read it, with other storage fields.
            fields = {key: value for key, value in json.loads(row.raw).items() if key not in _STORAGE_FIELDS}
            if world.metadata_up:
                world.write_row(setting(config, **fields), "juicefs config")
            ended.append(True)

        took_s = world.random.uniform(0.2, 3.0)
        world.config_running_until = world.scheduler.now + took_s
        world.scheduler.after(took_s, write)
        waited_until = world.scheduler.now + 60
        while not ended and world.scheduler.now < waited_until:
            world.scheduler.sleep(0.3)
        if world.random.random() < 0.05:
            raise LostAnswerError("The answer of juicefs config was lost.", next_step="the row decides")

    def await_config(self, *, timeout_s: float) -> None:
        self._admit("await config")
        self._world.scheduler.wait_for(lambda: self._world.scheduler.now >= self._world.config_running_until)

    def status(self) -> Mapping[str, Any]:
        self._admit("status")
        return {"Setting": {"UUID": self._world.row.uuid, "Bucket": self._world.row.bucket}}

    def mount_fresh(self, canary: str, lost_files: Sequence[str] = ()) -> Sequence[str]:
        self._admit("fresh mount")
        world = self._world
        config = world.row.config
        store = world.store_of(config)
        store.admit(config, write=True)
        there = world.acknowledged.keys() - set(lost_files) - {f"/{path}" for path in lost_files}
        if missing := [path for path in sorted(there) if world.acknowledged[path][0] not in store.objects]:
            raise TransientError(f"A fresh mount cannot read {missing[0]}.", next_step="the task tries again")
        return _write(world, config, f"/{canary}")

    def unmount_fresh(self, canary: str) -> None:
        self._admit("unmount")
        _remove(self._world, f"/{canary}")

    def try_storage(self, config: StorageConfig, write_below: str = "", *, timeout_s: int = 30) -> str | None:
        self._admit("try the storage")
        return self.probe_storage(config, [], "probe" if write_below else None)

    def probe_storage(self, config: StorageConfig, blocks: Sequence[str], probe_key: str | None) -> str:
        self._admit("probe the storage")
        store = self._world.store_of(config)
        try:
            store.admit(config, write=bool(probe_key))
        except (PermanentError, TransientError) as error:
            return error.problem
        if blocks and not any(key in store.objects for key in blocks):
            return "none of the blocks can be read"
        return ""


_STORAGE_FIELDS = ("Storage", "Bucket", "AccessKey", "SecretKey", "SessionToken", "KeyEncrypted")


def _write(world: World, config: StorageConfig, path: str) -> list[str]:
    """Write a small file with a storage; return the keys of its objects."""
    slice_id = world.new_slice()
    keys = [key for key, _ in block_objects(world.row, slice_id, 4096)]
    for key in keys:
        world.store_of(config).put(key, 4096, key, "canary")
    world.slices[slice_id] = (4096, path)
    return keys


def _remove(world: World, path: str) -> None:
    """Remove a file; the trash keeps its blocks."""
    for slice_id, (_, other) in list(world.slices.items()):
        if other == path:
            world.slices[slice_id] = (world.slices[slice_id][0], f"/.trash{path}")


class SimulatedFence(WriteFence):
    """A store that refuses the writes of one access key."""

    def __init__(self, ask: Ask, config: StorageConfig) -> None:
        self._ask, self._store = ask, ask.world.store_of(config)
        self._key = config.access_key.get_secret_value()

    def _admit(self, what: str) -> None:
        self._ask(f"fence: {what}")
        if not self._store.up:
            raise TransientError(f"{self._store.name} does not answer.", next_step="start it")

    def is_up(self) -> bool:
        self._admit("look")
        return self._key in self._store.denied

    def up(self) -> None:
        self._admit("up")
        self._ask.change("fence up", lambda: self._store.denied.add(self._key))

    def down(self) -> None:
        self._admit("down")
        self._ask.change("fence down", lambda: self._store.denied.discard(self._key))


class SimulatedVault(Vault):
    """The folder of backups."""

    def __init__(self, ask: Ask) -> None:
        self._ask, self._world = ask, ask.world
        self.folder = "memory://backups"

    key, keys = _KEYS[0], _KEYS

    def _admit(self, what: str) -> None:
        self._ask(f"backups: {what}")
        if not self._world.vault_up:
            raise TransientError("The folder of backups cannot be used.", next_step="mount it")

    def save(self, backup_id: str, content: bytes) -> None:
        self._admit(f"save {backup_id}")
        self._ask.change(f"save {backup_id}", lambda: self._world.vault.__setitem__(backup_id, content))

    def load(self, backup_id: str) -> bytes | None:
        self._admit(f"load {backup_id}")
        return self._world.vault.get(backup_id)

    def ids(self) -> Sequence[str]:
        self._admit("list")
        return sorted(self._world.vault)

    def check_room(self, size_bytes: int) -> None:
        self._admit("check room")


class SimulatedCluster(BareCluster):
    """The Kubernetes API."""

    namespace = NAMESPACE

    def __init__(self, ask: Ask) -> None:
        self._ask, self._world = ask, ask.world

    def _admit(self, what: str) -> None:
        self._ask(f"kubernetes: {what}")
        if not self._world.cluster_up:
            raise TransientError("The Kubernetes API does not answer.", next_step="start it")

    def allows(self, right: Right) -> bool:
        return True

    def secret(self, name: str) -> SecretObject:
        self._admit(f"get secret {name}")
        return self._world.secrets[name]

    def secrets(self, label_selector: str = "") -> list[SecretObject]:
        self._admit("list secrets")
        return list(self._world.secrets.values())

    def secrets_everywhere(self) -> Sequence[SecretObject] | None:
        return None

    def patch_secret(self, secret: SecretObject, values: Mapping[str, str]) -> None:
        self._admit(f"patch secret {secret.name}")

        def patch() -> None:
            if self._world.secrets[secret.name].resource_version != secret.resource_version:
                raise TransientError("The Secret changed since it was read.", next_step="the task tries again")
            self._world.change_secret(secret.name, dict(values), "a task")

        self._ask.change(f"patch secret {secret.name}", patch)

    def workload(self, kind: WorkloadKind, name: str) -> Workload:
        self._admit(f"get {kind}/{name}")
        rollout = self._world.rollouts[kind, name]
        done = self._world.scheduler.now >= rollout.done_at
        return Workload(kind, name, (), dict(rollout.annotations), done, "rolled out" if done else "0 of 1 updated")

    def workload_templates(self) -> Sequence[WorkloadTemplate]:
        self._admit("list workloads")
        return [WorkloadTemplate(kind, NAMESPACE, name, {}, frozenset(), ()) for kind, name in self._world.rollouts]

    def deployments_everywhere(self) -> Sequence[WorkloadTemplate] | None:
        return None

    def stamp_template(self, kind: WorkloadKind, name: str, annotations: Mapping[str, str]) -> None:
        self._admit(f"patch {kind}/{name}")

        def stamp() -> None:
            rollout = self._world.rollouts[kind, name]
            rollout.annotations |= annotations
            rollout.done_at = self._world.scheduler.now + self._world.random.uniform(1, 15)

        self._ask.change(f"patch {kind}/{name}", stamp)

    def templates(self) -> Mapping[str, Any]:
        self._admit("read the templates")
        return {f"{kind}/{name}": {} for kind, name in self._world.rollouts}

    def pods(self, label_selector: str = "", namespace: str | None = None) -> Sequence[Pod]:
        self._admit(f"list pods {label_selector}")
        if label_selector == mount_pods.MOUNT_POD_SELECTOR:
            return [_pod(client) for client in self._world.clients]
        if label_selector.startswith("app=juicefs-csi-controller"):
            return [Pod(NAMESPACE, _CONTROLLER, "c", "node", True, 0, "", {}, (), ())]
        return []

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        self._admit("list persistent volumes")
        return [PersistentVolume("pv-1", VOLUME_ID, NAMESPACE, SECRET, "shop", "data")]

    def storage_classes(self) -> Sequence[StorageClass]:
        return []

    def driver_mount_options(self) -> Sequence[str]:
        return ()

    def dump(self, kind: str) -> Sequence[Mapping[str, Any]]:
        self._admit(f"dump {kind}")
        return []

    def log_tail(self, pod: str, lines: int = 20, container: str = "", since_s: float | None = None) -> str:
        self._admit(f"log of {pod}")
        client = self._client(pod)
        since = self._world.scheduler.now - since_s if since_s is not None else 0.0
        return "\n".join(line for at, line in client.log if at >= since) if client else ""

    def lease(self, name: str) -> Lease | None:
        self._admit(f"get lease {name}")
        return self._world.leases.get(name)

    def write_lease(self, lease: Lease) -> bool:
        self._admit(f"write lease {lease.name}")

        def write() -> bool:
            found = self._world.leases.get(lease.name)
            if (found.resource_version if found else "") != lease.resource_version:
                return False
            self._world.leases[lease.name] = replace(lease, resource_version=str(next(self._world.versions)))
            return True

        return self._ask.change("write lease", write)

    def _client(self, pod: str) -> Client | None:
        return next((client for client in self._world.clients if client.name == pod), None)

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        self._admit(f"exec in {pod}")
        client, script, args = self._client(pod), command[2], command[4:]
        if script == reach._REACH:
            return ExecResult(0, "", "")
        if client is None or client.asleep:
            self._world.scheduler.sleep(timeout_s)
            raise TransientError(f"Pod {pod} did not answer within {timeout_s:g} s.", next_step="look at it")
        if script == mount_pods._READ_CONFIG:
            return ExecResult(0, _config(client), "")
        if script == mount_pods._READ_STATS:
            return ExecResult(0, f"juicefs_object_request_errors {client.request_errors}\n", "")
        if script == canary._ROOM:
            return ExecResult(0, "1000000000 4096 1000000", "")
        if script == canary._WRITE_CANARY:
            return self._write_canary(client, f"/{args[1]}", timeout_s)
        if script == canary._REMOVE_CANARY:
            _remove(self._world, f"/{args[1]}")
            return ExecResult(0, "", "")
        raise NotImplementedError(script)

    def _write_canary(self, client: Client, path: str, timeout_s: float) -> ExecResult:
        try:
            self._world.store_of(client.used).admit(client.used, write=True)
        except (PermanentError, TransientError):
            self._world.scheduler.sleep(timeout_s)
            raise TransientError("A write through the mount did not end.", next_step="look at the store") from None
        keys = _write(self._world, client.used, path)
        self._world.scheduler.sleep(self._world.random.uniform(0.2, 2.0))  # `juicefs info` and the way back
        return ExecResult(0, "\n".join(f"| objectName {key} |" for key in keys), "")


def _pod(client: Client) -> Pod:
    command = f"juicefs format --bucket={client.format_values.bucket if client.format_values else ''} mysql://x myjfs; "
    command += f"juicefs mount mysql://x {client.mount_path}"
    return Pod(
        NAMESPACE, client.name, client.uid, "node-1", not client.asleep, client.restarts, "",
        {mount_pods.VOLUME_ID_LABEL: VOLUME_ID}, (command,), (),
        started_at=datetime.fromtimestamp(client.started_at, UTC),
    )  # fmt: skip


def _config(client: Client) -> str:
    shown = client.shown.config
    return json.dumps(
        {
            "Format": {
                "UUID": client.shown.uuid,
                "Name": client.shown.name,
                "Storage": shown.storage,
                "Bucket": shown.bucket,
                "AccessKey": shown.access_key.get_secret_value(),
            },
            "Meta": {"Heartbeat": client.heartbeat_s * 1e9, "ReadOnly": False},
            "Chunk": {},
            "Version": "1.4.2+2026-01-01.abc",
        }
    )

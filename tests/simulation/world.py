"""A simulated world: one volume with its metadata, two stores, Secrets, mount pods and CSI components."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

from include.juicefs_storage.ports import Lease, SecretObject
from include.juicefs_storage.volume.csi import CSI_WORKLOADS
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from tests.simulation.clients import Client
from tests.simulation.scheduler import Scheduler
from tests.simulation.stores import Store
from tests.support.fakes import METAURL, NEW, OLD, setting

NAMESPACE, SECRET, VOLUME_ID = "juicefs", "juicefs-sc-secret", "pvc-1"
_START = 1_800_000_000.0
_FILES_BEFORE = 6


def key_pair(config: StorageConfig) -> tuple[str, str]:
    """Return access key and secret key."""
    return config.access_key.get_secret_value(), config.secret_key.get_secret_value()


@dataclass(frozen=True)
class Setup:
    """What a world is like when a history begins.

    Attributes:
        clients: How many mount pods.
        heartbeat_s: How often they read the setting, in seconds.
        keys_only: The new storage is the old bucket with other keys.
        moved: The old store does not serve any more; the new one has all that it had.
        fenced: The old store can refuse the clients' key, and the runs may have it do so.
        lost: How many files have lost their blocks, on both stores.
        skew_s: How far the clock of a worker may be off, in seconds.
        busy_s: How long the clients write files, in seconds.
    """

    clients: int = 2
    heartbeat_s: float = 12.0
    keys_only: bool = False
    moved: bool = False
    fenced: bool = False
    lost: int = 0
    skew_s: float = 0.0
    busy_s: float = 90.0


@dataclass
class Rollout:
    """A CSI workload: what its template is annotated with, and when its last rollout is done."""

    annotations: dict[str, str] = field(default_factory=dict)
    done_at: float = 0.0


class World:
    """Everything outside of the product.

    Attributes:
        scheduler: Its time.
        row: The setting.
        slices: Id -> size in bytes and path of the file.
        acknowledged: Path of a file -> keys of its blocks.
        lines: The log of a history.
    """

    def __init__(self, random: Random, setup: Setup) -> None:
        self.random, self.setup = random, setup
        self.scheduler = Scheduler(random, _START)
        self.old, self.new = OLD, replace(NEW, bucket=OLD.bucket) if setup.keys_only else NEW
        self.stores = {config.bucket: Store(config.bucket, self._now) for config in (self.old, self.new)}
        for config in (self.old, self.new):
            self.store_of(config).keys.add(key_pair(config))
        self.row = setting(OLD)
        self.metadata_up = self.cluster_up = True
        self.slices: dict[int, tuple[int, str]] = {}
        self._next_slice = 1
        self.attempted: list[str] = []
        self.acknowledged: dict[str, list[str]] = {}
        self.leases: dict[str, Lease] = {}
        self.vault: dict[str, bytes] = {}
        self.vault_up = True
        self.rollouts = {row: Rollout() for row in CSI_WORKLOADS}
        self.config_running_until = 0.0
        #: Of what is changed from now on, the answer may not arrive.
        self.loses_answers = False
        #: Files whose blocks are on no store.
        self.lost_files: list[str] = []
        self.lines: list[str] = []
        #: Called with each request of the product, before it is on its way.
        self.on_request: Callable[[str], None] = lambda _: None
        self.versions = iter(range(1, 1_000_000))
        self.secrets = {
            SECRET: SecretObject(NAMESPACE, SECRET, "1", data={"name": "myjfs", "metaurl": METAURL, **_values(OLD)})
        }
        self._populate()
        self.clients = [
            Client(self, f"juicefs-node-{n}-pvc-1-abcde{n}", f"uid-{n}", setup.heartbeat_s, OLD, self.row, OLD)
            for n in range(1, setup.clients + 1)
        ]
        for client in self.clients:
            self.scheduler.after(random.uniform(0, setup.heartbeat_s), client.beat)

    def _now(self) -> float:
        return self.scheduler.now

    def _populate(self) -> None:
        """Write the files that were there before; the new store has all but the last, or all where the store moved."""
        for store in self.stores.values():
            store.put("myjfs/juicefs_uuid", 36, self.row.uuid, "format")
        for number in range(_FILES_BEFORE):
            slice_id, size = self.new_slice(), 4096 * 1024
            path = f"/before-{number}"
            self.slices[slice_id] = (size, path)
            self.acknowledge(path, slice_id, size)
            if number < self.setup.lost:
                self.lost_files.append(path)
                continue
            for key in self.acknowledged[path]:
                self.store_of(self.old).put(key, size, key, "before")
                if number + 1 < _FILES_BEFORE or self.setup.moved:
                    self.store_of(self.new).put(key, size, key, "before")
        self.store_of(self.old).up = not self.setup.moved
        self.scheduler.now += 3600

    def note(self, line: str) -> None:
        """Add a line to the log of the history."""
        self.lines.append(f"{self.scheduler.now - _START - 3600:9.2f} {line}")

    def new_slice(self) -> int:
        """Give out a slice id."""
        self._next_slice += 1
        return self._next_slice - 1

    @property
    def next_slice(self) -> int:
        """The lowest id that was not given out yet."""
        return self._next_slice

    def acknowledge(self, path: str, slice_id: int, size: int) -> None:
        """An application knows that its file is written."""
        self.acknowledged[path] = [key for key, _ in block_objects(self.row, slice_id, size)]

    def store_of(self, config: StorageConfig) -> Store:
        """Return the store behind a storage."""
        return self.stores[config.bucket]

    def write_row(self, row: Setting, by: str) -> None:
        """Change the setting."""
        self.row = row
        self.note(f"{by} writes the setting: {row.bucket}")

    def format(self, config: StorageConfig) -> None:
        """Do what `juicefs format` does to a volume that exists: write the storage where it differs."""
        if not self.row.uses(config):
            fields = json.loads(self.row.raw)
            kept = {key: fields[key] for key in fields if key not in _STORAGE_FIELDS}
            self.write_row(setting(config, **kept), "a starting mount pod")

    def change_secret(self, name: str, values: dict[str, str], by: str) -> None:
        """Change values of a Secret."""
        found = self.secrets[name]
        data = {**found.data, **values}
        self.secrets[name] = replace(found, data=data, resource_version=str(next(self.versions) + 1))
        self.note(f"{by} patches {name}: {data.get('bucket')}")

    def unreadable(self) -> list[str]:
        """List the blocks of acknowledged files that are not on the store that the setting names."""
        objects = self.store_of(self.row.config).objects
        return [key for path in self.acknowledged for key in self.acknowledged[path] if key not in objects]


_STORAGE_FIELDS = ("Storage", "Bucket", "AccessKey", "SecretKey", "SessionToken", "KeyEncrypted")


def _values(config: StorageConfig) -> dict[str, str]:
    return {
        "storage": config.storage,
        "bucket": config.bucket,
        "access-key": config.access_key.get_secret_value(),
        "secret-key": config.secret_key.get_secret_value(),
    }

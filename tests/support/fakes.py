"""In-memory stand-ins for the ports, for tests of decisions; the adapters are tested against real servers."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.objects.bucket import Bucket, SomeSink, StoredObject
from include.juicefs_storage.objects.model import KeyRange, Page
from include.juicefs_storage.ports import MetadataStore, SecretObject, Session, Vault
from include.juicefs_storage.switch.backup import Backup
from include.juicefs_storage.switch.plan import Plan, StorageView
from include.juicefs_storage.volume.csi import CSI_WORKLOADS
from include.juicefs_storage.volume.mount_pods import MountPod
from include.juicefs_storage.volume.setting import Setting, StorageConfig
from tests.support.bare import BareCluster, BareJuiceFS

UUID = "11111111-2222-3333-4444-555555555555"
METAURL = "mysql://jfs:meta-pw@(db:3306)/jfs"
OLD = StorageConfig("minio", "http://old:9000/data", SecretStr("OLDKEY"), SecretStr("old-secret-value"))
NEW = StorageConfig("minio", "https://new:9000/data2", SecretStr("NEWKEY"), SecretStr("new-secret-value"))

#: A mount pod of the volume on `OLD`, in good order.
MOUNT = MountPod(
    name="juicefs-node-1-pvc-1-abcdef", uid="1", node="node-1", restarts=0, volume_id="pvc-1",
    mount_path="/jfs/pvc-1-abcdef", storage=OLD.storage, bucket=OLD.bucket, heartbeat_s=12, writeback=False,
    read_only=False, version="1.4.2+2026-01-01.abc", request_errors=0,
)  # fmt: skip


def setting(config: StorageConfig = OLD, *, encrypted: bool = True, **more: object) -> Setting:
    """Make a row as `juicefs format` writes it."""
    secret, token = config.secret_key.get_secret_value(), config.session_token.get_secret_value()
    if encrypted:
        secret, token = _sealed(secret), token and _sealed(token)
    fields = {
        "Name": "myjfs", "UUID": UUID, "Storage": config.storage, "Bucket": config.bucket,
        "AccessKey": config.access_key.get_secret_value(), "SecretKey": secret, "BlockSize": 4096,
        "Compression": "none", "TrashDays": 1, "KeyEncrypted": encrypted,
        **({"SessionToken": token} if token else {}),
    }  # fmt: skip
    return Setting(json.dumps(fields | more, indent=0).encode())


def _sealed(text: str) -> str:
    nonce = os.urandom(12)
    key = hashlib.md5(UUID.encode(), usedforsecurity=False).digest()
    return base64.b64encode(nonce + AESGCM(key).encrypt(nonce, text.encode(), None)).decode()


@dataclass
class FakeMetadata(MetadataStore):
    """A setting that is replaced by compare-and-set, and the slices that files refer to."""

    row: Setting
    rows: list[tuple[int, int]] = field(default_factory=list)
    live: list[Session] = field(default_factory=list)
    reads: int = 0
    time_s: float = 0.0
    expired: list[Session] = field(default_factory=list)
    refuses_writes: bool = False
    canaries: list[int] = field(default_factory=list)

    def read_setting(self) -> Setting:
        self.reads += 1
        return self.row

    def now(self) -> float:
        return self.time_s

    def replace_setting(self, expected: Setting, new: Setting, *, not_after: float | None = None) -> bool:
        if self.row.raw != expected.raw or (not_after is not None and self.time_s > not_after):
            return False
        self.row = new
        return True

    def confirm_writable(self) -> None:
        if self.refuses_writes:
            raise PermanentError("1142 UPDATE command denied.", next_step="grant it")

    def sessions(self) -> Sequence[Session]:
        return self.live

    def expired_sessions(self, within_s: float) -> Sequence[Session]:
        return self.expired

    def slices(self, first_id: int = 0, end_id: int | None = None) -> Iterator[tuple[int, int]]:
        rows = sorted(row for row in self.rows if row[0] >= first_id and (end_id is None or row[0] < end_id))
        return iter(rows)

    def still_needed(self, slice_ids: Collection[int]) -> set[int]:
        return set(slice_ids) & {slice_id for slice_id, _ in self.rows}

    def files_of(self, slice_ids: Collection[int]) -> Iterator[tuple[int, str]]:
        return iter([(slice_id, f"/file-{slice_id}") for slice_id in sorted(slice_ids)])

    def slices_of_files(self, prefix: str) -> set[int]:
        return set(self.canaries)

    def next_slice(self) -> int:
        return 1 + max((slice_id for slice_id, _ in self.rows), default=0)


@dataclass
class FakeJuiceFS(BareJuiceFS):
    """Writes the row as `juicefs config` does; `lies` makes it report success without writing.

    Attributes:
        meanwhile: Called between reading the setting and writing it.
    """

    metadata: FakeMetadata
    calls: int = 0
    lies: bool = False
    probed: list[tuple[StorageConfig, list[str], str | None]] = field(default_factory=list)
    tried: list[tuple[StorageConfig, str]] = field(default_factory=list)
    problem: str | None = ""
    no_pod: bool = False
    meanwhile: Callable[[], None] = lambda: None

    def try_storage(self, config: StorageConfig, write_below: str = "", *, timeout_s: int = 30) -> str | None:
        self.tried.append((config, write_below))
        if self.no_pod:
            raise TransientError("No ready pod.")
        return self.problem

    def probe_storage(self, config: StorageConfig, blocks: Sequence[str], probe_key: str | None) -> str:
        self.probed.append((config, list(blocks), probe_key))
        if self.no_pod:
            raise TransientError("No ready pod.")
        return self.problem or ""

    def now(self) -> float:
        return self.metadata.time_s

    def write_storage(self, config: StorageConfig, *, not_after: float) -> None:
        if self.metadata.time_s > not_after:
            raise TransientError("not started")
        self.calls += 1
        more = dict(self.metadata.row.other_fields)
        self.meanwhile()
        if not self.lies:
            self.metadata.row = setting(config, **more)


@dataclass
class FakeStore(Bucket):
    """A bucket of sizes alone; `contents` says which objects hold something else."""

    objects: dict[str, int] = field(default_factory=dict)
    contents: dict[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    name: str = "fake"
    written: dict[str, datetime] = field(default_factory=dict)
    time: datetime = datetime(2026, 1, 1, tzinfo=UTC)

    def newer(self, prefix: str, than: datetime) -> Iterator[StoredObject]:
        return (
            item for item in self.list(prefix) if self.written.get(item.key, datetime.min.replace(tzinfo=UTC)) > than
        )

    def now(self) -> datetime:
        return self.time

    def ping(self) -> None:
        pass

    def check(self, below: str = "") -> None:
        pass

    def probe(self, key: str, while_there: Callable[[], None] = lambda: None) -> None:
        self.objects[key] = 32
        while_there()
        del self.objects[key]

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        after, until = keys.after or "", keys.until or "\U0010ffff"
        found = [item for item in self.list("") if after < item.key <= until]
        if found:
            yield Page([i.key for i in found], [i.size_bytes for i in found], [i.etag for i in found])

    def first_after(self, key: str) -> str | None:
        return min((other for other in self.objects if other > key), default=None)

    def read(self, key: str) -> bytes | None:
        found = self.digest(key)
        return None if found is None else found.encode()

    def md5(self, key: str) -> str | None:
        return self.digest(key)

    def read_into(self, key: str, make: Callable[[Mapping[str, str]], SomeSink]) -> SomeSink | None:
        if key not in self.objects:
            return None
        made = make(self.headers.get(key, {}))
        made.update(self.contents.get(key, "").encode("latin-1").ljust(self.objects[key], b"."))
        return made

    def list(self, prefix: str) -> Iterator[StoredObject]:
        for key in sorted(self.objects, key=str.encode):
            if key.startswith(prefix):
                yield StoredObject(key, self.objects[key], "")

    def head(self, key: str) -> StoredObject | None:
        return StoredObject(key, self.objects[key], "") if key in self.objects else None

    def exists(self, key: str) -> bool:
        return key in self.objects

    def digest(self, key: str) -> str | None:
        return self.contents.get(key, "as written") if key in self.objects else None


@dataclass
class FakeCluster(BareCluster):
    """Secrets, with resourceVersions as the API server keeps them."""

    namespace: str = "juicefs"
    store: dict[str, SecretObject] = field(default_factory=dict)
    refuse_patches: bool = False

    def add(self, secret: str, labels: Mapping[str, str] | None = None, /, **data: str) -> None:
        self.store[secret] = SecretObject(
            self.namespace, secret, "1", labels or {}, data={k.replace("_", "-"): v for k, v in data.items()}
        )

    def secret(self, name: str) -> SecretObject:
        return self.store[name]

    def secrets(self, label_selector: str = "") -> list[SecretObject]:
        assert not label_selector
        return list(self.store.values())

    def patch_secret(self, secret: SecretObject, values: Mapping[str, str]) -> None:
        if secret.resource_version != self.store[secret.name].resource_version:
            raise TransientError("changed")
        if not self.refuse_patches:
            self.store[secret.name] = replace(
                secret, resource_version=f"{secret.resource_version}1", data={**secret.data, **values}
            )


@dataclass
class FakeWriteFence:
    """A write fence that is up or not."""

    raised: bool = False

    def is_up(self) -> bool:
        return self.raised

    def up(self) -> None:
        self.raised = True

    def down(self) -> None:
        self.raised = False


@dataclass
class FakeVault(Vault):
    """Holds what it is given; what is `b"?"` cannot be decrypted."""

    files: dict[str, bytes] = field(default_factory=dict)

    def save(self, backup_id: str, content: bytes) -> None:
        self.files[backup_id] = content

    def load(self, backup_id: str) -> bytes | None:
        if self.files.get(backup_id) == b"?":
            raise PermanentError(f"{backup_id} cannot be decrypted.", next_step="put the key back")
        return self.files.get(backup_id)

    def ids(self) -> list[str]:
        return sorted(self.files)

    def check_room(self, size_bytes: int) -> None:
        pass


def plan(**changes: Any) -> Plan:
    """Make the plan of a run from OLD to NEW."""
    values: dict[str, Any] = {
        "volume": "myjfs", "uuid": UUID, "before": StorageView.of(OLD), "after": StorageView.of(NEW),
        "target_fingerprint": "", "secrets": (), "workloads": (), "mount_pods": (), "business_pods": (),
        "missing_objects": None, "steps": (), "findings": (),
    }  # fmt: skip
    return Plan(**values | changes)


def backup(backup_id: str, created_at: datetime, *, params: dict[str, Any] | None = None, **more: Any) -> Backup:
    """Make the backup of a run from OLD to NEW."""
    target = (NEW.storage, NEW.bucket, NEW.access_key.get_secret_value(), NEW.secret_key.get_secret_value())
    values: dict[str, Any] = {
        "backup_id": backup_id, "run_id": "run", "created_at": created_at, "setting_hex": setting().raw.hex(),
        "secrets": {}, "templates": {f"{kind}/{name}": {} for kind, name in CSI_WORKLOADS}, "target": target,
        "plan": plan(), "params": params or {},
    }  # fmt: skip
    return Backup(**values | more)

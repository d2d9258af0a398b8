"""Object stores of a simulated world: what they hold, whom they serve, and who changed what."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.objects.bucket import Bucket, SomeSink, StoredObject
from include.juicefs_storage.objects.model import Copied, KeyRange, Listed, ObjectOutcome, Page
from include.juicefs_storage.volume.setting import StorageConfig
from tests.simulation.scheduler import Scheduler

_PAGE = 1_000
#: The keys of objects that the product writes to try something, and deletes again.
_PROBE = re.compile("probe|storage-switch-")


@dataclass(frozen=True)
class Stored:
    """One object: its size in bytes, what it holds, and when it was written."""

    size: int
    content: str
    at: float


@dataclass
class Store:
    """One bucket of an object store.

    Attributes:
        name: For messages.
        clock: The time, in seconds since the epoch.
        objects: Key -> object.
        keys: The pairs of access key and secret key that it knows.
        up: It answers.
        denied: Access keys that may not write for now.
        hidden: Keys of which it says for now that they are not there.
        slow_s: How long it takes to answer, in seconds: at most.
        harm: Objects that were overwritten with something else, or deleted, and by whom.
    """

    name: str
    clock: Callable[[], float]
    objects: dict[str, Stored] = field(default_factory=dict)
    keys: set[tuple[str, str]] = field(default_factory=set)
    up: bool = True
    denied: set[str] = field(default_factory=set)
    hidden: frozenset[str] = frozenset()
    slow_s: float = 0.0
    harm: list[str] = field(default_factory=list)

    def admit(self, config: StorageConfig, *, write: bool = False) -> None:
        """Let a request in.

        Raises:
            TransientError: It does not answer.
            PermanentError: It does not take these keys.
        """
        if not self.up:
            raise TransientError(f"{self.name} does not answer.", next_step="start it")
        access, secret = config.access_key.get_secret_value(), config.secret_key.get_secret_value()
        if (access, secret) not in self.keys:
            raise PermanentError(f"{self.name} refuses access key {access}.", next_step="correct the keys")
        if write and access in self.denied:
            raise PermanentError(f"{self.name}: access denied for {access}.", next_step="allow it")

    def shown(self, key: str) -> Stored | None:
        """What it gives out under a key."""
        return None if key in self.hidden else self.objects.get(key)

    def put(self, key: str, size: int, content: str, by: str) -> None:
        """Store an object."""
        found = self.objects.get(key)
        if found and found.content != content:
            self.harm.append(f"{by} overwrote {key}")
        self.objects[key] = Stored(size, content, self.clock())

    def delete(self, key: str, by: str) -> None:
        """Delete an object."""
        if self.objects.pop(key, None) and not _PROBE.search(key):
            self.harm.append(f"{by} deleted {key}")


class SimulatedBucket(Bucket):
    """A store as Airflow reaches it, with some keys. Each request takes time, and others work meanwhile."""

    def __init__(
        self, scheduler: Scheduler, store: Store, config: StorageConfig, answer: Callable[[str], None]
    ) -> None:
        self.name, self.store = store.name, self
        self.origin = "connection minio_new"
        self.endpoint = config.endpoint_and_bucket[0]
        self.config, self._scheduler, self._store, self._answer = config, scheduler, store, answer

    def _ask(self, what: str, *, write: bool = False) -> None:
        self._answer(f"{self.name}: {what}")
        if self._store.slow_s:
            self._scheduler.sleep(self._scheduler.random.uniform(0, self._store.slow_s))
        self._store.admit(self.config, write=write)

    def close(self) -> None:
        """There is nothing to close."""

    def ping(self) -> None:
        self._ask("ping")

    def check(self, below: str = "") -> None:
        self._ask("list one")

    def knows_keys(self) -> bool:
        """Return whether the store knows the keys."""
        try:
            self._ask("list one")
        except PermanentError:
            return False
        return True

    def is_absent(self, below: str = "") -> bool:
        """Return whether there is no such bucket."""
        return False

    def probe(self, key: str, while_there: Callable[[], None] = lambda: None) -> None:
        self._ask(f"probe {key}", write=True)
        self._store.put(key, 32, "probe", "airflow")
        try:
            while_there()
        finally:
            self._store.delete(key, "airflow")

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        after, until = keys.after or "", keys.until or "\U0010ffff"
        while True:
            self._ask("list a page")
            found = [key for key in self._listed() if after < key <= until][:_PAGE]
            if not found:
                return
            yield Page(found, [self._store.objects[key].size for key in found], [""] * len(found))
            after = found[-1]

    def _listed(self) -> Sequence[str]:
        return sorted(self._store.objects.keys() - self._store.hidden)

    def list(self, prefix: str) -> Iterator[StoredObject]:
        self._ask(f"list {prefix}")
        for key in self._listed():
            if key.startswith(prefix) and (found := self._store.objects.get(key)):
                yield StoredObject(key, found.size, "")

    def newer(self, prefix: str, than: datetime) -> Iterator[StoredObject]:
        for item in self.list(prefix):
            found = self._store.objects.get(item.key)
            if found and int(found.at) > than.timestamp():
                yield item

    def now(self) -> datetime:
        self._ask("date")
        return datetime.fromtimestamp(int(self._scheduler.now), UTC)

    def first_after(self, key: str) -> str | None:
        self._ask("list one")
        return min((other for other in self._listed() if other > key), default=None)

    def head(self, key: str) -> StoredObject | None:
        self._ask(f"head {key}")
        if not (found := self._store.shown(key)):
            return None
        written = datetime.fromtimestamp(int(found.at), UTC)
        return StoredObject(key, found.size, "", format_datetime(written, usegmt=True))

    def exists(self, key: str) -> bool:
        return self.head(key) is not None

    def read(self, key: str) -> bytes | None:
        self._ask(f"get {key}")
        found = self._store.shown(key)
        return found.content.encode() if found else None

    def read_into(self, key: str, make: Callable[[Mapping[str, str]], SomeSink]) -> SomeSink | None:
        raise NotImplementedError  # contents are compared where the stores are real

    def digest(self, key: str) -> str | None:
        found = self.read(key)
        return None if found is None else found.decode()

    def md5(self, key: str) -> str | None:
        return self.digest(key)


class SimulatedEngine:
    """Copies objects from one store to another: never over another, and never deleting."""

    def __init__(self, source: SimulatedBucket, target: SimulatedBucket) -> None:
        self._source, self._target = source, target

    def close(self) -> None:
        """There is nothing to close."""

    def copy(self, objects: list[Listed], *, overwrite: bool = False) -> list[Copied]:
        return [self._copy(key) for key, _, _ in objects]

    def _copy(self, key: str) -> Copied:
        self._source._ask(f"get {key}")
        found = self._source._store.shown(key)
        if found is None:
            return Copied(ObjectOutcome.VANISHED)
        self._target._ask(f"put {key}", write=True)
        if key in self._target._store.objects:
            return Copied(ObjectOutcome.SAME)
        self._target._store.put(key, found.size, found.content, "airflow")
        return Copied(ObjectOutcome.COPIED)

"""Watch the store that a volume has left, and the volume's clients, until nothing was found for some time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from pydantic import Field, ValidationError

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.model import Engine
from include.juicefs_storage.ports import MetadataStore, Session, Vault
from include.juicefs_storage.records import Record
from include.juicefs_storage.switch.late_writes import LateWrites
from include.juicefs_storage.switch.step import LeaseCheck
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods, find_mount_path, running_mount_pods
from include.juicefs_storage.volume.setting import Setting
from include.juicefs_storage.volume.users import session_name, unknown_sessions

#: How long a session is waited for to be renewed, in seconds, at least; a client renews its own every heartbeat (12 s).
_BEATS_S, _BEATS = 30.0, 2.5
#: How long looks may fail one after the other.
_PATIENCE = timedelta(hours=1)
#: How many of the lines that were found are kept.
_KEPT = 50


class Watched(Record):
    """What a watch has seen so far. It is kept between two looks, and while a task is retried.

    Attributes:
        run_id: The run that watches.
        quiet_since: Since when nothing was found (UTC).
        seen_to: Until when the store that was left is looked through, by its own clock.
        next_slice: Slices with this id or a higher one were given out after that.
        errors: Object requests that failed in each client since it started, by the pod's UID.
        looks: How many looks were made.
        copied: Blocks that were missing on the volume's store, and were copied there.
        found: What was found, a line each, the latest last.
        failed_since: Since when looks fail (UTC); None where the last one did not.
        problem: Why the last look failed.
    """

    run_id: str
    quiet_since: datetime
    seen_to: datetime
    next_slice: int
    errors: dict[str, int] = Field(default_factory=dict)
    looks: int = 0
    copied: int = 0
    found: tuple[str, ...] = ()
    failed_since: datetime | None = None
    problem: str = ""

    def ends_at(self, idle_s: float) -> datetime:
        """Return when the watch ends, if nothing more is found."""
        return self.quiet_since + timedelta(seconds=idle_s)

    @property
    def line(self) -> str:
        """Say what was seen, in a line."""
        what = f"{counted(self.looks, 'look')}, {counted(len(self.found), 'finding')}"
        copied = f", {counted(self.copied, 'block')} copied" if self.copied else ""
        return f"quiet since {self.quiet_since:%Y-%m-%d %H:%M:%S} UTC: {what}{copied}"


@dataclass(frozen=True)
class WatchRecord:
    """Where a watch is kept: beside the backup of the run that moved the volume. XComs go at each look.

    Attributes:
        vault: The folder of backups.
        backup_id: Of the run that moved the volume.
        run_id: The run that watches. Another run begins anew: nobody looked in between.
    """

    vault: Vault
    backup_id: str
    run_id: str

    @property
    def _id(self) -> str:
        return f"{self.backup_id}.watch"

    def load(self) -> Watched | None:
        """Read what this run has seen so far; None where it has not looked yet.

        Raises:
            StorageSwitchError: The folder cannot be read.
        """
        content = self.vault.load(self._id)
        try:
            found = Watched.model_validate_json(content) if content else None
        except ValidationError:
            return None
        return found if found and found.run_id == self.run_id else None

    def save(self, watched: Watched) -> None:
        """Write what was seen.

        Raises:
            StorageSwitchError: It cannot be written.
        """
        self.vault.save(self._id, watched.model_dump_json().encode())


@dataclass(frozen=True)
class Watch:
    """Looks for whatever still uses the store that a volume has left.

    Attributes:
        metadata: The volume's.
        pods: Its mount pods, in every cluster that is known.
        setting: The volume's.
        left: The store that it has left; None where that is the volume's own store, or serves nobody.
        target: The store that it is on.
        engine: Copies from the first to the second; overwrites nothing.
        refuse_if_held: Called before each copy; raises where another run works on the volume.
        now: The time (UTC).
        sleep: Waits the given seconds.
    """

    metadata: MetadataStore
    pods: VolumePods
    setting: Setting
    left: Bucket | None
    target: Bucket
    engine: Engine
    refuse_if_held: LeaseCheck
    now: Callable[[], datetime]
    sleep: Callable[[float], None]

    def begin(self, run_id: str, moved_at: datetime) -> Watched:
        """Begin: the first look goes back to the end of the run that moved the volume.

        Args:
            run_id: The run that watches.
            moved_at: When that run had ended (UTC).
        """
        return Watched(run_id=run_id, quiet_since=self.now(), seen_to=moved_at, next_slice=self.metadata.next_slice())

    def try_to_look(self, before: Watched) -> Watched:
        """Look once; a look that cannot be made for now is made up for by the next one, for an hour at most.

        Args:
            before: What was seen so far.

        Raises:
            StorageSwitchError: Looks cannot be made, not even by waiting.
        """
        try:
            return self.look(before)
        except TransientError as error:
            now = self.now()
            since = before.failed_since or now
            if now - since > _PATIENCE:
                raise
            return before.model_copy(update={"failed_since": since, "problem": error.problem})

    def look(self, before: Watched) -> Watched:
        """Look once. What is found begins the quiet time again.

        Args:
            before: What was seen so far.

        Raises:
            StorageSwitchError: Something cannot be looked at: this look proves nothing.
        """
        mounts = self.pods.mounts()
        errors = {mount.uid: int(mount.request_errors) for mount in mounts}
        seen_to = self.left.now() if self.left else before.seen_to
        next_slice = self.metadata.next_slice()
        writes = self._late_writes(before)
        copied = writes.found if writes else 0
        found = [
            *self._blocks(writes),
            *(f"client {name} has a session and is no mount pod" for name in self._strangers(mounts)),
            *self._elsewhere(mounts),
            *(_failed_requests(mounts, before.errors, errors) if before.looks else ()),
        ]
        now = self.now()
        lines = [f"{now:%Y-%m-%d %H:%M:%S} UTC: {line}" for line in found]
        return Watched(
            run_id=before.run_id,
            quiet_since=now if found else before.quiet_since,
            # What was found is looked at once more: a copy of it may have failed.
            seen_to=before.seen_to if copied else seen_to,
            next_slice=before.next_slice if copied else next_slice,
            errors={**before.errors, **errors},
            looks=before.looks + 1,
            copied=before.copied + copied,
            found=(*before.found, *lines)[-_KEPT:],
        )

    def _late_writes(self, before: Watched) -> LateWrites | None:
        if self.left is None:
            return None
        writes = LateWrites(
            self.metadata,
            self.setting,
            self.left,
            self.target,
            self.engine,
            self.refuse_if_held,
            before.seen_to,
            before.next_slice,
        )
        writes.look()
        return writes

    def _blocks(self, writes: LateWrites | None) -> list[str]:
        if writes is None or not writes.found:
            return []
        named = ", ".join(writes.examples)
        came = f"{counted(writes.found, 'block')} came to {writes.left.name}"
        return [f"{came} that {self.target.name} lacked, such as {named}; copied, and looked at once more"]

    def _strangers(self, mounts: Sequence[MountPod]) -> list[str]:
        """Name the clients that live and are no mount pods. A session that is not renewed is left from a killed one."""
        seen = {session.sid: session.expires for session in self._unknown()}
        if not seen:
            return []
        self.sleep(max([_BEATS_S, *(_BEATS * mount.heartbeat_s for mount in mounts)]))
        return sorted(
            session_name(session)
            for session in self._unknown()
            if session.sid in seen and session.expires != seen[session.sid]
        )

    def _unknown(self) -> list[Session]:
        paths = map(find_mount_path, running_mount_pods(self.pods.clusters))
        return unknown_sessions(self.metadata.sessions(), paths)

    def _elsewhere(self, mounts: Sequence[MountPod]) -> list[str]:
        return [
            f"mount pod {mount.name} uses {mount.bucket}" for mount in mounts if mount.bucket != self.setting.bucket
        ]


def _failed_requests(mounts: Sequence[MountPod], before: dict[str, int], now: dict[str, int]) -> list[str]:
    """Say in which clients object requests failed since the last look. A client that restarted counts from zero."""
    found = []
    for mount in mounts:
        earlier, errors = before.get(mount.uid, 0), now[mount.uid]
        if failed := errors - earlier if errors >= earlier else errors:
            found.append(f"{counted(failed, 'object request')} of mount pod {mount.name} failed: see its log")
    return found

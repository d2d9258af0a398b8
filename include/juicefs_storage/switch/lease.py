"""One run at a time on a volume: a Kubernetes Lease, taken before the first change and confirmed before every write."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from include.juicefs_storage.errors import NeedsHumanError, StorageSwitchError, TransientError
from include.juicefs_storage.ports import Lease, LeaseStore
from include.juicefs_storage.switch.findings import Finding

#: TTL of a Lease whose holder stopped renewing, in seconds. Nobody renews between two tasks of a run, and a task may
#: wait long for a worker: losing a volume in mid-move is worse than waiting an hour.
LEASE_S = 3600
_TRIES = 5
_FIRST_PAUSE_S = 0.1

log = logging.getLogger(__name__)


def lease_name(uuid: str) -> str:
    """Return the name of a volume's Lease, from its UUID: the same for every bucket, Secret or connection."""
    return f"juicefs-storage-{re.sub(r'[^a-z0-9.-]+', '-', uuid.lower())}".strip("-.")


@dataclass(frozen=True)
class VolumeLease:
    """The Lease of one volume as one run sees it.

    A write is never repeated blindly: after a conflict or a lost answer the Lease is read again and decides. The tasks
    of one run share its hold and may renew it at the same time.

    Attributes:
        leases: Where the Lease is.
        name: Its name.
        holder: This run: `<dag id>/<run id>`.
        now: The time in UTC. The clocks of two workers must agree within minutes.
        duration_s: TTL of the hold after its last renewal, in seconds.
        sleep: Waits the given seconds.
    """

    leases: LeaseStore
    name: str
    holder: str
    now: Callable[[], datetime]
    duration_s: int = LEASE_S
    sleep: Callable[[float], None] = time.sleep

    def other_holder(self) -> Lease | None:
        """Return the Lease where another run holds it and it has not expired; else None."""
        found = self.leases.lease(self.name)
        return found if found and self._is_anothers(found) else None

    def refuse_if_held(self) -> None:
        """Refuse where another run holds the Lease. Takes nothing: for a task that adds blocks and changes none.

        Raises:
            NeedsHumanError: Another run holds the volume.
        """
        if found := self.other_holder():
            raise self._held(found)

    def acquire(self) -> None:
        """Take the Lease, or renew it where this run holds it. An expired Lease is taken over.

        Raises:
            NeedsHumanError: Another run holds it.
            TransientError: It cannot be written.
        """

        def claim(found: Lease | None) -> Lease:
            now = self.now()
            if found is None:
                return Lease(self.name, self.holder, self.duration_s, acquired_at=now, renewed_at=now)
            if self._is_anothers(found):
                raise self._held(found)
            if found.holder == self.holder:
                return replace(found, renewed_at=now, duration_s=self.duration_s)
            return replace(
                found,
                holder=self.holder,
                duration_s=self.duration_s,
                acquired_at=now,
                renewed_at=now,
                transitions=found.transitions + 1,
            )

        self._write(claim)

    def renew(self) -> bool:
        """Renew the hold; False (and no change) where this run does not hold it."""

        def claim(found: Lease | None) -> Lease | None:
            mine = found is not None and found.holder == self.holder
            return replace(found, renewed_at=self.now(), duration_s=self.duration_s) if found and mine else None

        return self._write(claim)

    def confirm(self) -> None:
        """Confirm the hold right before a write, and renew it.

        Raises:
            NeedsHumanError: This run no longer holds the Lease.
            TransientError: The Lease cannot be read or written.
        """
        if self.renew():
            return
        self.refuse_if_held()
        raise NeedsHumanError(
            f"This run no longer holds Lease {self.leases.namespace}/{self.name}: it was given back or deleted.",
            state="this task stopped before its next write",
            next_step="make sure that no other run works on the volume, then clear this task with Downstream",
        )

    @contextmanager
    def kept_renewed(self, every_s: float = LEASE_S / 6) -> Iterator[None]:
        """Renew the hold every so many seconds while a long task works; do nothing where this run has none.

        A hold that is lost meanwhile is found by the next `confirm`.
        """
        done = threading.Event()

        def renew() -> None:
            while not done.wait(every_s):
                try:
                    self.renew()
                except StorageSwitchError as error:
                    log.warning("Lease %s was not renewed: %s", self.name, error.problem)

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def release(self) -> bool:
        """Give the Lease back; False (and no change) where this run does not hold it."""

        def claim(found: Lease | None) -> Lease | None:
            mine = found is not None and found.holder == self.holder
            return replace(found, holder="", renewed_at=self.now()) if found and mine else None

        return self._write(claim)

    def _is_anothers(self, lease: Lease) -> bool:
        return lease.holder not in {"", self.holder} and self.now() < _until(lease)

    def _write(self, claim: Callable[[Lease | None], Lease | None]) -> bool:
        """Read, decide, write; retry a write that failed. False where `claim` wants none."""
        problem = TransientError(
            f"Lease {self.leases.namespace}/{self.name} was written by others {_TRIES} times in a row.",
            state="this task stopped before its next write",
            next_step="the task tries again",
        )
        wanted: Lease | None = None
        for attempt in range(_TRIES):
            found = self.leases.lease(self.name)
            # The answer to the last try may have been lost on its way back.
            if wanted and found and (found.holder, found.renewed_at) == (wanted.holder, wanted.renewed_at):
                return True
            wanted = claim(found)
            if wanted is None:
                return False
            try:
                if self.leases.write_lease(wanted):
                    return True
            except TransientError as error:
                problem = error
            self.sleep(_FIRST_PAUSE_S * 2**attempt)
        raise problem

    def _held(self, lease: Lease) -> NeedsHumanError:
        return NeedsHumanError(
            _who(lease),
            state="this task changed nothing",
            next_step=f"let that run end. If it is dead and will not be cleared, wait, or: "
            f"kubectl -n {self.leases.namespace} delete lease {self.name}",
        )


def _until(lease: Lease) -> datetime:
    return lease.renewed_at + timedelta(seconds=lease.duration_s)


def _who(lease: Lease) -> str:
    return (
        f"Run {lease.holder} holds this volume since {lease.acquired_at:%Y-%m-%d %H:%M:%S} UTC, "
        f"until {_until(lease):%Y-%m-%d %H:%M:%S} UTC unless it renews its Lease."
    )


def check_lease(lease: VolumeLease) -> list[Finding]:
    """Refuse where another run holds the volume."""
    if found := lease.other_holder():
        held = lease._held(found)
        return [Finding(check="lease", level="refusal", message=held.problem, remedy=held.next_step)]
    return [Finding(check="lease", level="ok", message="no other run holds the volume")]

"""One run at a time on a volume: a Kubernetes Lease, taken before the first change and confirmed before every write."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TypeVar

from include.juicefs_storage.errors import NeedsHumanError, StorageSwitchError, TransientError
from include.juicefs_storage.ports import Lease, LeaseStore
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.volume.clusters import FIRST, errors_in, kubectl, name_in

#: TTL of a Lease whose holder stopped renewing, in seconds. Nobody renews between two tasks of a run, and a task may
#: wait long for a worker: losing a volume in mid-move is worse than waiting an hour.
LEASE_S = 3600
_TRIES = 5
_FIRST_PAUSE_S = 0.1

T = TypeVar("T")
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
        cluster: The name of the cluster that it is in.
    """

    leases: LeaseStore
    name: str
    holder: str
    now: Callable[[], datetime]
    duration_s: int = LEASE_S
    sleep: Callable[[float], None] = time.sleep
    cluster: str = FIRST

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
            next_step="let that run end. If it is dead and will not be cleared, wait, or: "
            + kubectl(self.leases.namespace, "delete lease", name_in(self.cluster, self.name)),
        )


class VolumeLeases:
    """The Leases of one volume in every cluster, as one run sees them.

    One in each: of two runs each may have the other's first cluster among its further ones.

    Args:
        leases: The Lease of each cluster by its name.
        needs_all: A cluster that does not answer stops the run. A way back needs the first one alone: another one that
            did not answer is not asked again.
    """

    def __init__(self, leases: Mapping[str, VolumeLease], *, needs_all: bool) -> None:
        self.leases = leases
        self._needs_all = needs_all
        #: The clusters that did not answer.
        self.silent: set[str] = set()

    def acquire(self) -> None:
        """Take each, see `VolumeLease.acquire`."""
        self._each(VolumeLease.acquire)

    def refuse_if_held(self) -> None:
        """Refuse where another run holds one, see `VolumeLease.refuse_if_held`."""
        self._each(VolumeLease.refuse_if_held)

    def confirm(self) -> None:
        """Confirm each, see `VolumeLease.confirm`."""
        self._each(VolumeLease.confirm)

    def renew(self) -> bool:
        """Renew each; False where this run does not hold one."""
        return all(self._each(VolumeLease.renew))

    @contextmanager
    def kept_renewed(self) -> Iterator[None]:
        """Renew each while a long task works, see `VolumeLease.kept_renewed`."""
        with ExitStack() as stack:
            for lease in self.leases.values():
                stack.enter_context(lease.kept_renewed())
            yield

    def release(self) -> None:
        """Give each back, see `VolumeLease.release`."""
        self._each(VolumeLease.release)

    def _each(self, do: Callable[[VolumeLease], T]) -> list[T]:
        results = []
        for name, lease in self.leases.items():
            if name in self.silent:
                continue
            try:
                with errors_in(name):
                    results.append(do(lease))
            except NeedsHumanError:
                raise
            except StorageSwitchError as error:
                if self._needs_all or name == FIRST:
                    raise
                log.warning("The Lease there is not looked at. %s", error.problem)
                self.silent.add(name)
        return results


def _until(lease: Lease) -> datetime:
    return lease.renewed_at + timedelta(seconds=lease.duration_s)


def _who(lease: Lease) -> str:
    return (
        f"Run {lease.holder} holds this volume since {lease.acquired_at:%Y-%m-%d %H:%M:%S} UTC, "
        f"until {_until(lease):%Y-%m-%d %H:%M:%S} UTC unless it renews its Lease."
    )


def check_leases(leases: VolumeLeases) -> list[Finding]:
    """Refuse where another run holds the volume."""
    held = []
    for name, lease in leases.leases.items():
        with errors_in(name):
            held += [lease._held(found)] if (found := lease.other_holder()) else []
    return [Finding(check="lease", level="refusal", message=each.problem, remedy=each.next_step) for each in held] or [
        Finding(check="lease", level="ok", message="no other run holds the volume")
    ]

"""Close the store that a volume has left to its old key, and rehearse that this store is switched off."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.markdown import counted
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import WriteFence
from include.juicefs_storage.records import Record

#: How long several servers of a store may take to learn of a policy, in seconds, and how often they are asked.
_LEARNS_S, _POLL_S = 20.0, 0.5
#: How often the clients are looked at while a store is denied, in seconds: within 5 s of an error nothing is denied.
_LOOK_S = 1.0
#: How a store is closed where no administrator is given.
BY_HAND = (
    "on the old store, have the old key's user lose its writes: `mc admin user disable <alias> <access key>`; or "
    "deny s3:PutObject and s3:DeleteObject on the volume's objects by a policy of that user or of the bucket; then "
    "clear this task with Downstream"
)


class Rehearsed(Record):
    """How a rehearsal of switching off went.

    Attributes:
        denied_s: For how long the old key was denied, in seconds.
        looks: How often the clients were looked at meanwhile.
        slowest_look_s: The longest time between two looks: so late an error would have been seen at most.
        errors: Object requests of clients that failed meanwhile.
    """

    denied_s: float
    looks: int
    slowest_look_s: float
    errors: int = 0

    @property
    def line(self) -> str:
        """Say how it went, in a line."""
        return (
            f"The old key was denied for {self.denied_s:.0f} s: {counted(self.looks, 'look')} at the clients, "
            f"{self.slowest_look_s:.1f} s apart at most, {counted(self.errors, 'failed request')}"
        )


class AskedStore(Bucket, Protocol):
    """A bucket that can be asked whether it takes writes."""

    def takes_writes(self, key: str) -> bool | None:
        """Ask whether the keys may write an object, and write nothing; None where that cannot be told.

        Args:
            key: Of our own; nothing is there.
        """


@dataclass(frozen=True)
class Door:
    """The store that a volume has left, as the old key sees it, and the store that it is on.

    Attributes:
        left: The store that it has left, with the old key.
        own: The store that it is on, with its clients' key.
        key: Of our own, to ask with: nothing is there, and nothing is written.
        clock: A monotonic clock.
        sleep: Waits the given seconds.
    """

    left: AskedStore
    own: AskedStore
    key: str
    clock: Callable[[], float]
    sleep: Callable[[float], None]

    def is_closed(self) -> bool:
        """Return whether the old store is seen to refuse the old key's writes."""
        try:
            return self.left.takes_writes(self.key) is False
        except StorageSwitchError:
            return False

    def close(self, fence: WriteFence | None) -> str:
        """Have the old store refuse the old key's writes from now on, and prove it.

        Args:
            fence: Refuses them; None: somebody has closed it by hand.

        Returns:
            What was proven.

        Raises:
            NeedsHumanError: It cannot be proven; or the volume's own store refuses writes since, and is open again.
        """
        if fence is None:
            if self.is_closed():
                return f"{self.left.name} refuses the old key's writes; it was closed by hand"
            raise NeedsHumanError(
                f"{self.left.name} takes the old key's writes, or that cannot be told.",
                state="nothing was changed: `fence_conn_id` names no administrator of that store",
                next_step=BY_HAND,
            )
        with_key = self.own.takes_writes(self.key)
        fence.up()
        self._require_own(fence, refused_before=with_key is False)
        deadline = self.clock() + _LEARNS_S
        while not self.is_closed():
            if self.clock() > deadline:
                raise NeedsHumanError(
                    f"{self.left.name} is not seen to refuse the old key's writes {_LEARNS_S:.0f} s after it was told.",
                    state="the fence is up, and stays up",
                    next_step="look at the policies of its user (mc admin user info); is `fence_conn_id` that store?",
                )
            self.sleep(_POLL_S)
        return f"{self.left.name} refuses the old key's writes: the fence is up, and stays up"

    def _require_own(self, fence: WriteFence, *, refused_before: bool) -> None:
        """Require that the volume's own store takes its clients' writes as before; else open the door again.

        Raises:
            NeedsHumanError: It refuses them.
        """
        try:
            refuses = self.own.takes_writes(self.key) is False and not refused_before
        except StorageSwitchError:
            fence.down()
            raise
        if refuses:
            fence.down()
            raise NeedsHumanError(
                f"{self.own.name}, which the volume is on, refused its clients' writes as soon as the old key was "
                "fenced off.",
                state="the fence is down again",
                next_step="are both one store? Then there is no door to close: give the clients a key of their own",
            )

    def rehearse_off(
        self, off: WriteFence, trouble: Callable[[], Sequence[str]], errors: Callable[[], int], *, for_s: float
    ) -> Rehearsed:
        """Deny the old key everything for some time; allow it again at the first trouble, and at the end.

        Args:
            off: Denies reads and writes.
            trouble: Names what goes wrong with the clients, a line each.
            errors: Counts their requests that failed meanwhile.
            for_s: For how long, in seconds.

        Raises:
            NeedsHumanError: Clients had trouble, or could not be looked at. The old key is allowed again.
            StorageSwitchError: The store was not told, or is not seen to deny anything. Likewise.
        """
        looks, slowest, found, denied = 0, 0.0, list[str](), False
        began = last = self.clock()
        try:
            off.up()
            while not found and (self.clock() - began < for_s or not denied):
                found = _look(trouble)
                now = self.clock()
                looks, slowest, last = looks + 1, max(slowest, now - last), now
                denied = denied or self._is_denied(since_s=now - began)
                if not found:
                    self.sleep(min(_LOOK_S, max(0.0, for_s - (now - began))) if denied else _POLL_S)
        finally:
            off.down()
        denied_s = self.clock() - began
        failed = errors()
        if found:
            raise NeedsHumanError(
                f"Switched off for {denied_s:.1f} s, the old store was missed: {'; '.join(found)}.",
                state=f"the old key is allowed again; {counted(failed, 'request')} of clients failed",
                next_step="see the logs of these mount pods: what do they still want there?",
            )
        return Rehearsed(denied_s=round(denied_s, 1), looks=looks, slowest_look_s=round(slowest, 2), errors=failed)

    def _is_denied(self, *, since_s: float) -> bool:
        """Return whether the old key cannot read, while the volume's own store can be read.

        Args:
            since_s: How long ago the store was told, in seconds.

        Raises:
            TransientError: The old store goes on to serve the old key.
            StorageSwitchError: The volume's own store does not serve its clients' key.
        """
        try:
            self.left.head(self.key)
        except PermanentError:
            self.own.head(self.key)
            return True
        if since_s > _LEARNS_S:
            raise TransientError(
                f"{self.left.name} serves the old key {_LEARNS_S:.0f} s after it was told not to.",
                state="the old key is allowed again",
                next_step="look at the policies of its user (mc admin user info); is `fence_conn_id` that store?",
            )
        return False


def _look(trouble: Callable[[], Sequence[str]]) -> list[str]:
    try:
        return list(trouble())
    except StorageSwitchError as error:
        return [f"the clients could not be looked at: {error.problem}"]

"""The fence on the clients' writes to the old store: when it must come down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from include.juicefs_storage.errors import NeedsHumanError, StorageSwitchError
from include.juicefs_storage.ports import WriteFence

#: How long the old store may refuse the writes of a client that has not moved, in seconds. A client gives up on a flush
#: after 300 s, and its writer gets an error. The second limit holds where the clients cannot be asked.
FENCED_FOR_S, FENCED_BLINDLY_S = 200, 250


@dataclass
class FenceWatch:
    """Take the fence down before a client that has not moved gives up on its writes.

    Attributes:
        fence: The fence that was put up.
        clients_behind: Lists the clients that still use the old store.
    """

    fence: WriteFence
    clients_behind: Callable[[], Sequence[str]]
    _all_moved: bool = field(init=False, default=False)

    def check(self, fenced_s: float) -> None:
        """Take the fence down where its time is over and clients are behind.

        Args:
            fenced_s: How long the fence has been up, in seconds.

        Raises:
            NeedsHumanError: Clients are behind, or they cannot be asked.
        """
        if self._all_moved or fenced_s < FENCED_FOR_S:
            return
        try:
            behind = self.clients_behind()
        except StorageSwitchError as error:
            if fenced_s < FENCED_BLINDLY_S:
                return
            behind = [error.problem]
        self._all_moved = not behind
        if behind:
            self.fence.down()
            raise NeedsHumanError(
                f"Clients have not moved {fenced_s:.0f} s after the old store began to refuse their writes: "
                f"{', '.join(behind)}.",
                state="the write fence is down again",
                next_step="the run rolls back; look at the logs of these mount pods",
            )

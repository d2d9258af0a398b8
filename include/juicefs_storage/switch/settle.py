"""Guard the setting and the Secrets while pods with other values may still start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from include.juicefs_storage.errors import NeedsHumanError, StillAwayError, TransientError
from include.juicefs_storage.ports import Pod
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.write_setting import WriteSetting

#: How long polls may fail one after the other, in seconds.
_PATIENCE_S = 60
#: How much longer than the quiet time the guard may take, in seconds.
_LIMIT_S = 300


@dataclass(frozen=True)
class Settled:
    """What happened while the setting was guarded.

    Attributes:
        repaired: What was put right, one line each; usually empty.
        wrote: Mount pods that started meanwhile with other values: they may have written the setting.
        waiting: Mount pods with other values that have not started yet: they may still write it.
    """

    repaired: tuple[str, ...] = ()
    wrote: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


def guard_setting(
    step: WriteSetting,
    secrets: PatchSecrets,
    stale_pods: Callable[[], Sequence[Pod]],
    *,
    for_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    every_s: float = 1,
) -> Settled:
    """Guard the setting and the Secrets against a mount pod that starts with other values and writes them back.

    A pod that was made before the Secret was patched may start much later. It is waited for, within limits.

    Args:
        step: The step whose result is guarded. It is applied again where the row moved.
        secrets: The step whose Secrets are guarded likewise.
        stale_pods: Lists the mount pods that appeared since the plan and whose command names other values.
        for_s: How long nothing must have moved, in seconds.
        clock: A monotonic clock.
        sleep: Waits the given seconds.
        every_s: Seconds between two polls.

    Raises:
        TransientError: Polls failed for a minute.
        StillAwayError: The retry budget for the metadata database is exhausted.
        NeedsHumanError: Something keeps writing other values.
    """
    started = clock()
    guard = _Guard(step, secrets, stale_pods, clock)
    while True:
        guard.poll()
        late = clock() - started >= for_s + _LIMIT_S
        if guard.quiet_for(for_s) and (late or not guard.waiting):
            return Settled(tuple(guard.repaired), tuple(guard.wrote), guard.waiting)
        if late and guard.repaired:
            raise NeedsHumanError(
                f"Something keeps writing other values: {len(guard.repaired)} times in {clock() - started:.0f} s.",
                state=f"the setting named {step.target.bucket} at the last poll",
                next_step=f"stop what writes them; mount pods with other values: {', '.join(guard.wrote) or 'none'}",
            )
        sleep(every_s)


@dataclass
class _Guard:
    """What the polls have seen so far."""

    step: WriteSetting
    secrets: PatchSecrets
    stale_pods: Callable[[], Sequence[Pod]]
    clock: Callable[[], float]
    repaired: list[str] = field(default_factory=list)
    wrote: dict[str, None] = field(default_factory=dict)
    waiting: tuple[str, ...] = ()
    _failing_since: float | None = None
    _quiet_since: float = field(init=False)

    def __post_init__(self) -> None:
        self._quiet_since = self.clock()

    def poll(self) -> None:
        """Put right what moved. Retry a transient failure at the next poll, for a minute at most."""
        self.waiting = ()
        try:
            # The pods first: what a pod that is ready by now has written can be seen then.
            pods = self.stale_pods()
            moved = self._put_right()
        except StillAwayError:
            raise
        except TransientError:
            if self._failing_for_s() >= _PATIENCE_S:
                raise
            return
        self._failing_since = None
        self.waiting = tuple(pod.name for pod in pods if not pod.ready)
        if moved:
            self.repaired += moved
            self.wrote |= dict.fromkeys(pod.name for pod in pods)
            self._quiet_since = self.clock()

    def quiet_for(self, for_s: float) -> bool:
        """Return whether nothing has moved for so many seconds, and all of them could be seen."""
        return self._failing_since is None and self.clock() - self._quiet_since >= for_s

    def _put_right(self) -> list[str]:
        moved = [f"the setting no longer named {self.step.target.bucket}"] if self.step.apply().written else []
        return moved + [f"Secret {name} held other values" for name in self.secrets.apply()]

    def _failing_for_s(self) -> float:
        """Return since when polls fail, in seconds. The quiet time starts again from here."""
        self._quiet_since = self.clock()
        self._failing_since = self._quiet_since if self._failing_since is None else self._failing_since
        return self._quiet_since - self._failing_since

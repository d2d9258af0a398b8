"""Guard the setting and the Secrets while pods with old values may still start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from include.juicefs_storage.errors import (
    NeedsHumanError,
    StillAwayError,
    TransientError,
)
from include.juicefs_storage.ports import Pod
from include.juicefs_storage.switch.patch_secret import PatchSecrets
from include.juicefs_storage.switch.write_setting import WriteSetting

_SETTLE_PATIENCE_S, _SETTLE_LIMIT_S = 60, 300


@dataclass(frozen=True)
class Settled:
    """What happened while the setting was guarded.

    Attributes:
        repaired: What was put right, one line each; usually empty.
        wrote: Mount pods that started meanwhile with other values: they may have written the setting.
        waiting: Those of them that have not started yet: they may still do so.
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
    """Guard the setting and the Secrets against a mount pod that starts with old values and writes them back.

    A pod that was made before the Secret was patched may start much later: it is waited for, within limits.

    Args:
        step: The step whose result is guarded; it is applied again where the row moved.
        secrets: Likewise, for the Secrets.
        stale_pods: The mount pods that appeared since the plan and whose command names other values.
        for_s: How long nothing must have moved, in seconds.
        clock: A monotonic clock.
        sleep: Waits the given seconds.
        every_s: Seconds between two looks.

    Raises:
        TransientError: Looking failed for a minute on end.
        StillAwayError: The metadata database was waited for in vain.
    """
    start = quiet_since = clock()
    failing_since: float | None = None
    repaired: list[str] = []
    wrote: dict[str, None] = {}
    while True:
        pods: Sequence[Pod] = ()
        try:
            # First the pods: what one that is ready has written can be seen then.
            pods = stale_pods()
            moved = [f"the setting did not name {step.target.bucket} any more"] if step.apply() else []
            moved += [f"Secret {name} held other values" for name in secrets.apply()]
            failing_since = None
        except StillAwayError:
            raise
        except TransientError:
            failing_since = clock() if failing_since is None else failing_since
            if clock() - failing_since >= _SETTLE_PATIENCE_S:
                raise
            moved = []
        if moved:
            repaired += moved
            wrote |= dict.fromkeys(pod.name for pod in pods)
        if moved or failing_since is not None:
            quiet_since = clock()
        waiting = tuple(pod.name for pod in pods if not pod.ready)
        late = clock() - start >= for_s + _SETTLE_LIMIT_S
        if clock() - quiet_since >= for_s and failing_since is None and (late or not waiting):
            return Settled(tuple(repaired), tuple(wrote), waiting)
        if late and repaired:
            raise NeedsHumanError(
                f"Something goes on writing other values: {len(repaired)} times in {clock() - start:.0f} s.",
                state="the setting names the new store at this moment",
                next_step=f"stop what writes them; mount pods with old values: {', '.join(wrote) or 'none'}",
            )
        sleep(every_s)

"""Waiting for the rollouts of the CSI components."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from airflow.sdk import PokeReturnValue, get_current_context

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.restart_csi import RestartCsi
from include.juicefs_storage.tasks.context import pull
from include.juicefs_storage.volume.clusters import Clusters


def rollouts_done(restarted: Sequence[Clusters], started: str, timeout_s: float) -> PokeReturnValue:
    """Poll the rollouts of some installations of the driver once.

    A task that is cleared has the whole time again: what held the rollout up may just have been put right.

    Args:
        restarted: The clusters of the installations.
        started: The task that restarted them.
        timeout_s: How long they may take, in seconds.

    Raises:
        PermanentError: They take too long.
    """
    waiting = [line for clusters in restarted for line in RestartCsi(clusters, "").verify()]
    timing = pull(started, "timing")
    context, now = get_current_context(), datetime.now(UTC)
    looking_since = context["ti"].get_first_reschedule_date(context) or now
    since = max(datetime.fromisoformat(timing["applied_at"]), looking_since) if timing else now
    waited_s = (now - since).total_seconds()
    if waiting and waited_s > timeout_s:
        namespaces = ", ".join(sorted({clusters.namespace for clusters in restarted}))
        raise PermanentError(
            f"Rollouts not done after {waited_s:.0f} s: {'; '.join(waiting)}.",
            state="the existing mounts keep working",
            next_step=f"kubectl -n {namespaces} get pods; then clear this task with Downstream",
        )
    return PokeReturnValue(is_done=not waiting, xcom_value=None if waiting else {"waited_s": round(waited_s, 1)})

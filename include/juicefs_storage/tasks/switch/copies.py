"""Copies between the two locations: at once, while the clients move, and after the last late commit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.sdk import PokeReturnValue
from airflow.sdk.exceptions import AirflowRescheduleException

from include.juicefs_storage.errors import NeedsHumanError, StorageSwitchError
from include.juicefs_storage.names import NEEDED_BLOCKS
from include.juicefs_storage.objects.progress import Status
from include.juicefs_storage.switch.catch_up import CatchUp
from include.juicefs_storage.switch.follow_writes import Follower
from include.juicefs_storage.switch.late_writes import LateWrites
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.tasks.context import ENDED, log, pull, push, task_states
from include.juicefs_storage.tasks.progress import Publisher
from include.juicefs_storage.tasks.switch import proofs
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.slice_batches import SliceBatches

#: Clients wait for these copies: what they wrote elsewhere in some seconds is copied in minutes, or something is wrong.
CATCH_UP_TIMEOUT_S = 600
#: The XCom that a follower pushes when it has begun, and how long its start may take, in seconds.
_FOLLOWING = "following"
_START_S, _START_POLL_S = 60, 0.3
#: With the KubernetesExecutor a follower is a pod, which may have to wait for a node and to pull its image, in seconds.
_POD_START_S = 900
#: The XCom of a copy that says which slices it has compared.
_COMPARED = "compared"
#: After how many seconds without progress of the run a follower frees its worker slot: the next task may wait for it.
_GIVE_WAY_S = 300
#: Damaged blocks that are named in the evidence; the log names all of them.
_EXAMPLES = 100
#: Between two looks at the store that the clients left, in seconds, where the first has found something.
_LATE_PAUSE_S = 60


def copy(
    run: SwitchRun, source: Location, target: Location, *, timeout_s: float, before_follower: bool = False
) -> dict[str, Any]:
    """Copy the blocks that only the source has, until the metadata misses none on the target.

    Where both are one store nothing is copied.

    Args:
        run: Renews its Lease meanwhile.
        source: Where the blocks are.
        target: Where they must be. Nothing is overwritten or deleted there.
        timeout_s: The limit of one pass, in seconds.
        before_follower: Record which slices were compared, for the follower that comes next.
    """
    if run.change.one_store:
        return {"copied": 0, "copied_bytes": 0, "still_missing": 0}
    # What the plan counted is what the first copy finds, more or less.
    expected = run.carried_out.missing_objects or 0 if before_follower else 0
    status = Status("Copied blocks", expected, publish=Publisher(), doing="comparing listings")
    engine = run.engine(source, target, status.flow)
    with run.lease.kept_renewed(), closing(engine), status.told():
        work = CatchUp(
            run.runtime.metadata,
            run.before,
            source.store,
            target.store,
            engine,
            # A task that only adds blocks may be cleared alone, long after the run gave the Lease back.
            run.lease.refuse_if_held,
            time.monotonic,
            timeout_s,
            run.lost_before,
            remember=before_follower,
            status=status,
        )
        difference = work.run()
    push(NEEDED_BLOCKS, difference.expected)
    if work.compared:
        push(_COMPARED, work.compared.to_text())
    copied = {"copied": work.copied, "copied_bytes": work.copied_bytes, "still_missing": difference.missing}
    return {**copied, "damaged": work.damaged[:_EXAMPLES]} if work.damaged else copied


class _MovingTasks:
    """The tasks that move the clients while a follower copies. They end with the last of them."""

    def __init__(self, task_ids: Sequence[str]) -> None:
        self._task_ids = task_ids
        self._states: dict[str, str] = {}
        self._moved_at = time.monotonic()

    def ended(self) -> bool:
        """Poll their states. True as well where no task of the run has made progress for minutes."""
        before, self._states = self._states, task_states(*self._task_ids)
        if self._states != before or "running" in self._states.values():
            self._moved_at = time.monotonic()
        if stuck := time.monotonic() - self._moved_at > _GIVE_WAY_S:
            log.warning("No other task of this run made progress for %d s: no worker slot is free?", _GIVE_WAY_S)
        return stuck or self._states[self._task_ids[-1]] in ENDED

    def failed(self) -> bool:
        """Return whether the last of them has not succeeded, by the latest poll."""
        return self._states[self._task_ids[-1]] != "success"


def follow(
    run: SwitchRun,
    source: Location,
    target: Location,
    *,
    moving: Sequence[str],
    compared_by: str,
    on_poll: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Copy what clients still write to the location that they leave, within two seconds, while other tasks move them.

    A failing store or database is no failure here: the next poll tries again, and the copy after the clients have
    moved must succeed.

    Args:
        run: Renews its Lease meanwhile, and confirms it before each copy.
        source: The location that the clients leave.
        target: Where they go.
        moving: The tasks that move them; the follower ends with the last of these.
        compared_by: The copy before: what was committed since it compared is copied too.
        on_poll: Called before each poll.

    Raises:
        NeedsHumanError: The run must no longer write.
    """
    if run.change.one_store:
        return {"copied": 0}
    tasks = _MovingTasks(moving)
    status = Status("Followed blocks", publish=Publisher(), doing=f"following until {moving[-1]} has ended")

    def ended() -> bool:
        on_poll()
        status.flow.because = follower.state
        return tasks.ended()

    engine = run.engine(source, target, status.flow, fail_fast=True)
    with run.lease.kept_renewed(), closing(engine), status.told():
        follower = Follower(
            run.runtime.metadata,
            run.before,
            source.store,
            target.store,
            engine.copy,
            run.confirm_lease,
            time.monotonic,
            compared=SliceBatches.from_text(compared) if (compared := pull(compared_by, _COMPARED)) else None,
        )
        follower.follow(ended, lambda: push(_FOLLOWING, True), time.sleep, cancelled=tasks.failed)
    return {
        "copied": follower.copied,
        "copied_bytes": follower.copied_bytes,
        "slowest_s": round(follower.slowest_s, 1),
        "waiting": follower.waiting,
        "problem": follower.problem,
    }


def await_follower(task_id: str, *, required: bool = False) -> bool:
    """Wait until a follower is at work, for as long as its start may take.

    Args:
        task_id: The follower.
        required: Refuse to go on where its pod does not start. Workers that stay have slots instead, and one that has
            none free may be held by the caller itself: there the run goes on.

    Returns:
        False where it is not: no worker slot is free, or it has ended, as after a clear that left it out.

    Raises:
        NeedsHumanError: It is required, and its pod has not started.
    """
    # What Airflow sets in the pods of its KubernetesExecutor, whatever their configuration says.
    in_pod = required and bool(os.environ.get("AIRFLOW_IS_K8S_EXECUTOR_POD"))
    limit_s = _POD_START_S if in_pod else _START_S
    deadline = time.monotonic() + limit_s
    while (state := task_states(task_id)[task_id]) not in ENDED and time.monotonic() < deadline:
        if state == "running" and pull(task_id, _FOLLOWING):
            return True
        time.sleep(_START_POLL_S)
    if in_pod and state not in ENDED:
        raise NeedsHumanError(
            f"Task {task_id} does not follow yet (state {state}): its pod has not started within {limit_s} s, and what "
            "clients write while they move would not be copied at once.",
            state="the setting was not written",
            next_step="find out why the pod does not start (kubectl describe pod), then clear copy_ahead with "
            "Downstream",
        )
    log.warning(
        "Task %s does not follow (%s): what clients write meanwhile is copied after they have moved.", task_id, state
    )
    return False


def catch_up_late(
    run: SwitchRun, source: Location, target: Location, *, moved_by: Sequence[str], copies: bool = True
) -> PokeReturnValue:
    """Copy and prove once more when slices can no longer be committed late.

    Args:
        run: Its `late_commit_s` is waited for.
        source: The location that the clients left.
        target: Where they are.
        moved_by: The tasks that proved the clients there; the time runs from the last of them. Where none did, as on a
            way back without the metadata, there is nothing to wait for.
        copies: Copy what is missing; else only look.

    Raises:
        AirflowRescheduleException: It is too early; the worker slot is free until then.
        NeedsHumanError: A block is missing.
    """
    late_commit_s = run.runtime.params.late_commit_s
    if run.change.one_store or not late_commit_s:
        return PokeReturnValue(is_done=True, xcom_value={"copied": 0, "waited_s": 0, "one_store": run.change.one_store})
    times = [datetime.fromisoformat(timing["applied_at"]) for task in moved_by if (timing := pull(task, "timing"))]
    due = max(times) + timedelta(seconds=late_commit_s) if times else None
    if due and datetime.now(UTC) < due:
        log.info(
            "Waiting until %s UTC for slices that are committed late: %g s after the last client (late_commit_s).",
            f"{due:%H:%M:%S}", late_commit_s,
        )  # fmt: skip
        run.lease.renew()
        raise AirflowRescheduleException(due)  # type: ignore[no-untyped-call]
    # Only where something is missing: clients delete on the target alone by now, and a copy would bring that back.
    copied, difference = {"copied": 0}, proofs.find_missing(run, target)
    if copies and difference.missing:
        copied = copy(run, source, target, timeout_s=CATCH_UP_TIMEOUT_S)
        difference = proofs.find_missing(run, target)
    late = _copy_late_writes(run, source, target, moved_by) if copies else {}
    if late.get("late_writes"):
        difference = proofs.find_missing(run, target)
    result = {"waited_s": late_commit_s, **copied, **late, **proofs.require_blocks(run, target, difference)}
    return PokeReturnValue(is_done=True, xcom_value=result)


def _copy_late_writes(run: SwitchRun, source: Location, target: Location, moved_by: Sequence[str]) -> dict[str, Any]:
    """Look on the location that the clients left for what was written there since, and copy it.

    A location that cannot be read is no failure: nobody can write there either, or the report names it.

    Args:
        run: Renews its Lease meanwhile.
        source: The location that the clients left.
        target: Where they are.
        moved_by: The tasks that proved the clients there.

    Raises:
        NeedsHumanError: Something keeps writing there.
    """
    # A store that does not serve cannot be looked at, nor written to.
    left = [found for task in moved_by if isinstance(found := pull(task), dict) and "next_slice" in found]
    if not left:
        return {"unseen": "when the last client left that store was not recorded"}
    last = max(left, key=lambda found: str(found["left_at"]))
    with run.lease.kept_renewed(), closing(run.engine(source, target)) as engine:
        work = LateWrites(
            run.runtime.metadata,
            run.before,
            source.store,
            target.store,
            engine,
            run.lease.refuse_if_held,
            datetime.fromisoformat(last["left_at"]),
            last["next_slice"],
            pause_s=min(_LATE_PAUSE_S, run.runtime.params.late_commit_s),
        )
        try:
            work.run(time.sleep)
        except NeedsHumanError:
            raise
        except StorageSwitchError as error:
            return {"unseen": error.problem}
        given_out = max(0, run.runtime.metadata.next_slice() - int(last["next_slice"]))
    return {"late_writes": work.found, "late_examples": work.examples, "slice_ids": given_out}

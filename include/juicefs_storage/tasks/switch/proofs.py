"""Proofs on one of the two locations: every client uses it, and no block is missing there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from include.juicefs_storage.errors import NeedsHumanError, PermanentError, StorageSwitchError, TransientError
from include.juicefs_storage.names import ESTIMATE, NEEDED_BLOCKS
from include.juicefs_storage.objects.progress import Status
from include.juicefs_storage.ports import Session
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.prove_blocks import require_all_blocks
from include.juicefs_storage.switch.prove_clients import prove_every_client
from include.juicefs_storage.switch.report import WRITTEN_AT
from include.juicefs_storage.switch.wait_for_quiet import wait_for_quiet
from include.juicefs_storage.tasks.context import log, pull, push
from include.juicefs_storage.tasks.progress import Publisher
from include.juicefs_storage.tasks.switch import admission
from include.juicefs_storage.tasks.switch.client_progress import ClientPublisher
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.canary import Move
from include.juicefs_storage.volume.difference import Difference, missing_blocks
from include.juicefs_storage.volume.mount_pods import find_mount_path, request_errors, running_mount_pods
from include.juicefs_storage.volume.users import accepted_clients, is_accepted, unknown_sessions

_FAILED_BEFORE = "failed_before"
#: Tasks that compare a store with the metadata before the blocks are proven, the latest first.
_COMPARING = ("copy_back", "catch_up", "check_consistency")
#: After so many seconds a client with JuiceFS' own heartbeat has read a new setting: 12 s, give or take 5 %.
_HEARTBEAT_S = 14
#: How long the old key is refused for the proof, and for how long each write then may take, in seconds.
_DENIED_FOR_S = 5
_REFUSAL_POLL_S = 0.2


def prove_clients(run: SwitchRun, location: Location) -> dict[str, Any]:
    """Prove every mount pod on a location. Where some are stuck the setting is written once more, in other bytes.

    Returns:
        The clients; and what tells later writes on the other location: its clock, and the next slice id.

    Raises:
        PermanentError: Some client did not follow in time.
    """
    forward = location is run.new
    step, left = (run.write_setting, run.old) if forward else (run.write_setting.back, run.new)

    def rewrite() -> None:
        try:
            run.lease.confirm()
        except NeedsHumanError:
            # A run that ended, and is cleared from this task on, has given its Lease back.
            (admission.forward if forward else admission.back)()
        step.rewrite()

    with run.lease.kept_renewed():
        proven = prove_every_client(
            run.runtime.volume_pods(run.before),
            _move(run, location, left),
            run.canary,
            timeout_s=run.runtime.params.client_timeout_s,
            clock=time.monotonic,
            sleep=time.sleep,
            unstick=rewrite,
            # A client that is no mount pod does not stop a way back: it has been on the old store all along.
            sessions=(lambda: other_sessions(run)) if run.forward else tuple,
            on_look=ClientPublisher("new" if forward else "old"),
        )
        accepted = _give_a_heartbeat(run, forward=forward)
    return {"clients": [proof.model_dump() for proof in proven], "accepted": accepted, **_left_behind(run, left)}


def _give_a_heartbeat(run: SwitchRun, *, forward: bool) -> list[str]:
    """Give clients that are accepted as not proven the time to follow, while their writes are still copied at once.

    Returns:
        Their names.
    """
    mounted = map(find_mount_path, running_mount_pods(run.runtime.clusters))
    others = unknown_sessions(run.runtime.metadata.sessions(), mounted)
    others = [session for session in others if run.canary not in session.mount_point]
    if accepted := accepted_clients(others, run.runtime.params.accept_clients):
        since_s = (datetime.now(UTC) - _written_at(run, forward=forward)).total_seconds()
        time.sleep(max(0.0, _HEARTBEAT_S - since_s))
    return accepted


def deny_old_key(run: SwitchRun) -> dict[str, Any]:
    """Prove that no client uses the old key: have the store refuse it, write through every mount, and allow it again.

    Nothing is done unless only the keys change and the run has a write fence.

    Raises:
        PermanentError: Some client cannot write while the old key is refused. It is allowed again.
        TransientError: The store goes on to take the old key.
    """
    fence = run.write_fence
    if run.change.kind != "keys" or not fence:
        return {}
    run.confirm_lease()
    try:
        fence.up()
        _await_refusal(run)
        denied = prove_every_client(
            run.runtime.volume_pods(run.before),
            # It refuses writes alone: a client that is mounted read-only is proven by its log.
            Move(
                run.new.config,
                run.new.store,
                since=_written_at(run, forward=True),
                key_refused=True,
                refuses_reads=False,
            ),
            run.canary,
            timeout_s=_DENIED_FOR_S,
            clock=time.monotonic,
            sleep=time.sleep,
            canary_timeout_s=_DENIED_FOR_S,
        )
    finally:
        fence.down()
    return {"denied": sum(proof.by == "key" for proof in denied)}


def _await_refusal(run: SwitchRun) -> None:
    """Poll until the store refuses the old key: several servers learn of a policy one after the other."""
    store, deadline = run.runtime.clients_store(run.old.config), time.monotonic() + _DENIED_FOR_S
    key = f"{run.before.name}/{run.canary}-denied"
    while time.monotonic() < deadline:
        try:
            store.probe(key)
        except PermanentError:
            run.new.store.probe(key)  # removes what was written in between; the new key is not refused
            return
        time.sleep(_REFUSAL_POLL_S)
    raise TransientError(
        f"The store takes the old access key {_DENIED_FOR_S} s after it was told to refuse it.",
        state="the old key is allowed again",
        next_step="look at the policies of its user (mc admin user info), or leave `fence_conn_id` empty",
    )


def _move(run: SwitchRun, location: Location, left: Location) -> Move:
    """Between which storages the clients move, and what a block of theirs proves."""
    forward, one_store = location is run.new, run.change.one_store
    # A store that does not serve has nothing, and each look at it would take long.
    served = not (forward and run.change.kind == "moved")
    return Move(
        location.config,
        location.store,
        left.store if served else None,
        _written_at(run, forward=forward),
        returning=not forward,
        one_store=one_store,
        key_refused=one_store and _refuses_key(run, left),
    )


def _refuses_key(run: SwitchRun, left: Location) -> bool:
    """Whether the store does not know the keys that the clients leave. One that does not answer tells nothing."""
    try:
        return not run.runtime.clients_store(left.config).knows_keys()
    except StorageSwitchError as error:
        log.warning("Whether the store still takes the other keys is not known: %s", error.problem)
        return False


def _written_at(run: SwitchRun, *, forward: bool) -> datetime:
    """Return when the setting was written, as far as that is known; else when the run's backup was made."""
    task = "write_setting" if forward else "restore_setting"
    if timing := pull(task, "timing"):
        return datetime.fromisoformat((pull(task) or {}).get(WRITTEN_AT) or timing["began_at"])
    return run.backup.created_at


def written_now() -> dict[str, str]:
    """Record that the setting has just been written."""
    return {WRITTEN_AT: datetime.now(UTC).isoformat()}


def _left_behind(run: SwitchRun, left: Location) -> dict[str, Any]:
    """Return from when on, by a location's clock, nobody has reason to write there, and the ids given out by then."""
    found: dict[str, Any] = {}
    if not run.change.copies:
        return found
    try:
        found["left_at"] = left.store.now().isoformat()
        found["next_slice"] = run.runtime.metadata.next_slice()
    except StorageSwitchError as error:
        log.warning("Late writes to %s cannot be told from earlier ones: %s", left.store.name, error.problem)
    return found


def other_sessions(run: SwitchRun) -> Sequence[Session]:
    """List the clients to be proven, without those that are accepted as not proven.

    The fresh mount that a killed task of this run may have left is none.
    """
    accepted = run.runtime.params.accept_clients
    return [
        session
        for session in run.runtime.metadata.sessions()
        if run.canary not in session.mount_point and not is_accepted(session, accepted)
    ]


def prove_blocks(run: SwitchRun, location: Location) -> dict[str, Any]:
    """Prove by the metadata that no block is missing on a location.

    Raises:
        NeedsHumanError: Blocks are missing or differ.
    """
    return require_blocks(run, location, find_missing(run, location))


def find_missing(run: SwitchRun, location: Location) -> Difference:
    """Compare a location with the metadata."""
    # As the latest comparison before counted them.
    expected = next(filter(None, (pull(task_id, NEEDED_BLOCKS) for task_id in _COMPARING)), 0)
    status = Status(
        "Blocks that files refer to", expected, publish=Publisher(), doing=f"looking for them on {location.store.name}"
    )
    with run.lease.kept_renewed(), status.told():
        found = missing_blocks(run.runtime.metadata, run.before, location.store, run.lost_before, told=status.count)
    ended = status.progress()
    if ended.estimated_s is not None:
        push(ESTIMATE, [ended.estimated_s, ended.elapsed_s])
    return found


def require_blocks(run: SwitchRun, location: Location, difference: Difference) -> dict[str, Any]:
    """Refuse a difference in which blocks are missing.

    Args:
        run: Its metadata name the files.
        location: What was compared.
        difference: What was found.

    Raises:
        NeedsHumanError: Blocks are missing or differ.
    """
    back = location is run.old and not run.change.one_store
    copied_by = "copy_back_again" if back else "catch_up" if run.catches_up else ""
    require_all_blocks(difference, location.config.bucket, run.runtime.metadata, copied_by=copied_by)
    return {"blocks": difference.present, "lost_before": difference.lost}


def await_quiet(run: SwitchRun) -> dict[str, Any]:
    """Wait until no client uploads, for `wait_for_quiet_s` at most; nothing where that is 0."""
    if not (timeout_s := run.runtime.params.wait_for_quiet_s):
        return {}
    with run.lease.kept_renewed():
        found = wait_for_quiet(
            run.runtime.volume_pods(run.before), timeout_s=timeout_s, clock=time.monotonic, sleep=time.sleep
        )
    return {"quiet": found.model_dump()}


def count_failed_requests(run: SwitchRun) -> None:
    """Record how many object requests have failed in each client, right before the clients begin to move."""
    try:
        push(_FAILED_BEFORE, request_errors(run.runtime.clusters, run.carried_out.mount_pods))
    except StorageSwitchError as error:
        log.warning("Failed requests are counted from the plan on: %s", error.problem)


def failed_requests_since(run: SwitchRun, task_id: str) -> dict[str, Any]:
    """Count the object requests that failed in the clients since a task counted them; else since the plan was made."""
    mounts = run.carried_out.mount_pods
    before = pull(task_id, _FAILED_BEFORE) or {mount.name: int(mount.request_errors) for mount in mounts}
    failed = {
        name: errors - before.get(name, 0) for name, errors in request_errors(run.runtime.clusters, mounts).items()
    }
    return {
        "failed_requests": sum(failed.values()),
        "failed_in": {name: errors for name, errors in sorted(failed.items()) if errors},
    }

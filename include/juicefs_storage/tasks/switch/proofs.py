"""Proofs on one of the two locations: every client uses it, and no block is missing there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.ports import Session
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.switch.prove_blocks import require_all_blocks
from include.juicefs_storage.switch.prove_clients import prove_every_client
from include.juicefs_storage.tasks.context import log, pull, push
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.canary import Move
from include.juicefs_storage.volume.difference import Difference, missing_blocks
from include.juicefs_storage.volume.mount_pods import request_errors

_FAILED_BEFORE = "failed_before"


def prove_clients(run: SwitchRun, location: Location) -> dict[str, Any]:
    """Prove every mount pod on a location. Where some are stuck the setting is written once more, in other bytes.

    Returns:
        The clients; and what tells later writes on the other location: its clock, and the next slice id.

    Raises:
        PermanentError: Some client did not follow in time.
    """
    forward = location is run.new
    step, left = (run.write_setting, run.old) if forward else (run.write_setting.back, run.new)
    with run.lease.kept_renewed():
        proven = prove_every_client(
            run.runtime.volume_pods(run.before),
            Move(location.config, location.store, left.store, _written_at(run, forward=forward), returning=not forward),
            run.canary,
            timeout_s=run.runtime.params.client_timeout_s,
            clock=time.monotonic,
            sleep=time.sleep,
            unstick=step.rewrite,
            # A client that is no mount pod does not stop a way back: it has been on the old store all along.
            sessions=(lambda: other_sessions(run)) if run.forward else tuple,
        )
    return {"clients": [proof.model_dump() for proof in proven], **_left_behind(run, left)}


def _written_at(run: SwitchRun, *, forward: bool) -> datetime:
    """Return when the setting was written, as far as that is known; else when the run's backup was made."""
    timing = pull("write_setting" if forward else "restore_setting", "timing")
    return datetime.fromisoformat(timing["began_at"]) if timing else run.backup.created_at


def _left_behind(run: SwitchRun, left: Location) -> dict[str, Any]:
    """Return from when on, by a location's clock, nobody has reason to write there, and the ids given out by then."""
    found: dict[str, Any] = {}
    try:
        found["left_at"] = left.store.now().isoformat()
        found["next_slice"] = run.runtime.metadata.next_slice()
    except StorageSwitchError as error:
        log.warning("Late writes to %s cannot be told from earlier ones: %s", left.store.name, error.problem)
    return found


def other_sessions(run: SwitchRun) -> Sequence[Session]:
    """List the volume's clients, without the fresh mount that a killed task of this run may have left."""
    return [session for session in run.runtime.metadata.sessions() if run.canary not in session.mount_point]


def prove_blocks(run: SwitchRun, location: Location) -> dict[str, Any]:
    """Prove by the metadata that no block is missing on a location.

    Raises:
        NeedsHumanError: Blocks are missing or differ.
    """
    return require_blocks(run, location, find_missing(run, location))


def find_missing(run: SwitchRun, location: Location) -> Difference:
    """Compare a location with the metadata."""
    with run.lease.kept_renewed():
        return missing_blocks(run.runtime.metadata, run.before, location.store, run.lost_before)


def require_blocks(run: SwitchRun, location: Location, difference: Difference) -> dict[str, Any]:
    """Refuse a difference in which blocks are missing.

    Args:
        run: Its metadata name the files.
        location: What was compared.
        difference: What was found.

    Raises:
        NeedsHumanError: Blocks are missing or differ.
    """
    require_all_blocks(difference, location.config.bucket, run.runtime.metadata)
    return {"blocks": difference.present, "lost_before": difference.lost}


def count_failed_requests(run: SwitchRun) -> None:
    """Record how many object requests have failed in each client, right before the clients begin to move."""
    try:
        push(_FAILED_BEFORE, request_errors(run.runtime.cluster, run.carried_out.mount_pods))
    except StorageSwitchError as error:
        log.warning("Failed requests are counted from the plan on: %s", error.problem)


def failed_requests_since(run: SwitchRun, task_id: str) -> dict[str, Any]:
    """Count the object requests that failed in the clients since a task counted them; else since the plan was made."""
    mounts = run.carried_out.mount_pods
    before = pull(task_id, _FAILED_BEFORE) or {mount.name: int(mount.request_errors) for mount in mounts}
    failed = {
        name: errors - before.get(name, 0) for name, errors in request_errors(run.runtime.cluster, mounts).items()
    }
    return {
        "failed_requests": sum(failed.values()),
        "failed_in": {name: errors for name, errors in sorted(failed.items()) if errors},
    }

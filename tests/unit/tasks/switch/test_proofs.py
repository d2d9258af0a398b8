"""Who is a stranger to a run, and how far the proof of the blocks is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace
from typing import cast

import pytest

from include.juicefs_storage.objects.progress import Progress, Status
from include.juicefs_storage.ports import Session
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch import proofs
from include.juicefs_storage.tasks.switch.proofs import other_sessions
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.canary import canary_name
from include.juicefs_storage.volume.difference import Difference
from lab.process import wait_for
from tests.support.fakes import OLD, FakeStore


def test_neither_the_fresh_mount_of_a_killed_task_nor_an_accepted_client_is_a_stranger(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("include.juicefs_storage.tasks.switch.run.run_id", lambda: "run")
    live = [
        Session(number, "1.4.2", "host", mount_point, datetime(2026, 1, 1, tzinfo=UTC))
        for number, mount_point in enumerate([f"/x/storage-switch.{canary_name('run')}/mnt", "/mnt", "s3gateway"])
    ]
    params = SimpleNamespace(accept_clients=("host:s3gateway",))
    run = SwitchRun(cast("Runtime", SimpleNamespace(metadata=SimpleNamespace(sessions=lambda: live), params=params)))
    assert [session.mount_point for session in other_sessions(run)] == ["/mnt"]


def test_the_proof_of_the_blocks_tells_how_much_longer_and_by_how_much_that_was_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks, shown, pushed = itertools.count(), list[Progress](), dict[str, list[float]]()
    monkeypatch.setattr(proofs, "Status", partial(Status, every_s=0.005, clock=lambda: float(next(ticks))))
    monkeypatch.setattr(proofs, "Publisher", lambda: shown.append)
    monkeypatch.setattr(proofs, "pull", lambda task_id, key: {("catch_up", "needed_blocks"): 1000}.get((task_id, key)))
    monkeypatch.setattr(proofs, "push", pushed.__setitem__)

    def missing_blocks(*_: object, told: Callable[[int], None]) -> Difference:
        told(100)
        wait_for("an ETA", lambda: any(progress.eta_s for progress in shown), deadline_s=30)
        return Difference(expected=1000)

    monkeypatch.setattr(proofs, "missing_blocks", missing_blocks)
    run = SimpleNamespace(
        runtime=SimpleNamespace(metadata=None),
        before=None,
        lost_before=(),
        lease=SimpleNamespace(kept_renewed=nullcontext),
    )
    assert proofs.find_missing(cast("SwitchRun", run), Location(OLD, FakeStore())).expected == 1000
    assert {progress.objects_expected for progress in shown} == {1000}
    estimated_s, took_s = pushed["estimate"]
    assert estimated_s > 0
    assert took_s > 0

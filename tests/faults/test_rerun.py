"""Clearing tasks in the ways that the UI offers: the right thing is done, or refused with the right clear to make."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from lab.process import wait_for
from tests.faults.test_kill import BROKEN, CONFIG
from tests.faults.worker import Fault
from tests.faults.world import Sides, assert_all_on, assert_nothing_lost, row

#: The last first: a step whose upstream has failed would not run.
FORWARD = ["restart_csi", "settle", "patch_secret", "write_setting", "backup"]


@pytest.fixture
def rolled_back(start, writer):
    """A run that rolled back after all its clients had moved."""
    run = start(BROKEN)
    assert run.go() == "rolled back", run.errors
    run.faults = ()
    return run


def test_only_failed_after_a_rollback_refuses_and_stays_red(rolled_back, fault_lab, sides):
    """What went green over a half-undone volume before there was a guard."""
    rolled_back.clear(only_failed=True)
    assert rolled_back.go() == "rolled back"
    assert rolled_back.states["finalize"] == "failed"
    assert "rolled back since" in rolled_back.errors["prove_blocks"]
    assert_all_on(fault_lab, sides.source)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["write_setting", "prove_blocks", "decide", "plan"])
def test_with_downstream_after_a_rollback_rolls_back_once_more(task, rolled_back, fault_lab, sides, writer):
    before = row(fault_lab)
    rolled_back.clear(task, downstream=True)
    assert rolled_back.go() == "rolled back", rolled_back.errors
    writer.stop()
    assert rolled_back.states["finalize"] == "failed"
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)


def test_nothing_of_an_old_run_moves_a_volume_that_another_run_moved_since(rolled_back, start, fault_lab, sides):
    later = start()
    assert later.go() == "switched", later.errors
    for task, reason in (
        ("restore_setting", "Another run moved volume"),
        ("copy_back", "Another run moved volume"),
        ("write_setting", "rolled back since"),
    ):
        rolled_back.clear(task)
        rolled_back.go()
        assert reason in rolled_back.errors[task]
    rolled_back.clear("decide", downstream=True)
    rolled_back.go()
    assert rolled_back.states["restore_setting"] == "skipped"
    assert rolled_back.states["finalize"] == "failed"
    assert_all_on(fault_lab, sides.target)

    # In the run that did move it the proofs may be made again; a step alone is refused, with Downstream it is done.
    for task in ("catch_up", "prove_blocks", "finalize"):
        later.clear(task)
        later.go()
        assert later.states[task] == "success", later.errors[task]
    for task in FORWARD:
        later.clear(task)
        later.go()
        assert "clear this task with Downstream" in later.errors[task]
    later.clear("backup", downstream=True)
    assert later.go() == "switched", later.errors
    later.clear()
    assert later.go() == "switched", later.errors
    assert_all_on(fault_lab, sides.target)


def test_only_failed_before_the_setting_was_written_does_not_move_the_volume_unjudged(start, fault_lab, sides):
    run = start(Fault("copy_ahead", "after", error="ordered to fail", tries=9))
    assert run.go() == "failed"
    run.faults = ()
    run.clear(only_failed=True)
    assert run.go() == "failed"
    assert "Task decide has judged this run already" in run.errors["write_setting"]
    assert_all_on(fault_lab, sides.source)
    run.clear("copy_ahead", downstream=True)
    assert run.go() == "switched", run.errors
    assert_all_on(fault_lab, sides.target)


def test_a_juicefs_config_that_outlives_its_task_does_not_move_the_volume_behind_the_runs_back(
    start, fault_lab, sides: Sides, writer, tell
):
    """The store stands still while the setting is written, the task is killed on both tries, the store goes on."""
    server = sides.target.server()
    assert server is not None
    going_on = threading.Timer(4, os.kill, (server.pid, signal.SIGCONT))
    run = start(Fault("write_setting", "during", CONFIG, tries=2))
    run.before = {"write_setting": lambda: os.kill(server.pid, signal.SIGSTOP), "decide": going_on.start}
    try:
        outcome = run.go()
    finally:
        going_on.cancel()
        os.kill(server.pid, signal.SIGCONT)
    assert run.struck == {run.faults[0]: 2}
    assert outcome in {"rolled back", "failed"}, run.errors
    config = f"juicefs config {fault_lab.mariadb.meta_url}"
    wait_for("no juicefs config runs", lambda: not _running(config), deadline_s=90)
    wait_for("the clients are where the setting is", lambda: len(fault_lab.mounts()) == 2, deadline_s=10)
    writer.stop()
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)
    tell("write_setting", "killed, its command goes on", "both tries", f"{outcome}, all old")


def _running(command: str) -> list[int]:
    import psutil

    return [p.pid for p in psutil.process_iter(["cmdline"]) if command in " ".join(p.info["cmdline"] or [])]

"""A `juicefs config` outlives the task that started it, which was killed: it may not write after the run was judged."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest

from lab.environment import Lab
from lab.process import wait_for
from lab.seaweed import Store
from lab.writer import Writer
from tests.support.faults import CONFIG
from tests.support.harness import Run, Start, Tell
from tests.support.worker import Fault
from tests.support.world import Sides, assert_all_on, assert_nothing_left_over, assert_nothing_lost, row

KILLED = Fault("write_setting", "during", CONFIG)
#: How long a command is stopped that resumes later, in seconds.
LATE_S = 4.0


def configs(lab: Lab) -> list[psutil.Process]:
    """The `juicefs config` that run on this volume, wherever they do."""
    words = f"juicefs config {lab.mariadb.meta_url} "
    found = []
    for process in psutil.process_iter():
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:  # it has ended
            continue
        if words in command and not command.startswith(("sh ", "timeout ", "setpriv ")):
            found.append(process)
    return found


@contextmanager
def first_config_stopped(run: Run, store: Store, for_s: float = 600) -> Iterator[list[psutil.Process]]:
    """Stop the first `juicefs config` of a run for so many seconds; the store hangs until it runs.

    Yields:
        The process, from when it is stopped.
    """
    server = store.server()
    assert server
    stopped: list[psutil.Process] = []
    over = threading.Event()

    def stop() -> None:
        while not stopped and not over.is_set():
            for process in configs(run.lab)[:1]:
                process.suspend()
                stopped.append(process)
        os.kill(server.pid, signal.SIGCONT)
        over.wait(for_s)
        for process in stopped:
            if process.is_running():
                process.resume()

    thread = threading.Thread(target=stop)

    def stand_still() -> None:
        os.kill(server.pid, signal.SIGSTOP)
        thread.start()

    run.before["write_setting"] = stand_still
    try:
        yield stopped
    finally:
        over.set()
        thread.join()


@pytest.fixture
def hanging_store(sides: Sides) -> Iterator[tuple[Callable[[], None], Callable[[], None]]]:
    """Suspend the new store, and resume it some seconds later: the two as functions."""
    server = sides.target.server()
    assert server is not None
    going_on = threading.Timer(LATE_S, os.kill, (server.pid, signal.SIGCONT))
    yield lambda: os.kill(server.pid, signal.SIGSTOP), going_on.start
    going_on.cancel()
    os.kill(server.pid, signal.SIGCONT)


@pytest.mark.slow
def test_it_is_waited_for_before_a_run_is_judged(
    start: Start,
    fault_lab: Lab,
    sides: Sides,
    hanging_store: tuple[Callable[[], None], Callable[[], None]],
    writer: Writer,
    tell: Tell,
) -> None:
    """The store hangs while the setting is written, the task is killed on both tries, the store resumes."""
    before = row(fault_lab)
    run = start(replace(KILLED, tries=2))
    run.before = dict(zip(("write_setting", "decide"), hanging_store, strict=True))
    outcome = run.go()
    writer.stop()
    assert run.struck == {run.faults[0]: 2}
    assert outcome in {"rolled back", "failed"}, run.errors
    assert configs(fault_lab) == []
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)
    tell("write_setting", "killed, its config continues", "both tries", f"{outcome}, all old")


@pytest.mark.slow
def test_one_that_does_not_end_is_ended_before_a_run_is_judged(
    start: Start, fault_lab: Lab, sides: Sides, writer: Writer, tell: Tell
) -> None:
    """It may not write when the run has been declared all old, however long it was held up."""
    before = row(fault_lab)
    run = start(KILLED, Fault("write_setting", "before"))
    with first_config_stopped(run, sides.target) as stopped:
        outcome = run.go()
        assert len(stopped) == 1
        assert not stopped[0].is_running()
    writer.stop()
    assert run.struck == dict.fromkeys(run.faults, 1)
    assert outcome == "failed", run.errors
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)
    tell("write_setting", "killed, its config never ends", "both tries", f"{outcome}, all old")


@pytest.mark.slow
def test_the_next_try_waits_for_it_so_that_a_later_revert_is_not_undone(
    start: Start, fault_lab: Lab, sides: Sides, writer: Writer, tell: Tell
) -> None:
    """It would write the new storage again when the volume has long been taken back."""
    run, left = start(KILLED), list[int]()
    run.before = {"patch_secret": lambda: left.append(len(configs(fault_lab)))}
    with first_config_stopped(run, sides.target, LATE_S) as stopped:
        outcome = run.go()
    writer.stop()
    assert run.struck == {KILLED: 1}
    assert (len(stopped), left) == (1, [0])
    assert outcome == "switched", run.errors
    assert_all_on(fault_lab, sides.target)
    assert_nothing_lost(fault_lab, writer)
    tell("write_setting", "killed, its config continues", "tried again", "all new")


@pytest.mark.slow
def test_on_the_worker_it_ends_with_its_task(
    start: Start,
    fault_lab: Lab,
    sides: Sides,
    hanging_store: tuple[Callable[[], None], Callable[[], None]],
    writer: Writer,
    tell: Tell,
) -> None:
    """The next try may run on another worker, and could not see it."""
    before, left = row(fault_lab), list[bool]()
    hang, resume = hanging_store

    def look() -> None:
        wait_for("no juicefs config runs", lambda: not configs(fault_lab), deadline_s=2)
        left.append(False)
        resume()

    run = start(replace(KILLED, tries=2), juicefs_runner="worker")
    run.before = {"write_setting": hang, "decide": look}
    outcome = run.go()
    writer.stop()
    assert run.struck == {run.faults[0]: 2}
    assert left == [False], "the store stood still until then: it was not the command's own end"
    assert outcome == "failed", run.errors
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.source)
    assert_nothing_left_over(fault_lab)
    assert_nothing_lost(fault_lab, writer)
    tell("write_setting", "killed on the worker", "both tries", f"{outcome}, all old")

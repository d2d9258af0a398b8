"""Clearing tasks in the ways that the UI offers: the right thing is done, or refused with the right clear to make."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from include.juicefs_storage.tasks.switch.apply import APPLY
from lab.environment import Lab
from lab.seaweed import Store
from lab.writer import Writer
from tests.support.faults import BROKEN, fails
from tests.support.harness import Run, Start, Tell
from tests.support.worker import Fault
from tests.support.world import Sides, assert_all_on, assert_nothing_lost, believed, row

#: The last first: a step whose upstream has failed would not run.
FORWARD = ["restart_csi", "settle", "patch_secret", "write_setting", "backup"]


@contextmanager
def stopped(store: Store) -> Iterator[None]:
    """A store that nobody can read from."""
    store.stop()
    try:
        yield
    finally:
        store.start()


@pytest.fixture
def rolled_back(start: Start, writer: Writer) -> Run:
    """A run that rolled back after all its clients had moved."""
    run = start(BROKEN)
    assert run.go() == "rolled back", run.errors
    run.faults = ()
    return run


def test_only_failed_after_a_rollback_refuses_and_stays_red(rolled_back: Run, fault_lab: Lab, sides: Sides) -> None:
    """What went green over a half-undone volume before there was a guard."""
    rolled_back.clear(only_failed=True)
    assert rolled_back.go() == "rolled back"
    assert rolled_back.states["finalize"] == "failed"
    assert "rolled back since" in rolled_back.errors["prove_blocks"]
    assert_all_on(fault_lab, sides.source)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["write_setting", "prove_blocks", "decide", "plan"])
def test_with_downstream_after_a_rollback_rolls_back_once_more(
    task: str, rolled_back: Run, fault_lab: Lab, sides: Sides, writer: Writer
) -> None:
    before = row(fault_lab)
    rolled_back.clear(task, downstream=True)
    assert rolled_back.go() == "rolled back", rolled_back.errors
    writer.stop()
    assert rolled_back.states["finalize"] == "failed"
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)


@pytest.mark.slow
def test_nothing_of_an_old_run_moves_a_volume_that_another_run_moved_since(
    rolled_back: Run, start: Start, fault_lab: Lab, sides: Sides
) -> None:
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
    for task in ("follow_writes", "catch_up", "prove_blocks", "catch_up_late", "finalize"):
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


@pytest.mark.slow
def test_only_failed_before_the_setting_was_written_does_not_move_the_volume_unjudged(
    start: Start, fault_lab: Lab, sides: Sides
) -> None:
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


#: How a run comes to its end, and which tasks then refuse to run alone: what would change something unjudged.
ENDS: dict[str, tuple[Fault, ...]] = {"switched": (), "rolled back": (BROKEN,), "held": (fails("prove_clients"),)}
CHANGING = {"backup", "write_setting", "patch_secret", "settle", "restart_csi"}
REFUSED = {
    "switched": CHANGING,
    # Those behind prove_blocks do not start: it has failed.
    "rolled back": set(APPLY) - {"prove_fresh_mount", "prove_no_restarts", "catch_up_late"} | {"prove_clients_on_old"},
    "held": CHANGING,
}


def kept(run: Run) -> Callable[[], None]:
    """Put a run back as Airflow's database has it now."""
    kept_folder = run.folder.with_name(f"{run.folder.name}-kept")
    shutil.copytree(run.folder, kept_folder)
    states, errors = dict(run.states), dict(run.errors)

    def restore() -> None:
        shutil.copytree(kept_folder, run.folder, dirs_exist_ok=True)
        run.states, run.errors = dict(states), dict(errors)

    return restore


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("end", ENDS)
def test_each_task_cleared_alone(end: str, start: Start, fault_lab: Lab, sides: Sides, tell: Tell) -> None:
    """It is done again and nothing moves, or it refuses and says what to clear; no clear makes a red run green."""
    run = start(*ENDS[end], on_failure="hold" if end == "held" else "rollback")
    assert run.go() == end, run.errors
    run.faults = ()
    green, restore = run.states["finalize"] == "success", kept(run)
    now, there = row(fault_lab), believed(fault_lab)
    refused, wrong = set(), []
    for task in run.states:
        if task in {"approve", "finalize"}:
            continue
        restore()
        run.clear(task)
        run.go()
        failed = run.states[task] == "failed"
        if failed:
            refused.add(task)
            if "Next: " not in run.errors[task]:
                wrong.append(f"{task}: {run.errors[task]}")
        run.clear("finalize")
        outcome = run.go()
        if (run.states["finalize"] == "success") > (green and not failed) or (not failed and outcome != end):
            wrong.append(f"{task} {run.states[task]}: {outcome}")
        if (row(fault_lab), believed(fault_lab)) != (now, there):
            wrong.append(f"{task}: the volume moved")
        then = {"success": "done again", "failed": "refuses"}.get(run.states[task], run.states[task].replace("_", " "))
        tell(task, f"cleared alone, run {end}", then, f"{outcome}, nothing moved")
    assert wrong == []
    assert refused == REFUSED[end]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_with_downstream_after_a_green_run_everything_is_proven_again(
    start: Start, fault_lab: Lab, sides: Sides, writer: Writer, tell: Tell
) -> None:
    run = start()
    assert run.go() == "switched", run.errors
    now = row(fault_lab)
    for task in ("resolve_params", "plan", "copy_ahead", "write_setting", "restart_csi", "prove_clients", "decide"):
        run.clear(task, downstream=True)
        assert run.go() == "switched", (task, run.errors)
        assert row(fault_lab) == now
        tell(task, "cleared with Downstream, run switched", "done again", "all new")
    writer.stop()
    assert_all_on(fault_lab, sides.target)
    assert_nothing_lost(fault_lab, writer)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["patch_secret", "prove_clients"])
def test_a_held_run_is_judged_again_and_continues(
    task: str, start: Start, fault_lab: Lab, sides: Sides, writer: Writer, tell: Tell
) -> None:
    run = start(fails(task, "before"), on_failure="hold")
    assert run.go() == "held", run.errors
    run.clear("decide", downstream=True)
    assert run.go() == "held", run.errors
    run.faults = ()
    run.clear(only_failed=True)
    outcome = run.go()
    if task in CHANGING:
        assert outcome == "held", run.errors
        assert "clear this task with Downstream" in run.errors[task]
        run.clear(task, downstream=True)
        outcome = run.go()
    writer.stop()
    assert outcome == "switched", run.errors
    assert_all_on(fault_lab, sides.target)
    assert_nothing_lost(fault_lab, writer)
    tell(task, "fails, run held", "only failed" + (", then with Downstream" if task in CHANGING else ""), "all new")


@pytest.mark.slow
@pytest.mark.parametrize("undo", ["copy_back", "restore_secret", "restore_setting", "prove_clients_on_old"])
def test_only_failed_after_half_a_rollback_is_never_taken_for_a_whole_one(
    undo: str, start: Start, fault_lab: Lab, sides: Sides, writer: Writer, tell: Tell
) -> None:
    """What clients write until they are back is copied back, or nobody says that the volume is."""
    run = start(BROKEN, fails(undo, "before"))
    # Without the blocks that only the new store has nothing goes back.
    assert run.go() == ("held" if undo == "copy_back" else "half rolled back"), run.errors
    run.faults = ()
    run.clear(only_failed=True)
    outcome, then = run.go(), "only failed"
    if outcome != "rolled back":
        assert "clear this task with Downstream" in run.errors[undo]
        run.clear(undo, downstream=True)
        outcome, then = run.go(), "only failed, then with Downstream"
    writer.stop()
    assert outcome == "rolled back", run.errors
    assert run.states["finalize"] == "failed"
    assert_all_on(fault_lab, sides.source)
    with stopped(sides.target):
        assert_nothing_lost(fault_lab, writer)
    tell(undo, "fails, half rolled back", then, "all old")

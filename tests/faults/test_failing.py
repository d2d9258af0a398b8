"""Each step fails for good: the run ends where it began, names the step, and continues when an undo fails too."""

from __future__ import annotations

import pytest

from include.juicefs_storage.tasks.switch.apply import APPLY
from include.juicefs_storage.tasks.switch.judgement import ROLLBACK
from lab.environment import Lab
from lab.keys import random_part
from lab.writer import Writer
from tests.support.faults import fails
from tests.support.harness import Start, Tell, vault
from tests.support.world import Sides, assert_all_on, assert_nothing_left_over, assert_nothing_lost, believed, row

#: Until the setting is written there is nothing to put back.
UNTOUCHED = ("backup", "copy_ahead")


def some(names: tuple[str, ...], quick: set[str]) -> list[object]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("step", some(APPLY, {"patch_secret"}))
def test_a_step_that_fails_for_good_leaves_the_volume_on_the_old_store(
    step: str, fault_lab: Lab, sides: Sides, start: Start, writer: Writer, tell: Tell
) -> None:
    before, processes = row(fault_lab), fault_lab.mount_processes()
    run = start(fails(step))
    outcome = run.go()
    writer.stop()
    assert step in run.failed()
    assert run.states["finalize"] == "failed", "a run that did not do what it was for is red"
    assert outcome == ("failed" if step in UNTOUCHED else "rolled back"), run.errors
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.source)
    assert fault_lab.mount_processes() == processes
    assert_nothing_left_over(fault_lab)
    assert_nothing_lost(fault_lab, writer)
    tell(step, "fails for good", "rolls back", f"{outcome}, all old")


@pytest.mark.slow
def test_a_copy_back_that_fails_keeps_the_clients_where_their_blocks_are(
    fault_lab: Lab, sides: Sides, start: Start, writer: Writer, tell: Tell
) -> None:
    run = start(fails("prove_blocks"), fails("copy_back", "before"))
    assert run.go() == "held", run.errors
    assert {"copy_back", "restore_secret", "restore_setting", "settle_again"} <= run.failed()
    assert "copy_back failed, and the new store serves" in run.errors["restore_setting"]
    assert_all_on(fault_lab, sides.target)

    run.faults = ()
    run.clear("copy_back", downstream=True)
    outcome = run.go()
    writer.stop()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)
    tell("copy_back", "fails for good", "cleared with Downstream", f"held, then {outcome}")


@pytest.mark.parametrize("undo", some(tuple(task for task in ROLLBACK if task != "copy_back"), set()))
def test_a_rollback_continues_after_an_undo_that_failed_and_names_it(
    undo: str, fault_lab: Lab, sides: Sides, start: Start, writer: Writer, tell: Tell
) -> None:
    run = start(fails("prove_blocks"), fails(undo, "before"))
    assert run.go() == "half rolled back"
    assert run.failed() == {"prove_blocks", undo}
    assert undo in run.errors["finalize"]
    done = [task for task in ROLLBACK if task != undo and run.states[task] == "success"]
    assert len(done) == len(ROLLBACK) - 1, "the others continued"

    run.faults = ()
    run.clear(undo, downstream=True)
    outcome = run.go()
    writer.stop()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)
    tell(undo, "fails for good", "cleared with Downstream", f"{outcome}, all old")


def test_diagnostics_tell_what_was_and_hold_no_secret(fault_lab: Lab, sides: Sides, start: Start) -> None:
    run = start(fails("prove_clients"))
    assert run.go() == "rolled back"
    result = run.xcom("collect_diagnostics")
    assert result["problems"] == []
    assert result["diagnostics_id"] in run.xcom("finalize", "markdown")
    kept = vault(fault_lab).load(result["diagnostics_id"])
    assert kept is not None
    text = kept.decode()
    for word in ("juicefs-csi-controller", "juicefs-mount", "csi.juicefs.com", "SuccessfulCreate", "kind: CSINode"):
        assert word in text, word
    # As it was before anything was undone: the status names the new store.
    assert sides.target.bucket_url in text
    lab = fault_lab
    keys = [key for store in (lab.old_store, lab.new_store) for key in (store.access_key, store.secret_key)]
    assert [key for key in (*keys, lab.mariadb.password) if random_part(key) in text] == []


@pytest.mark.slow
def test_diagnostics_that_cannot_be_had_do_not_stop_the_rollback(fault_lab: Lab, sides: Sides, start: Start) -> None:
    run = start(fails("prove_blocks"), fails("collect_diagnostics", "before"))
    assert run.go() == "rolled back"
    assert run.states["collect_diagnostics"] == "failed"
    assert_all_on(fault_lab, sides.source)


def test_hold_leaves_things_as_they_are_and_says_how_to_continue(
    fault_lab: Lab, sides: Sides, start: Start, writer: Writer, tell: Tell
) -> None:
    run = start(fails("prove_clients"), on_failure="hold")
    assert run.go() == "held"
    assert run.states["copy_back"] == "skipped"
    assert believed(fault_lab)["setting"] == {sides.target.name}
    assert "Clear the failed task with Downstream" in run.errors["finalize"]

    run.faults = ()
    run.clear("prove_clients", downstream=True)
    outcome = run.go()
    writer.stop()
    assert outcome == "switched", run.errors
    assert_all_on(fault_lab, sides.target)
    assert_nothing_lost(fault_lab, writer)
    tell("prove_clients", "fails, on_failure=hold", "cleared with Downstream", f"{outcome}, all new")

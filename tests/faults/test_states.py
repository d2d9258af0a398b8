"""States that a person sets: they make no run green, and never hide where the volume is."""

from __future__ import annotations

import pytest

from include.juicefs_storage.tasks.switch.apply import APPLY
from lab.environment import Lab
from lab.writer import Writer
from tests.support.faults import fails
from tests.support.harness import Start, Tell
from tests.support.world import Sides, assert_all_on, assert_nothing_lost, believed

#: In `make test`: the proof that people are most tempted to skip.
_QUICK = {"prove_blocks"}


@pytest.mark.parametrize(
    "task",
    [pytest.param(task, marks=() if task in _QUICK else pytest.mark.slow) for task in APPLY if task != "backup"],
)
def test_a_step_that_is_marked_as_success_is_not_proven(
    task: str, fault_lab: Lab, sides: Sides, start: Start, writer: Writer, tell: Tell
) -> None:
    run = start(fails(task, "before"), on_failure="hold")
    run.go()
    run.faults = ()
    run.mark(task, "success")
    run.clear(only_failed=True)
    outcome = run.go()
    assert run.states["finalize"] == "failed"
    untouched = all(names == {sides.source.name} for names in believed(fault_lab).values())
    assert outcome == ("failed" if untouched else "held"), run.errors
    assert f"{task} left no evidence" in run.errors["finalize"]
    assert f"{task} left no evidence" in run.xcom("finalize", "markdown")

    run.clear(task, downstream=True)
    assert run.go() == "switched", run.errors
    writer.stop()
    assert_all_on(fault_lab, sides.target)
    assert_nothing_lost(fault_lab, writer)
    tell(task, "fails, marked as success", "cleared with Downstream", f"{outcome}, then all new")


def test_a_held_run_whose_check_is_cleared_says_where_the_volume_is(fault_lab: Lab, sides: Sides, start: Start) -> None:
    run = start(fails("prove_clients", "before"), on_failure="hold")
    assert run.go() == "held", run.errors
    run.faults = (fails("check_target_bucket", "before"),)
    run.clear("check_target_bucket", downstream=True)
    assert run.go() == "held", run.errors
    report = run.xcom("finalize", "report")
    assert report["setting_now"] == sides.target.bucket_url
    assert report["failure"]["task"] == "check_target_bucket"
    assert believed(fault_lab)["setting"] == {sides.target.name}

    run.faults = ()
    run.clear("check_target_bucket", downstream=True)
    assert run.go() == "switched", run.errors


@pytest.mark.slow
def test_the_report_begins_with_what_failed_first(fault_lab: Lab, start: Start) -> None:
    run = start(fails("prove_fresh_mount", "before"))
    assert run.go() == "rolled back", run.errors
    first, second = run.xcom("finalize", "markdown").splitlines()[:2]
    assert first.startswith("## Rolled back")
    assert second.startswith("**[prove_fresh_mount](dags/juicefs_storage_switch/runs/")
    assert run.xcom("finalize", "report")["failure"]["task"] == "prove_fresh_mount"


def test_a_mount_pod_that_was_deleted_by_others_is_named_and_rolls_nothing_back(
    fault_lab: Lab, sides: Sides, start: Start, writer: Writer
) -> None:
    run = start()
    name = fault_lab.kubectl(
        "-n", "juicefs", "get", "pods", "-l", "app.kubernetes.io/name=juicefs-mount", "-o", "name"
    ).split()[0]
    run.before = {"restart_csi": lambda: fault_lab.kubectl("-n", "juicefs", "delete", name, "--wait=false")}
    outcome = run.go()
    writer.stop()
    assert outcome == "switched", run.errors
    named = [line for line in run.xcom("finalize", "report")["proofs"] if "which this run does to none" in line]
    assert len(named) == 1
    assert_all_on(fault_lab, sides.target)

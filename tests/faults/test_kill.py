"""SIGKILL before, during and after each effect: the run converges to all-new or all-old, and nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

import pytest

from lab.environment import Lab
from lab.writer import Writer
from tests.support.faults import BROKEN, CONFIG
from tests.support.harness import Run, Start, Tell
from tests.support.worker import Fault, Point
from tests.support.world import Sides, assert_all_on, assert_nothing_left_over, assert_nothing_lost, row

#: A case takes 15 to 30 s, the first revert three times as much; a busy machine makes it minutes.
pytestmark = pytest.mark.timeout(900)

_ADAPTERS = "include.juicefs_storage.adapters"
VAULT = f"{_ADAPTERS}.vault:FileVault.save"
COPY = f"{_ADAPTERS}.s3.engine:NativeEngine.copy"
MOUNT = f"{_ADAPTERS}.juicefs_command:JuiceFSCommand.mount_fresh"
UNMOUNT = f"{_ADAPTERS}.juicefs_command:JuiceFSCommand.unmount_fresh"
SECRET = f"{_ADAPTERS}.kubernetes:KubernetesCluster.patch_secret"
STAMP = f"{_ADAPTERS}.kubernetes:KubernetesCluster.stamp_template"
EXEC = f"{_ADAPTERS}.kubernetes:KubernetesCluster.exec"
UPDATE = f"{_ADAPTERS}.mysql:MySqlMetadata.replace_setting"

#: Runs it and asks the world: run, fault, the outcome that is expected, what to add to the table's line.
Arrives: TypeAlias = Callable[..., None]
Returns: TypeAlias = Callable[..., None]

#: Of the script that writes the canary through a client's mount.
CANARY = "dd if=/dev/urandom"
POINTS: tuple[Point, ...] = ("before", "during", "after")
#: The tasks that copy what one store has and the other lacks.
COPIES = {"copy_ahead", "catch_up", "copy_back", "copy_back_again"}
ENDS: tuple[Point, ...] = ("before", "after")


def _points(task: str, effect: str, nth: int = 1, having: str = "") -> list[Fault]:
    return [Fault(task, point, effect, nth, having=having) for point in POINTS]


def _ends(*tasks: str) -> list[Fault]:
    """For tasks that change nothing: as they begin, and when they are done and nobody knows it yet."""
    return [Fault(task, point) for task in tasks for point in ENDS]


FORWARD = [
    *_ends("plan", "choose_path"),
    *_points("backup", VAULT),
    *_points("copy_ahead", COPY),
    *_ends("follow_writes"),
    Fault("follow_writes", "after", COPY),
    *_points("write_setting", CONFIG),
    *_points("patch_secret", SECRET),
    *_points("patch_secret", SECRET, nth=2),
    *_ends("settle"),
    *_points("restart_csi", STAMP),
    *_points("restart_csi", STAMP, nth=2),
    *_ends("wait_for_rollouts"),
    *_points("prove_clients", EXEC, having=CANARY),
    *_points("catch_up", COPY),
    *_ends("prove_blocks"),
    *_points("prove_fresh_mount", MOUNT),
    *_points("prove_fresh_mount", UNMOUNT),
    *_ends("prove_no_restarts"),
    *_ends("catch_up_late", "decide"),
    *_points("finalize", VAULT),
]
BACK = [
    # First the mark that this run is being rolled back, then what was collected.
    *_points("collect_diagnostics", VAULT),
    *_points("collect_diagnostics", VAULT, nth=2),
    *_points("copy_back", COPY),
    *_ends("follow_writes_back"),
    *_points("restore_secret", SECRET),
    *_points("restore_secret", SECRET, nth=2),
    *_points("restore_setting", UPDATE),
    *_ends("settle_again"),
    *_points("restart_csi_again", STAMP),
    *_points("restart_csi_again", STAMP, nth=2),
    *_ends("wait_for_rollouts_again"),
    *_points("prove_clients_on_old", EXEC, having=CANARY),
    *_points("copy_back_again", COPY),
    *_ends("prove_blocks_on_old", "copy_back_late"),
]
#: Where juicefs runs on the worker.
WORKER = [
    Fault("write_setting", "during", CONFIG),
    Fault("prove_fresh_mount", "during", MOUNT),
    Fault("prove_fresh_mount", "during", UNMOUNT),
]
#: Each effect once: the graph and its functions are those of a switch, but the setting is written by an UPDATE.
REVERT = [
    Fault("backup", "during", VAULT),
    Fault("copy_ahead", "during", COPY),
    *_points("write_setting", UPDATE),
    Fault("patch_secret", "during", SECRET),
    Fault("restart_csi", "during", STAMP),
    Fault("prove_clients", "during", EXEC, having=CANARY),
    Fault("catch_up", "during", COPY),
    Fault("prove_fresh_mount", "during", MOUNT),
    Fault("prove_fresh_mount", "during", UNMOUNT),
    Fault("finalize", "during", VAULT),
]
REVERT_BACK = [
    Fault("collect_diagnostics", "during", VAULT),
    Fault("copy_back", "during", COPY),
    Fault("restore_secret", "during", SECRET),
    Fault("restore_setting", "during", UPDATE),
    Fault("restart_csi_again", "during", STAMP),
    Fault("prove_clients_on_old", "during", EXEC, having=CANARY),
    Fault("copy_back_again", "during", COPY),
]
#: Those that `make test` runs too: the cut-over itself, and the way back.
SOME = {("write_setting", "during", 1)}
SOME_BACK = {("restore_setting", "during", 1)}


def _cases(faults: list[Fault], some: set[tuple[str, str, int]]) -> list[object]:
    return [
        pytest.param(
            fault,
            id=f"{fault.task}-{name(fault).replace(' ', '-')}",
            marks=() if (fault.task, fault.point, fault.nth) in some else pytest.mark.slow,
        )
        for fault in faults
    ]


def name(fault: Fault) -> str:
    """A fault as the table shows it."""
    effect = fault.effect.rpartition(".")[2]
    return f"{fault.point} {effect}{f' no. {fault.nth}' if fault.nth > 1 else ''}".strip()


def leave_behind(run: Run, fault: Fault, sides: Sides) -> None:
    """Let the task of a copy find a block that only the store has which the clients left, or are to leave."""
    if fault.effect == COPY and fault.task in COPIES:
        store = sides.target if fault.task.startswith("copy_back") else sides.source
        # No slice has the id 0: it is nobody's block.
        key = f"myjfs/chunks/0/0/0_{time.time_ns()}_5"
        run.before[fault.task] = lambda: store.client().put_object(Bucket=store.bucket, Key=key, Body=b"later")


@pytest.fixture
def arrives(fault_lab: Lab, sides: Sides, writer: Writer, tell: Tell) -> Arrives:
    """Run to the end, clear what has no second try, and ask the world whether all is new."""

    def check(run: Run, fault: Fault, outcome: str, what: str = "") -> None:
        processes = fault_lab.mount_processes()
        leave_behind(run, fault, sides)
        found, then = run.go(), "tried again"
        if fault.task == "finalize":
            assert run.states["finalize"] == "failed"
            run.clear("finalize")
            found, then = run.go(), "cleared"
        writer.stop()
        assert run.struck == {fault: 1}, ("the fault was not reached", run.errors)
        assert found == outcome, run.errors
        assert_all_on(fault_lab, sides.target)
        assert fault_lab.mount_processes() == processes
        assert_nothing_left_over(fault_lab)
        assert_nothing_lost(fault_lab, writer)
        tell(fault.task, name(fault) + what, then, "all new")

    return check


@pytest.fixture
def returns(fault_lab: Lab, sides: Sides, writer: Writer, tell: Tell) -> Returns:
    """Run to the end, and ask the world whether all is as it was."""

    def check(run: Run, fault: Fault, what: str = "") -> None:
        before, processes = row(fault_lab), fault_lab.mount_processes()
        leave_behind(run, fault, sides)
        outcome = run.go()
        writer.stop()
        assert run.struck.get(fault) == 1, ("the fault was not reached", run.errors)
        assert outcome == "rolled back", run.errors
        assert row(fault_lab) == before
        assert_all_on(fault_lab, sides.source)
        assert fault_lab.mount_processes() == processes
        assert_nothing_left_over(fault_lab)
        assert_nothing_lost(fault_lab, writer)
        # The diagnostics have one try: the rollback continues without them.
        then = "continues" if fault.task == "collect_diagnostics" else "tried again"
        tell(fault.task, name(fault) + what, then, "all old")

    return check


@pytest.mark.parametrize("fault", _cases(FORWARD, SOME))
def test_a_task_killed_on_the_way_forward_runs_again_to_the_end(fault: Fault, start: Start, arrives: Arrives) -> None:
    """Airflow tries a killed task again; `finalize`, which has no second try, is cleared by hand."""
    arrives(start(fault), fault, "switched")


@pytest.mark.parametrize("fault", _cases(BACK, SOME_BACK))
def test_a_task_killed_on_the_way_back_runs_again_to_the_end(fault: Fault, start: Start, returns: Returns) -> None:
    returns(start(fault, BROKEN), fault)


@pytest.mark.parametrize("fault", _cases(WORKER, set()))
def test_a_task_killed_with_juicefs_on_the_worker_runs_again_to_the_end(
    fault: Fault, start: Start, arrives: Arrives
) -> None:
    arrives(start(fault, juicefs_runner="worker"), fault, "switched", ", on the worker")


@pytest.mark.parametrize("fault", _cases(REVERT, set()))
def test_a_task_of_a_revert_killed_on_the_way_forward_runs_again_to_the_end(
    fault: Fault, revert: Start, arrives: Arrives
) -> None:
    """A representative set: the graph is shared with the switch, whose every point is tried above."""
    arrives(revert(fault), fault, "reverted", ", in a revert")


@pytest.mark.parametrize("fault", _cases(REVERT_BACK, set()))
def test_a_task_of_a_revert_killed_on_the_way_back_runs_again_to_the_end(
    fault: Fault, revert: Start, returns: Returns
) -> None:
    """The same for the rollback of a revert."""
    returns(revert(fault, BROKEN), fault, ", in a revert")

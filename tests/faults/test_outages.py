"""A database, store or API server goes away during a run, for seconds or for good: no false success."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest

from lab.environment import Lab
from lab.writer import Writer
from tests.support.harness import Start, Tell
from tests.support.world import Sides, assert_all_on, assert_nothing_lost, believed

AWAY_S = 6.0
#: A database whose machine starts again, or whose replica takes over.
FAILOVER_S = 30.0
#: From how a server stops and how it starts: what takes it away in a run.
Away: TypeAlias = Callable[..., Callable[[], None]]
#: From trouble of the cluster: what orders it in a run.
Order: TypeAlias = Callable[[dict[str, str]], Callable[[], None]]


@pytest.fixture
def away(fault_lab: Lab) -> Iterator[Away]:
    """Stop a server when called, and start it again some seconds later, or only at the end of the test."""
    timers: list[threading.Timer] = []

    def make(
        stop: Callable[[], None], start: Callable[[], None], *, for_s: float = AWAY_S, for_good: bool = False
    ) -> Callable[[], None]:
        def go() -> None:
            stop()
            if not for_good:
                timers.append(threading.Timer(for_s, start))
                timers[-1].start()

        return go

    yield make
    for timer in timers:
        timer.join()
    for store in (fault_lab.old_store, fault_lab.new_store):
        store.start()
    if not (server := fault_lab.mariadb.server()) or not server.alive():
        fault_lab.mariadb.restart()


@pytest.mark.parametrize(
    ("task", "for_s"),
    [
        ("write_setting", AWAY_S),
        *(pytest.param(task, FAILOVER_S, marks=pytest.mark.slow) for task in ("copy_ahead", "write_setting", "settle")),
    ],
)
def test_a_database_that_restarts_in_mid_run_is_waited_for(
    task: str, for_s: float, fault_lab: Lab, sides: Sides, start: Start, away: Away, tell: Tell
) -> None:
    run = start(client_timeout_s=60)
    run.before = {task: away(fault_lab.mariadb.stop, fault_lab.mariadb.restart, for_s=for_s)}
    outcome = run.go()
    assert outcome == "switched", run.errors
    assert_all_on(fault_lab, sides.target)
    tell(task, f"MariaDB away for {for_s:g} s", "-", f"{outcome}, all new")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_database_that_is_gone_for_good_is_no_success_and_the_way_back_waits_for_it(
    fault_lab: Lab, sides: Sides, start: Start, away: Away, tell: Tell
) -> None:
    """One task waits for it, not every task again: the run has ended within three minutes."""
    run = start()
    run.before = {"settle": away(fault_lab.mariadb.stop, fault_lab.mariadb.restart, for_good=True)}
    assert run.go() == "half rolled back"
    assert {"settle", "restore_setting"} <= run.failed()
    assert "metadata database answered" in run.errors["restore_setting"]
    done = (
        "resolve_params", "check_", "plan", "choose_path", "backup", "copy_ahead", "write_setting", "patch_secret",
        "follow_writes",  # which runs beside the others
    )  # fmt: skip
    took_s = {task: took_s for task, took_s in run.took_s.items() if not task.startswith(done)}
    assert sum(took_s.values()) < 180, took_s

    fault_lab.mariadb.restart()
    run.before = {}
    run.clear("copy_back", downstream=True)
    outcome = run.go()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    tell("settle", "MariaDB gone for good", "rollback cleared when it was back", f"{outcome}, all old")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["copy_ahead", "write_setting", "prove_clients"])
def test_a_new_store_that_hangs_for_some_seconds(
    task: str, fault_lab: Lab, sides: Sides, start: Start, writer: Writer, away: Away, tell: Tell
) -> None:
    server = sides.target.server()
    assert server is not None
    run = start()
    run.before = {task: away(lambda: os.kill(server.pid, signal.SIGSTOP), lambda: os.kill(server.pid, signal.SIGCONT))}
    outcome = run.go()
    writer.stop()
    assert outcome in {"switched", "rolled back", "failed"}, run.errors
    assert_all_on(fault_lab, sides.target if outcome == "switched" else sides.source)
    assert_nothing_lost(fault_lab, writer)
    tell(task, f"the new store hangs for {AWAY_S:g} s", "-", outcome)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("for_good", [False, True])
def test_a_new_store_that_goes_away_after_the_setting_was_written(
    for_good: bool, fault_lab: Lab, sides: Sides, start: Start, writer: Writer, away: Away, tell: Tell
) -> None:
    run = start()
    run.before = {"prove_clients": away(sides.target.stop, sides.target.start, for_good=for_good)}
    outcome = run.go()
    # Away for good: what clients wrote to it alone cannot be copied back, and the run says so.
    assert outcome in ({"half rolled back", "rolled back"} if for_good else {"switched", "rolled back"}), run.errors
    name = sides.target.name if outcome == "switched" else sides.source.name
    assert believed(fault_lab)["setting"] == {name}
    if for_good:
        sides.target.start()
        run.before = {}
        run.clear("copy_back", downstream=True)
        outcome = run.go()
        assert outcome == "rolled back", run.errors
    writer.stop()
    assert_all_on(fault_lab, sides.target if outcome == "switched" else sides.source)
    assert_nothing_lost(fault_lab, writer)
    how = "gone for good" if for_good else f"away for {AWAY_S:g} s"
    tell("prove_clients", f"the new store {how}", "rollback cleared when it was back" if for_good else "-", outcome)


@pytest.fixture
def order(fault_lab: Lab) -> Iterator[Order]:
    """Order a fault of the cluster when called; none is left after the test, and the CSI components are well."""
    yield lambda fault: lambda: fault_lab.kube.order_fault(fault)
    fault_lab.kube.clear_faults()
    for workload in ("statefulset/juicefs-csi-controller", "daemonset/juicefs-csi-node"):
        fault_lab.kubectl("-n", "juicefs", "rollout", "status", workload, "--timeout=90s")


PATCH_SECRET = {"verb": "patch", "resource": "secrets"}
PATCH_NODE = {"verb": "patch", "resource": "daemonsets"}
PASSING: dict[str, tuple[str, dict[str, Any]]] = {
    "409": ("patch_secret", {"match": PATCH_SECRET, "action": {"status": 409}}),
    "429": ("patch_secret", {"match": PATCH_SECRET, "action": {"status": 429, "retry_after": 1}}),
    "500": ("restart_csi", {"match": PATCH_NODE, "action": {"status": 500}}),
    "lost reply": ("patch_secret", {"match": PATCH_SECRET, "action": {"drop": "after"}}),
    "lost reply to the restart": ("restart_csi", {"match": PATCH_NODE, "action": {"drop": "after"}}),
    "500 to reads": ("settle", {"match": {"verb": "list", "resource": "pods"}, "action": {"status": 500}, "times": 3}),
    "line cut during exec": ("write_setting", {"exec": "drop"}),
    "pod deleted during exec": ("write_setting", {"exec": "delete-pod"}),
    "pod deleted during a proof": ("prove_fresh_mount", {"exec": "delete-pod"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("trouble", PASSING)
def test_trouble_of_the_cluster_that_passes_does_not_stop_a_run(
    trouble: str, fault_lab: Lab, sides: Sides, start: Start, writer: Writer, order: Order, tell: Tell
) -> None:
    task, fault = PASSING[trouble]
    processes = fault_lab.mount_processes()
    run = start()
    run.before = {task: order({"times": 1} | fault)}
    outcome = run.go()
    writer.stop()
    assert outcome == "switched", run.errors
    assert_all_on(fault_lab, sides.target)
    assert fault_lab.mount_processes() == processes
    assert_nothing_lost(fault_lab, writer)
    tell(task, f"Kubernetes: {trouble}", "-", f"{outcome}, all new")


@pytest.mark.slow
def test_a_controller_that_never_becomes_ready_leaves_the_volume_proven_on_the_old_store(
    fault_lab: Lab, sides: Sides, start: Start, writer: Writer, order: Order, tell: Tell
) -> None:
    run = start(rollout_timeout_s=10)
    run.before = {"restart_csi": order({"rollout": "never-ready", "name": "juicefs-csi-controller"})}
    assert run.go() == "half rolled back"
    # Nothing but the rollout itself: juicefs was run in a node component's pod.
    assert run.failed() == {"wait_for_rollouts", "wait_for_rollouts_again"}, run.errors
    assert "Rollouts not done" in run.errors["wait_for_rollouts"]
    assert_all_on(fault_lab, sides.source)

    fault_lab.kube.clear_faults()
    run.before = {}
    run.clear("wait_for_rollouts_again", downstream=True)
    outcome = run.go()
    writer.stop()
    assert outcome == "rolled back", run.errors
    assert_nothing_lost(fault_lab, writer)
    tell("wait_for_rollouts", "the controller is never ready", "cleared when it was", f"{outcome}, all old")


@pytest.mark.slow
def test_a_crash_loop_fails_the_rollout_with_the_containers_last_words(
    fault_lab: Lab, sides: Sides, start: Start, order: Order, tell: Tell
) -> None:
    run = start()
    run.before = {
        "restart_csi": order({"rollout": "crash-loop", "name": "juicefs-csi-node"}),
        "restart_csi_again": fault_lab.kube.clear_faults,
    }
    outcome = run.go()
    assert outcome == "rolled back", run.errors
    assert "panic: ordered to crash" in run.errors["wait_for_rollouts"]
    assert_all_on(fault_lab, sides.source)
    tell("wait_for_rollouts", "crash loop of the node component", "-", f"{outcome}, all old")

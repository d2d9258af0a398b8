"""What counts as proven: what a task left when it ran to its end, and only while it is not out of date."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from include.juicefs_storage.switch.evidence import Evidence, proven_clients, stale_proofs_of_blocks, unproven

START = datetime(2026, 1, 1, tzinfo=UTC)
PLAN = "uuid/fingerprint"
#: The steps in the order in which they run, a minute each.
STEPS = ("write_setting", "restart_csi", "settle", "wait_for_rollouts", "prove_clients", "prove_blocks",
         "prove_fresh_mount", "prove_no_restarts", "catch_up_late")  # fmt: skip
RESULTS: dict[str, dict[str, Any]] = {"write_setting": {"written": True}, "restart_csi": {"restarted": ["a"]}}


def left(minute: int, plan: str = PLAN, **result: Any) -> Evidence:
    began_at = START + timedelta(minutes=minute)
    return Evidence(began_at, began_at + timedelta(seconds=59), plan, result)


@pytest.fixture
def evidence() -> dict[str, Evidence]:
    """Of a run in which every step ran once, in order."""
    return {step: left(minute, **RESULTS.get(step, {})) for minute, step in enumerate(STEPS)}


def test_a_run_whose_steps_all_ran_is_proven(evidence: dict[str, Evidence]) -> None:
    assert unproven(STEPS, evidence, PLAN) == {}
    assert stale_proofs_of_blocks(STEPS, evidence) == []


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_left_nothing_is_not_proven(step: str, evidence: dict[str, Evidence]) -> None:
    del evidence[step]
    assert list(unproven(STEPS, evidence, PLAN)) == [step]
    assert "set by hand" in unproven(STEPS, evidence, PLAN)[step]


@pytest.mark.parametrize("step", STEPS)
def test_evidence_of_another_plan_does_not_count(step: str, evidence: dict[str, Evidence]) -> None:
    evidence[step] = left(STEPS.index(step), "uuid/another", **RESULTS.get(step, {}))
    assert "another plan" in unproven(STEPS, evidence, PLAN)[step]


def test_proofs_from_before_the_setting_was_written_again_do_not_count(evidence: dict[str, Evidence]) -> None:
    evidence["write_setting"] = left(20, written=True)
    assert set(unproven(STEPS, evidence, PLAN)) == {"settle", "prove_clients", "prove_fresh_mount", "prove_no_restarts"}
    # It found the setting as it should be, and changed nothing.
    evidence["write_setting"] = left(20, written=False)
    assert unproven(STEPS, evidence, PLAN) == {}


@pytest.mark.parametrize("skew", [timedelta(minutes=-5), timedelta(minutes=5)])
def test_the_clocks_of_the_workers_may_differ(skew: timedelta, evidence: dict[str, Evidence]) -> None:
    """A healthy volume was rolled back where the clock of a worker was half a minute ahead of another one's."""
    written, proven = evidence["write_setting"], evidence["prove_clients"]
    evidence["prove_clients"] = replace(
        proven,
        began_at=proven.began_at + skew,
        ended_at=(ended_at := proven.ended_at + skew),
        seen={"write_setting": written.ended_at},
    )
    evidence["prove_blocks"] = replace(evidence["prove_blocks"], seen={"prove_clients": ended_at})
    evidence["catch_up_late"] = replace(evidence["catch_up_late"], seen={"prove_clients": ended_at})
    assert unproven(STEPS, evidence, PLAN) == {}
    assert stale_proofs_of_blocks(STEPS, evidence) == []


@pytest.mark.parametrize("seen", [None, START])
def test_a_proof_that_began_before_what_it_must_have_seen_counts_for_nothing_whatever_the_clock_says(
    seen: datetime | None, evidence: dict[str, Evidence]
) -> None:
    evidence["prove_fresh_mount"] = replace(evidence["prove_fresh_mount"], seen={"write_setting": seen})
    evidence["prove_blocks"] = replace(evidence["prove_blocks"], seen={"prove_clients": seen})
    assert unproven(STEPS, evidence, PLAN) == {"prove_fresh_mount": "ran before the last change by write_setting"}
    assert stale_proofs_of_blocks(STEPS, evidence) == ["prove_blocks"]


def test_rollouts_from_before_the_last_restart_do_not_count(evidence: dict[str, Evidence]) -> None:
    evidence["restart_csi"] = left(20, restarted=["DaemonSet/juicefs-csi-node"])
    assert set(unproven(STEPS, evidence, PLAN)) == {"wait_for_rollouts", "prove_no_restarts"}


def test_blocks_that_were_proven_before_the_clients_are_to_be_proven_again(evidence: dict[str, Evidence]) -> None:
    evidence["prove_clients"] = left(20)
    assert stale_proofs_of_blocks(STEPS, evidence) == ["prove_blocks", "catch_up_late"]
    assert unproven(STEPS, evidence, PLAN) == {}


def test_clients_are_proven_by_several_steps(evidence: dict[str, Evidence]) -> None:
    evidence["prove_clients"] = left(4, clients=[{"pod": "a", "uid": "1"}])
    evidence["settle"] = left(2, clients=[{"pod": "b", "uid": "2"}])
    assert proven_clients(evidence) == {"1", "2"}


def test_evidence_is_read_from_the_xcom_of_a_task() -> None:
    timing = {"began_at": START.isoformat(), "applied_at": (START + timedelta(seconds=59)).isoformat(), "plan": PLAN}
    assert Evidence.of(timing, {"blocks": 3}) == left(0, blocks=3)
    assert Evidence.of({**timing, "plan": None}, "finalize") == left(0, "")

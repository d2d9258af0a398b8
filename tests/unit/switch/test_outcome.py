"""How a run ended, for every state that a volume and a run can be in."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from include.juicefs_storage.switch.change import Change, ChangeKind
from include.juicefs_storage.switch.outcome import (
    GREEN,
    RUN_MEANING,
    Observed,
    Progress,
    RunOutcome,
    failed_first,
    judge,
    meaning_of,
)

#: The volume on the new store with its one client, and a run that proved everything.
ON_NEW = Observed(on_new=True, differs=("the setting names new",), clients={"1": "pod-1"})
ALL_PROVEN = Progress(backed_up=True, proven_clients=frozenset({"1"}))
#: The volume as it was before.
ON_OLD = Observed(clients={"1": "pod-1"}, not_on_new=("client pod-1 shows old",))
MISSING = {"prove_blocks": "left no evidence"}


def test_every_outcome_has_a_meaning() -> None:
    assert set(get_args(RunOutcome)) == set(RUN_MEANING)


@pytest.mark.parametrize(
    ("observed", "progress", "outcome"),
    [
        (ON_NEW, ALL_PROVEN, "switched"),
        (ON_NEW, replace(ALL_PROVEN, returns=True), "reverted"),
        (ON_NEW, replace(ALL_PROVEN, unproven=MISSING), "held"),
        (ON_NEW, replace(ALL_PROVEN, proven_clients=frozenset()), "held"),
        (replace(ON_NEW, on_new=False), ALL_PROVEN, "moved on"),
        (replace(ON_NEW, not_on_new=("Secret a holds other values",)), ALL_PROVEN, "moved on"),
        (ON_OLD, replace(ALL_PROVEN, unproven=MISSING), "failed"),
        (ON_NEW, replace(ALL_PROVEN, superseded_by="myjfs.later"), "superseded"),
        (ON_NEW, replace(ALL_PROVEN, superseded_by="myjfs.later", went_back=True), "superseded"),
        (Observed(), replace(ALL_PROVEN, went_back=True, unproven=MISSING), "rolled back"),
        (replace(ON_NEW, on_new=False), replace(ALL_PROVEN, went_back=True), "half rolled back"),
        # The old store does not serve: the rollback did not begin.
        (ON_NEW, replace(ALL_PROVEN, went_back=True, unproven_back=MISSING), "held"),
        (Observed(), replace(ALL_PROVEN, went_back=True, unproven_back=MISSING), "half rolled back"),
        (Observed(unreadable="no answer"), replace(ALL_PROVEN, went_back=True), "half rolled back"),
        (Observed(unreadable="no answer"), ALL_PROVEN, "unknown"),
        (Observed(), Progress(refused=True), "refused"),
        (Observed(), Progress(refused=True, dry_run=True), "refused"),
        (Observed(), Progress(dry_run=True), "planned"),
        (Observed(), Progress(rejected=True), "rejected"),
        (Observed(), Progress(), "failed"),
        # A check of a run that holds was cleared, and refused.
        (ON_NEW, replace(ALL_PROVEN, refused=True, unproven=MISSING), "held"),
    ],
)
def test_the_outcome(observed: Observed, progress: Progress, outcome: RunOutcome) -> None:
    found, missing = judge(observed, progress)
    assert found == outcome
    assert bool(missing) == (outcome in {"held", "half rolled back", "moved on", "superseded", "unknown"} or
                             (outcome == "failed" and progress.backed_up))  # fmt: skip


lines = st.lists(st.sampled_from(["a", "b"]), max_size=2).map(tuple)
reasons = st.dictionaries(st.sampled_from(["prove_clients", "prove_blocks"]), st.just("left no evidence"))
uids = st.sets(st.sampled_from(["1", "2"]))


@given(
    st.builds(
        Observed,
        unreadable=st.sampled_from(["", "no answer"]),
        on_new=st.booleans(),
        differs=lines,
        not_on_new=lines,
        clients=uids.map(lambda found: {uid: f"pod-{uid}" for uid in found}),
    ),
    st.builds(
        Progress,
        refused=st.booleans(),
        dry_run=st.booleans(),
        rejected=st.booleans(),
        backed_up=st.booleans(),
        superseded_by=st.sampled_from(["", "myjfs.later"]),
        went_back=st.booleans(),
        unproven=reasons,
        unproven_back=reasons,
        proven_clients=uids.map(frozenset),
        returns=st.booleans(),
    ),
)
def test_no_run_is_green_without_every_proof(observed: Observed, progress: Progress) -> None:
    outcome, missing = judge(observed, progress)
    if outcome not in GREEN:
        return
    assert missing == ()
    assert not progress.refused or progress.backed_up
    if progress.backed_up:
        assert observed.on_new
        assert not observed.unreadable
        assert not observed.not_on_new
        assert not progress.unproven
        assert not progress.superseded_by
        assert not progress.went_back
        assert set(observed.clients or ()) <= progress.proven_clients
    else:
        assert progress.dry_run


def test_the_failure_that_is_named_is_the_first_in_the_order_of_the_runbook() -> None:
    order = ("prove_clients", "prove_blocks", "settle_again")
    failed = {"prove_clients": "success", "prove_blocks": "failed", "settle_again": "failed"}
    assert failed_first(order, failed, {}) == "prove_blocks"
    assert failed_first(order, dict.fromkeys(order, "success"), {"prove_blocks": "left no evidence"}) == "prove_blocks"
    assert failed_first(order, dict.fromkeys(order, "success"), {}) == ""


@pytest.mark.parametrize("outcome", get_args(RunOutcome))
def test_no_outcome_says_that_every_client_is_proven_where_one_was_accepted(outcome: RunOutcome) -> None:
    meaning = meaning_of(outcome, ["vm:s3gateway"])
    assert "every client" not in meaning.lower()
    assert ("`vm:s3gateway`" in meaning) is (outcome in {"switched", "reverted", "rolled back"})
    assert meaning_of(outcome, []) == RUN_MEANING[outcome]


@pytest.mark.parametrize("kind", ["keys", "address"])
def test_where_the_clients_keep_their_store_no_other_store_is_spoken_of(kind: ChangeKind) -> None:
    change = Change(kind=kind)
    for outcome in ("switched", "reverted", "rolled back"):
        meaning = meaning_of(outcome, [], change)
        assert kind in meaning
        assert "every client" in meaning.lower()
        assert "new store" not in meaning
        assert "old store" not in meaning
    assert meaning_of("held", [], change) == RUN_MEANING["held"]

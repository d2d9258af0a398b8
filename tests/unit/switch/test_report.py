"""What the report says of each proof."""

from __future__ import annotations

from typing import Any

import pytest

from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.plan import StorageView
from include.juicefs_storage.switch.report import OLD_KEY, Report, accepted_in, accepted_lines, proof_lines
from include.juicefs_storage.tasks.switch.apply import APPLY
from include.juicefs_storage.tasks.switch.judgement import ROLLBACK
from tests.support.fakes import NEW, OLD


def test_the_report_tells_what_the_window_cost() -> None:
    lines = proof_lines(
        {
            "prove_clients": {"clients": [{"pod": "a", "node": "n", "after_s": 9.0, "was_stuck": True}]},
            "write_setting": {"written": True, "put_right": ["TrashDays"], "lost": ["Capacity"]},
            "follow_writes": {"copied": 7, "slowest_s": 0.4, "problem": "the store is down."},
            "prove_no_restarts": {
                "mount_pods": 2, "business_pods": 1, "restarted": [], "failed_requests": 3, "failed_in": {"a": 3},
            },
            "catch_up_late": {"waited_s": 360, "copied": 1, "blocks": 99},
        }
    )  # fmt: skip
    for words in (
        "9.0 s into `prove_clients`, when the setting had been written once more",
        "changed TrashDays of the setting while it was written; the new values were put back",
        "changed Capacity of the setting while it was written, and that is lost",
        "7 blocks that clients still wrote to the old store while they moved were copied at once, the slowest 0.4 s",
        "the later copies made up for it: the store is down.",
        "3 object requests failed in the clients while they moved: 3 in `a`",
        "360 s after the last client had moved 1 more blocks were found and copied; all 99 blocks",
    ):
        assert [line for line in lines if words in line], words
    assert proof_lines({"catch_up_late": {"copied": 0, "waited_s": 0}}) == [
        "late commits were not waited for: late_commit_s=0"
    ]


def test_the_report_names_pods_that_restarted_for_other_reasons() -> None:
    result = {"mount_pods": 2, "business_pods": 1, "restarted": ["mount pod a: UID 1 → 2"], "blocks": 9}
    (line,) = proof_lines({"prove_no_restarts": result})
    assert "which this run does to none: mount pod a: UID 1 → 2." in line
    assert "all 9 blocks" in line


@pytest.mark.parametrize(
    ("client", "words"),
    [
        ({"at": "2026-01-31T09:00:20+00:00"}, "20 s after the setting was written: within the 30 s"),
        ({"at": "2026-01-31T09:01:20+00:00"}, "80 s after the setting was written: whether within the 30 s"),
        ({"at": "2026-01-31T09:01:20+00:00", "reloaded_s": 12.0}, "which it had read after 12 s: within the 30 s"),
        ({"at": "2026-01-31T09:01:20+00:00", "reloaded_s": 31.0}, "which it had read after 31 s: later than the 30 s"),
        ({}, "1.0 s into `prove_clients`"),
    ],
)
def test_the_report_tells_whether_each_client_moved_within_the_time_that_the_runbook_expects(
    client: dict[str, Any], words: str
) -> None:
    proven = {"pod": "a", "node": "n", "after_s": 1.0, "by": "block", **client}
    written = {"written": True, "written_at": "2026-01-31T09:00:00+00:00"}
    (line,) = proof_lines({"write_setting": written, "prove_clients": {"clients": [proven]}})
    assert words in line
    (line,) = proof_lines({"write_setting": {"written": False}, "prove_clients": {"clients": [proven]}})
    assert "1.0 s into `prove_clients`" in line


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ({}, "nothing was seen of it: the store that the clients leave was not looked at afterwards"),
        ({"catch_up_late": {"unseen": "no answer."}}, "nothing was seen of it: no answer."),
        ({"catch_up_late": {"late_writes": 2}}, "2 blocks were written to the store that the others had left"),
        (
            {"catch_up_late": {"late_writes": 0, "waited_s": 360, "slice_ids": 4096}},
            "no new block was on the store that the others had left, 360 s after the last of them, while clients took",
        ),
    ],
)
def test_the_report_says_what_was_seen_of_a_client_that_is_not_proven(results: dict[str, Any], words: str) -> None:
    (line,) = accepted_lines(["vm:s3gateway"], results)
    assert line.startswith("client `vm:s3gateway` is **not proven**, which was accepted; ")
    assert words in line


def test_blocks_that_were_damaged_before_are_named() -> None:
    (line,) = proof_lines({"follow_writes": {"damaged": ["b", "a"]}, "decide": {"damaged": ["a"]}})
    assert line.startswith("**2 blocks were damaged before this run** and were copied as they are (`a`, `b`)")


def test_clients_that_were_accepted_after_the_plan_are_named_too() -> None:
    results = {"prove_clients": {"accepted": ["vm:s3gateway", "vm:/mnt"]}}
    assert accepted_in(["vm:s3gateway"], results) == ("vm:/mnt", "vm:s3gateway")


def test_a_task_that_ended_without_a_result_is_not_spoken_of() -> None:
    """Its process died between the two: the report is written all the same."""
    assert proof_lines({task: {} for task in (*APPLY, *ROLLBACK, "collect_diagnostics")}) == []


def test_the_report_of_other_keys_speaks_of_no_other_store_and_of_no_copy() -> None:
    results: dict[str, dict[str, Any]] = {
        "copy_ahead": {"copied": 0}, "follow_writes": {"copied": 0}, "catch_up": {"copied": 0},
        "prove_clients": {"clients": [{"pod": "a", "node": "n", "after_s": 1.0, "by": "log"}]},
        "prove_blocks": {"blocks": 9}, "prove_fresh_mount": {"objects": 1},
        "catch_up_late": {"copied": 0, "waited_s": 0, "one_store": True},
    }  # fmt: skip
    text = "\n".join(proof_lines(results, Change(kind="keys")))
    assert "new store" not in text
    assert "old store" not in text
    assert "blocks were copied" not in text
    assert "nothing was copied: the clients keep their store" in text
    assert "a fresh mount with an empty cache read, wrote and listed by the new keys" in text
    assert "all 9 blocks that files refer to are on the store" in text
    assert "0 blocks were copied before the setting was written" in "\n".join(proof_lines(results))


@pytest.mark.parametrize("refused", [False, True])
def test_the_report_says_when_the_key_of_the_backup_does_not_work_any_more(refused: bool) -> None:
    report = Report(
        outcome="switched", meaning="", run_id="r", volume="v", before=StorageView.of(OLD), after=StorageView.of(NEW),
        change=Change(kind="keys"), setting_now=None, backup_id="v.r", approved_by=None, approval="", findings=(),
        states={}, took_s={}, proofs=(), results={}, old_key_refused=refused,
    )  # fmt: skip
    text = report.to_markdown()
    assert ("at any time: `juicefs_storage_revert`" in text) != refused
    assert ("the key in the backup does not open" in text) == refused
    assert (OLD_KEY in text) != refused

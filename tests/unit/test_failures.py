"""What a run that is not green says first, and what it says where no task could write a report."""

from __future__ import annotations

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.failures import Failure, error_record, first_failure, unreported_end

PLAN = {"volume": "home", "before": {"bucket": "http://old/data"}, "after": {"bucket": "http://new/data"}}
CHECKED = {"plan": "success", "backup": "success", "copy_ahead": "success"}


def end(states: dict[str, str], dag: str = "switch", **params: str) -> str:
    return unreported_end(f"juicefs_storage_{dag}", "failed", states, {"plan": PLAN}, params)


def test_a_failure_is_a_link_an_error_and_a_next_command() -> None:
    error = error_record(PermanentError("Expected a bucket,\nfound none.", state="as before", next_step="make it"))
    assert Failure.of("juicefs_storage_sync", "run 1", "check", 3, error).to_markdown() == (
        "**[check](dags/juicefs_storage_sync/runs/run%201/tasks/check/mapped/3) failed**: "
        "Expected a bucket, found none. **Next**: make it."
    )


def test_a_task_that_left_no_error_was_killed() -> None:
    line = Failure.of("juicefs_storage_sync", "r", "check", -1, {}).to_markdown()
    assert "(dags/juicefs_storage_sync/runs/r/tasks/check) failed**: No error was recorded" in line
    assert line.endswith("**Next**: see its log.")


def test_a_log_names_the_state_and_the_next_command() -> None:
    assert Failure("check", problem="Broken.", state="as before", next_step="mend it").to_text() == [
        "First failed: check. Broken.", "State at that time: as before", "Next: mend it",
    ]  # fmt: skip
    assert Failure("check").to_text()[-1] == "Next: see its log"


def test_the_cause_comes_first_and_not_the_task_that_reports_it() -> None:
    order = ["plan", "copy", "verify", "finalize"]
    failures = [Failure("finalize"), Failure("verify"), Failure("copy", 7), Failure("copy", 2)]
    assert first_failure(failures, order) == Failure("copy", 2)
    assert first_failure(failures[:1], order) == failures[0]
    assert first_failure([], order) is None


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ({"plan": "failed"}, ["Volume `home` is where it was. Trigger"]),
        (CHECKED, ["Volume `home` is where it was.", "Still held: this volume's Lease"]),
        (CHECKED | {"write_setting": "skipped"}, ["is where it was"]),
        (
            CHECKED | {"write_setting": "failed"},
            ["was being moved from `http://old/data` to `http://new/data`", "either"],
        ),
        (CHECKED | {"write_setting": "success"}, ["`home` was moved from `http://old/data` to `http://new/data`."]),
        (
            CHECKED | {"write_setting": "success", "restore_setting": "failed"},
            ["was being moved back from `http://new/data` to `http://old/data`", "may name either"],
        ),
        (CHECKED | {"write_setting": "success", "restore_setting": "success"}, ["its setting is back"]),
        (CHECKED | {"write_setting": "success", "restore_setting": "skipped"}, ["was moved from"]),
    ],
)
@pytest.mark.parametrize("dag", ["switch", "revert"])
def test_a_run_that_was_marked_says_where_the_volume_is(states: dict[str, str], words: list[str], dag: str) -> None:
    text = end(states, dag)
    assert "nothing is proven" in text
    assert [word for word in words if word not in text] == []
    touched = "write_setting" in states and states["write_setting"] != "skipped"
    assert ("clear `decide` with Downstream" in text) is touched


def test_what_is_held_is_named() -> None:
    moved = CHECKED | {"write_setting": "success"}
    assert "write fence" not in end(moved)
    assert "the last task's end and the write fence" in end(moved, fence_conn_id="a")


@pytest.mark.parametrize(
    ("dag", "word"),
    [("fleet", "Runs of volumes that were started continue"), ("sync", "stays"), ("rehearsal", "Nothing")],
)
def test_other_dags_say_what_is_left(dag: str, word: str) -> None:
    assert word in end({}, dag)

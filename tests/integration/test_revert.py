"""Going back to a backup, weeks later as it were: by its id alone, on a volume in use, and back again from there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lab.environment import Lab
from tests.support.harness import SHORT, Run
from tests.support.world import assert_all_on, assert_nothing_left_over, assert_nothing_lost, row, writing

REVERT = "juicefs_storage_revert"


@pytest.fixture(scope="module")
def runs(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Makes runs; the volume was switched by the first of them. Both stores are left as they were found."""
    before = lab.new_store.objects()

    def make(run_id: str, dag_id: str, **params: Any) -> Run:
        return Run(lab, tmp_path_factory.mktemp("run"), run_id, params, dag_id=dag_id)

    lab.seed(10)
    lab.copy_to_new_store()
    yield make
    client = lab.new_store.client()
    for key in lab.new_store.objects().keys() - before.keys():
        client.delete_object(Bucket=lab.new_store.bucket, Key=key)


def revert(make: Any, run_id: str, backup_id: str, **params: Any) -> Run:
    """A run that is given the backup and nothing else that the run before could tell it."""
    given = {"backup_id": backup_id, "dry_run": False, "require_approval": False} | params
    run: Run = make(run_id, REVERT, **given)
    run.states["choose_backup"] = "success"  # there is nothing to choose
    run.go()
    return run


def outcome(run: Run) -> str:
    found: str = run.xcom("finalize", "report")["outcome"]
    return found


def failures(run: Run) -> dict[str, str]:
    return {task: error for task, error in run.errors.items() if error}


@pytest.mark.slow
def test_back_to_the_backup_of_a_switch(lab: Lab, runs: Any) -> None:
    first_row = row(lab)
    target = {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket}
    switch = runs("same-id", "juicefs_storage_switch", **target, **SHORT)
    late = "myjfs/chunks/0/3/3999_0_5"

    def commit_late() -> None:
        """As a slice that goes into the metadata minutes after its block went to the old store."""
        assert switch.states["prove_blocks"] == "success"
        lab.old_store.client().put_object(Bucket=lab.old_store.bucket, Key=late, Body=b"later")
        lab.mariadb.query("INSERT INTO jfs_chunk_ref (chunkid, size, refs) VALUES (3999, 5, 1)")

    switch.before["catch_up_late"] = commit_late
    with writing(lab, "reverted") as writer:
        assert switch.go() == "switched", failures(switch)
        assert_all_on(lab, lab.new_store)
        assert lab.new_store.objects()[late] == lab.old_store.objects()[late]
        lab.mariadb.query("DELETE FROM jfs_chunk_ref WHERE chunkid = 3999")
        report = switch.xcom("finalize", "report")
        assert switch.xcom("write_setting")["followed"] is True
        assert report["results"]["follow_writes"]["problem"] == ""
        assert report["results"]["catch_up_late"]["waited_s"] == SHORT["late_commit_s"]
        assert report["results"]["catch_up_late"]["copied"] >= 1
        assert [line for line in report["proofs"] if line.startswith("2 s after the last client had moved ")]
        moved_row, backup_id = row(lab), switch.xcom("finalize", "report")["backup_id"]

        rehearsed = revert(runs, "rehearsed", backup_id, dry_run=True)
        assert outcome(rehearsed) == "planned", failures(rehearsed)
        assert f"to backup `{backup_id}`" in rehearsed.xcom("plan", "markdown")
        assert row(lab) == moved_row

        # The same run id as the switch: another DAG's run, with a backup of its own.
        back = revert(runs, "same-id", backup_id)
        assert outcome(back) == "reverted", failures(back)
        assert back.xcom("finalize", "report")["backup_id"] != backup_id
        assert back.xcom("plan")["steps"] == rehearsed.xcom("plan")["steps"]
    assert row(lab) == first_row
    assert_all_on(lab, lab.old_store)
    assert_nothing_left_over(lab)
    lab.new_store.stop()
    try:
        assert_nothing_lost(lab, writer)
    finally:
        lab.new_store.start()


@pytest.mark.slow
def test_a_revert_can_itself_be_reverted(lab: Lab, runs: Any) -> None:
    """Follows the test above: the backup of its revert says that the volume was on the new store."""
    first_row = row(lab)
    there = revert(runs, "again", f"{lab.volume.name}.revert-same-id")
    assert outcome(there) == "reverted", failures(there)
    assert_all_on(lab, lab.new_store)
    home = revert(runs, "home", there.xcom("finalize", "report")["backup_id"])
    assert outcome(home) == "reverted", failures(home)
    assert row(lab) == first_row
    assert_all_on(lab, lab.old_store)


@pytest.mark.slow
def test_a_backup_that_is_not_there_is_refused_with_those_that_are(lab: Lab, runs: Any) -> None:
    """The first test of the file left a backup."""
    run = revert(runs, "typo", "myjfs.same-di")
    assert outcome(run) == "refused"
    assert "There is no backup 'myjfs.same-di'" in run.errors["plan"]
    assert "myjfs.same-id" in run.errors["plan"]


def test_a_mistyped_param_is_refused_by_name(lab: Lab, runs: Any) -> None:
    run = revert(runs, "mistyped", "myjfs.same-id", dryrun=False)
    assert "`dryrun` is not a param of this DAG" in run.errors["plan"]

"""A volume that lost a block long ago: named before anything is written, and moved where the loss is accepted."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab.environment import Lab
from tests.support.harness import SHORT, Run
from tests.support.world import Sides, assert_all_on, assert_nothing_left_over, row


@pytest.fixture
def lost(lab: Lab) -> Iterator[str]:
    """The key of a block of a file that neither store has."""
    lab.seed(5)
    sides = Sides.of(lab)
    before = sides.source.objects("myjfs/chunks/").keys()
    file = lab.mounts()[0] / "lost-file"
    with file.open("wb") as opened:
        opened.write(os.urandom(100_000))
        opened.flush()
        os.fsync(opened.fileno())
    (key,) = sides.source.objects("myjfs/chunks/").keys() - before
    lab.copy_to_new_store()
    for store in (sides.source, sides.target):
        store.client().delete_object(Bucket=store.bucket, Key=key)
    yield key
    file.unlink()


@pytest.mark.timeout(600)
def test_a_lost_block_is_refused_and_goes_along_where_it_is_accepted(
    lab: Lab, lost: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def start(name: str, **params: int) -> Run:
        run = Run(lab, tmp_path_factory.mktemp(name), name, Sides.of(lab).params | SHORT | params)
        run.go()
        return run

    before = row(lab)
    refused = start("refused")
    assert "write_setting" not in {task for task, state in refused.states.items() if state == "success"}
    assert f"1 blocks that files refer to are not whole on the old store, such as {lost}" in refused.errors["plan"]
    assert "Files of these: /lost-file." in refused.errors["plan"]
    assert row(lab) == before

    for name in ("there", "and-back"):
        target = Sides.of(lab).target
        run = start(name, accept_lost_blocks=1)
        report = run.xcom("finalize", "report")
        assert report["outcome"] == "switched", run.errors
        assert_all_on(lab, target)
        assert run.xcom("plan")["lost_blocks"] == [lost]
        for task in ("prove_blocks", "catch_up_late"):
            assert report["results"][task]["lost_before"] == 1
        said = [line for line in report["proofs"] if "all but 1 that were lost before the run" in line]
        assert len(said) == 2
    assert_nothing_left_over(lab)

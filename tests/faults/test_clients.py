"""What clients have under way at the cut-over, and clients that are no writable mount pods."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lab.environment import Lab
from lab.process import wait_for
from tests.support.harness import Start
from tests.support.world import Sides, assert_nothing_lost


def _uploading(mount: Path) -> bool:
    return "juicefs_object_request_uploading 0\n" not in (mount / ".stats").read_text()


@pytest.mark.slow
def test_the_cut_over_waits_until_no_client_uploads(fault_lab: Lab, start: Start) -> None:
    run = start(wait_for_quiet_s=60)
    assert run.go() == "switched", run.errors
    quiet = run.xcom("write_setting")["quiet"]
    assert quiet["quiet"]
    assert quiet["waited_s"] < 60
    shown = run.xcom("plan", "markdown")
    assert shown.count("0 uploads, 0 staged blocks") == len(fault_lab.mounts())
    assert "wait up to 60 s until no client uploads" in shown
    report = run.xcom("finalize", "markdown")
    assert "no client uploaded when the setting was written" in report
    assert all(client["reloaded_s"] < 30 for client in run.xcom("prove_clients")["clients"])
    assert report.count("within the 30 s that the runbook expects") == len(fault_lab.mounts())


def test_the_cut_over_goes_ahead_while_a_client_uploads_when_its_time_is_over(
    fault_lab: Lab, sides: Sides, start: Start
) -> None:
    """The old store refuses the block until the client has moved."""
    file, content = fault_lab.mounts()[0] / "under-way", secrets.token_bytes(100_000)
    run = start(wait_for_quiet_s=2)
    with ThreadPoolExecutor(1) as pool:

        def begin() -> None:
            sides.source.refuse_writes()
            pool.submit(file.write_bytes, content)
            wait_for("the upload is under way", lambda: _uploading(fault_lab.mounts()[0]), deadline_s=20)

        run.before = {"write_setting": begin}
        try:
            assert run.go() == "switched", run.errors
        finally:
            sides.source.allow_writes()
    quiet = run.xcom("write_setting")["quiet"]
    assert not quiet["quiet"]
    assert ["1 upload" in load for load in quiet["busy"].values()] == [True]
    assert "the setting was written while clients uploaded" in run.xcom("finalize", "markdown")
    with fault_lab.fresh_mount() as mount:
        assert (mount / file.name).read_bytes() == content
    file.unlink()
    assert_nothing_lost(fault_lab)

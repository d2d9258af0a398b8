"""What clients have under way at the cut-over, and clients that are no writable mount pods."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kubernetes import client, config

from lab.environment import Lab
from lab.process import wait_for
from tests.support.harness import Start
from tests.support.mounted import mounted
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


@pytest.fixture(scope="module")
def core(fault_lab: Lab) -> client.CoreV1Api:
    return client.CoreV1Api(config.new_client_from_config(str(fault_lab.kube.kubeconfig)))


def test_a_mount_that_only_reads_is_proven_by_what_it_reads(
    fault_lab: Lab, core: client.CoreV1Api, start: Start
) -> None:
    run = start()
    with mounted(core, "ro") as pod:
        assert run.go() == "switched", run.errors
    by = {row["pod"]: row["by"] for row in run.xcom("prove_clients")["clients"]}
    assert by.pop(pod.metadata.name) == "read"
    assert set(by.values()) == {"block"}
    assert "read a block that it had never read and that only the new store has" in run.xcom("finalize", "markdown")
    assert_nothing_lost(fault_lab)


@pytest.mark.slow
def test_a_mount_that_only_reads_and_stays_on_the_old_store_fails_the_run(
    fault_lab: Lab, core: client.CoreV1Api, start: Start
) -> None:
    """It cannot build its new storage, and shows the new bucket."""
    run = start()
    with mounted(core, "ro") as pod:
        broken = fault_lab.kube.state / "pods" / pod.metadata.uid / "rootfs/root/.aws/config"
        broken.parent.mkdir(exist_ok=True)
        run.before = {
            "write_setting": lambda: broken.write_text("[default]\nretry_mode = broken\n"),
            "collect_diagnostics": broken.unlink,
        }
        assert run.go() == "rolled back", run.errors
    assert "1 of 3 clients" in run.errors["prove_clients"]
    assert f"{pod.metadata.name}: it could not use the setting" in run.errors["prove_clients"]
    assert_nothing_lost(fault_lab)

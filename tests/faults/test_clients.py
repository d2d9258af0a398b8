"""What clients have under way at the cut-over, and clients that are no writable mount pods."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from botocore.exceptions import BotoCoreError
from kubernetes import client, config

from lab.environment import Lab
from lab.process import Server, binary, free_ports, wait_for
from lab.seaweed import Store
from tests.support.faults import StuckClient, fails
from tests.support.harness import Start
from tests.support.mounted import mounted
from tests.support.world import Sides, assert_nothing_lost

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


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


@pytest.mark.slow
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
    checked = next(row for row in run.xcom("check_volume", "findings") if row["check"] == "canaries")
    assert "through each of 2 mounts" in checked["message"]
    assert "1 that only read have each read one" in checked["message"]
    assert "read a block that it had never read and that only the new store has" in run.xcom("finalize", "markdown")
    assert_nothing_lost(fault_lab)


@pytest.mark.slow
def test_a_mount_that_only_reads_and_stays_on_the_old_store_fails_the_run(
    fault_lab: Lab, core: client.CoreV1Api, start: Start
) -> None:
    """It cannot build its new storage, and shows the new bucket."""
    run = start()
    with mounted(core, "ro") as pod:
        stuck = StuckClient.of(fault_lab, pod.metadata.uid)
        run.before = {"write_setting": stuck.stick, "collect_diagnostics": stuck.release}
        assert run.go() == "rolled back", run.errors
    assert "1 of 3 clients" in run.errors["prove_clients"]
    assert f"{pod.metadata.name}: it could not use the setting" in run.errors["prove_clients"]
    assert_nothing_lost(fault_lab)


def _serves(store: Store) -> bool:
    try:
        return bool(store.client().list_buckets())
    except BotoCoreError:
        return False


@pytest.fixture
def gateway(fault_lab: Lab, tmp_path: Path) -> Iterator[S3Client]:
    """A `juicefs gateway` of the volume on the host: a client that is no mount pod."""
    port, secret = free_ports(1)[0], "gateway-secret"
    command: list[str | Path] = [
        binary("juicefs"), "gateway", "--no-usage-report", "--backup-meta=0", "--heartbeat=1",
        f"--cache-dir={tmp_path / 'cache'}", fault_lab.mariadb.meta_url, f"127.0.0.1:{port}",
    ]  # fmt: skip
    root = {"MINIO_ROOT_USER": "gateway", "MINIO_ROOT_PASSWORD": secret}
    server = Server.start(
        tmp_path, "gateway", command, env={"META_PASSWORD": fault_lab.mariadb.password, "HOME": str(tmp_path)} | root
    )
    store = Store(tmp_path, "gateway", [0, 0, 0, port], fault_lab.volume.name, "gateway", secret)
    try:
        wait_for("the gateway serves", lambda: _serves(store), deadline_s=60, server=server)
        yield store.client()
    finally:
        server.stop()
        fault_lab.mariadb.query("DELETE FROM jfs_session2 WHERE info LIKE '%s3gateway%'")


def test_a_gateway_is_refused_until_it_is_accepted_by_name(fault_lab: Lab, gateway: S3Client, start: Start) -> None:
    refused = start()
    assert refused.go() == "refused"
    name = f"{socket.gethostname()}:s3gateway"
    assert f"add `{name}` to accept_clients" in refused.errors["check_volume"]
    run = start(accept_clients=[name])
    run.before["prove_blocks"] = lambda: gateway.put_object(Bucket=fault_lab.volume.name, Key="by-gateway", Body=b"x")
    assert run.go() == "switched", run.errors
    assert f"accepted and will not be proven\n- `{name}`" in run.xcom("plan", "markdown")
    report = run.xcom("finalize", "markdown")
    assert "Every client" not in report
    assert f"**Not proven**, and accepted by name: `{name}`" in "\n".join(report.splitlines()[:4])
    assert f"client `{name}` is **not proven**, which was accepted; no new block was on the store" in report
    assert "Not proven, accepted by name: 1 client." in run.xcom("finalize", "note")
    assert_nothing_lost(fault_lab)


@pytest.mark.slow
def test_a_failure_after_the_cut_over_proves_a_reader_back_and_names_a_gateway(
    fault_lab: Lab, core: client.CoreV1Api, gateway: S3Client, start: Start
) -> None:
    name = f"{socket.gethostname()}:s3gateway"
    run = start(fails("prove_no_restarts"), accept_clients=[name])
    with mounted(core, "ro") as pod:
        assert run.go() == "rolled back", run.errors
    by = {row["pod"]: row["by"] for row in run.xcom("prove_clients_on_old")["clients"]}
    assert by[pod.metadata.name] == "read"
    report = run.xcom("finalize", "markdown")
    assert f"client `{name}` is **not proven**, which was accepted" in report
    gateway.put_object(Bucket=fault_lab.volume.name, Key="by-gateway-again", Body=b"x")
    assert_nothing_lost(fault_lab)

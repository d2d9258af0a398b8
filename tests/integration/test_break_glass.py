"""With Airflow gone one command brings a volume home: from a backup's file, its key, a kubeconfig and nothing else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from lab.environment import Lab
from tests.support.harness import SHORT, Run, backup_key
from tests.support.world import Sides, assert_all_on, assert_nothing_lost, row, writing

ROOT = Path(__file__).parents[2]
Glass = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def moved(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sides, Path]]:
    """A volume that a run has moved, and the file of its backup. Both stores are left as they were found."""
    before = lab.new_store.objects()
    lab.seed(10)
    lab.copy_to_new_store()
    sides = Sides.of(lab)
    run = Run(lab, tmp_path_factory.mktemp("run"), "before-the-fire", sides.params | SHORT)
    assert run.go() == "switched", run.errors
    yield sides, lab.state / "backups" / f"{lab.volume.name}.before-the-fire.backup"
    client = lab.new_store.client()
    for key in lab.new_store.objects().keys() - before.keys():
        client.delete_object(Bucket=lab.new_store.bucket, Key=key)


@pytest.fixture
def glass(lab: Lab, moved: tuple[Sides, Path], tmp_path: Path) -> Glass:
    """Run the command where Airflow cannot be imported."""
    (tmp_path / "airflow.py").write_text("raise ImportError('Airflow is gone')")
    (tmp_path / "key").write_text(backup_key())

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{tmp_path}:{ROOT}", "HOME": str(tmp_path)}
        options = ["--key-file", str(tmp_path / "key"), "--kubeconfig", str(lab.kube.kubeconfig), *words]
        command = [sys.executable, "-m", "include.juicefs_storage.break_glass", str(moved[1]), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=200)
        keys = [key for store in (lab.old_store, lab.new_store) for key in (store.access_key, store.secret_key)]
        assert [key for key in (*keys, lab.mariadb.password, backup_key()) if key in done.stdout + done.stderr] == []
        return done

    return run


def test_the_way_back_is_printed_refused_and_carried_out(lab: Lab, moved: tuple[Sides, Path], glass: Glass) -> None:
    sides, _ = moved
    where, stale = row(lab), "juicefs_storage_switch/a-run-that-died"
    planned = glass()
    assert planned.returncode == 0, planned.stderr
    assert f"Back to: {sides.source.bucket_url}" in planned.stdout
    assert len(re.findall(rf"on node-\d: {sides.target.bucket_url}", planned.stdout)) == 2
    assert "Nothing was changed" in planned.stdout
    assert row(lab) == where

    # A run that Airflow took with it still holds the volume.
    _hold(lab, stale)
    refused = glass("--apply")
    assert refused.returncode == 1
    assert stale in refused.stderr
    assert row(lab) == where

    sides.source.stop()
    try:
        dead = glass("--apply", "--take-lease")
        assert dead.returncode == 1
        assert "does not serve" in dead.stderr or "Connection refused" in dead.stderr or "cannot use" in dead.stderr
        assert_all_on(lab, sides.target)
    finally:
        sides.source.start()

    with writing(lab, "break-glass") as writer:
        done = glass("--apply", "--take-lease")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Done: every client names" in done.stdout
    assert_all_on(lab, sides.source)
    assert_nothing_lost(lab, writer)
    again = glass("--apply")
    assert again.returncode == 0, again.stderr
    assert "wrote the setting" not in again.stdout


def _hold(lab: Lab, holder: str) -> None:
    from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
    from include.juicefs_storage.switch.lease import VolumeLease, lease_name
    from include.juicefs_storage.volume.setting import Setting

    cluster = KubernetesCluster.from_kubeconfig(str(lab.kube.kubeconfig), None, "juicefs")
    VolumeLease(cluster, lease_name(Setting(row(lab)).uuid), holder, now=_now).acquire()


def _now() -> datetime:
    return datetime.now(UTC)

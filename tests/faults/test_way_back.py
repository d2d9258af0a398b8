"""The way back depends on nothing that can be missing, and never leads to where the volume cannot work."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable

import pytest

from include.juicefs_storage.switch.marks import Mark
from lab.environment import Lab
from lab.writer import Writer
from tests.support.faults import BROKEN, fails
from tests.support.harness import Start, Tell, vault
from tests.support.world import Sides, assert_all_on, assert_nothing_lost, row

ANOTHER = "99999999-2222-3333-4444-555555555555"
TROUBLE: dict[str, tuple[Callable[[Sides], None], Callable[[Sides], None]]] = {
    "is dead": (lambda sides: sides.source.stop(), lambda sides: sides.source.start()),
    "refuses the key": (
        lambda sides: sides.source.take_only(sides.source.with_keys("ANOTHERKEYANOTHER001", "another-secret")),
        lambda sides: sides.source.take_only(sides.source),
    ),
    "refuses writes": (lambda sides: sides.source.refuse_writes(), lambda sides: sides.source.allow_writes()),
}


def _writes(lab: Lab) -> None:
    file = lab.mounts()[0] / f"after-{os.urandom(4).hex()}"
    with file.open("wb") as written:
        written.write(b"x" * 4096)
        written.flush()
        os.fsync(written.fileno())


@pytest.mark.parametrize(
    "trouble",
    ["is dead", *(pytest.param(trouble, marks=pytest.mark.slow) for trouble in ("refuses the key", "refuses writes"))],
)
def test_a_volume_that_works_is_not_sent_to_an_old_store_that_does_not_serve(
    trouble: str, fault_lab: Lab, sides: Sides, start: Start, writer: Writer, tell: Tell
) -> None:
    begins, ends = TROUBLE[trouble]
    run = start(fails("prove_blocks"))
    run.before = {"prove_blocks": lambda: begins(sides)}
    try:
        assert run.go() == "held", run.errors
        assert run.states["copy_back"] == "skipped"
        assert f"The old store {sides.source.bucket_url} does not serve the clients" in run.errors["finalize"]
        assert "clear `decide` with Downstream" in run.errors["finalize"]
        assert_all_on(fault_lab, sides.target)
        _writes(fault_lab)
    finally:
        ends(sides)
    run.before = {}
    run.clear("decide", downstream=True)
    outcome = run.go()
    writer.stop()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)
    assert [key for key in sides.source.objects() if "probe" in key] == []
    tell("prove_blocks", f"fails, the old store {trouble}", "decide cleared when it served", f"held, then {outcome}")


@pytest.mark.slow
def test_an_old_store_that_dies_during_the_rollback_stops_it_before_a_client_moves(
    fault_lab: Lab, sides: Sides, start: Start, writer: Writer, tell: Tell
) -> None:
    run = start(BROKEN)
    run.before = {"restore_secret": sides.source.stop}
    try:
        assert run.go() == "held", run.errors
        assert {"restore_secret", "restore_setting", "settle_again"} <= run.failed()
        assert "does not serve the clients" in run.errors["restore_setting"]
        assert_all_on(fault_lab, sides.target)
        _writes(fault_lab)
    finally:
        sides.source.start()
    run.before = {}
    run.clear("copy_back", downstream=True)
    outcome = run.go()
    writer.stop()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    assert_nothing_lost(fault_lab, writer)
    tell("restore_secret", "the old store dies", "copy_back cleared when it served", f"held, then {outcome}")


@pytest.mark.slow
def test_no_file_of_another_run_stops_a_run_or_its_way_back(
    fault_lab: Lab, sides: Sides, start: Start, tell: Tell
) -> None:
    """Junk, a mark under another key, the mark of a volume of the same name, and a folder that takes no mark."""
    run, folder = start(BROKEN), fault_lab.state / "backups"
    volume = fault_lab.volume.name
    junk = [folder / f"{volume}.{name}.backup" for name in ("junk.switched", "junk", "junk.rolled-back")]
    blocked = [folder / f"{volume}.{run.run_id}.{name}.part" for name in ("rolled-back", "diagnostics")]

    def appear() -> None:
        for file in junk:
            file.write_bytes(b"JFSW1" + os.urandom(60))
        vault(fault_lab).save(
            f"{volume}.elsewhere.switched", Mark(ANOTHER, run.triggered_at.replace(year=2100)).to_bytes()
        )
        for file in blocked:
            file.mkdir()

    run.before = {"prove_clients": appear}
    try:
        outcome = run.go()
        assert outcome == "rolled back", run.errors
        assert run.failed() == {"prove_blocks", "collect_diagnostics"}
        assert "how this run ended is not recorded beside its backup" in run.xcom("finalize", "markdown")
        assert_all_on(fault_lab, sides.source)
        leases = json.loads(fault_lab.kubectl("-n", "juicefs", "get", "leases", "-o", "json"))["items"]
        assert [lease for lease in leases if lease["spec"].get("holderIdentity")] == []
    finally:
        for file in (*junk, folder / f"{volume}.elsewhere.switched.backup"):
            file.unlink(missing_ok=True)
        for file in blocked:
            file.rmdir()
    tell("prove_clients", "junk in the folder of backups, no mark can be written", "-", f"{outcome}, all old")


@pytest.mark.parametrize(
    "what_is_left",
    ["nothing", *(pytest.param(left, marks=pytest.mark.slow) for left in ("an empty folder", "a file in its place"))],
)
def test_a_run_whose_backup_is_gone_does_not_say_that_it_changed_nothing(
    what_is_left: str, fault_lab: Lab, sides: Sides, start: Start, tell: Tell
) -> None:
    folder = fault_lab.state / "backups"
    away = folder.with_name("backups-away")

    def vanish() -> None:
        folder.rename(away)
        if what_is_left == "an empty folder":
            folder.mkdir()
        elif what_is_left == "a file in its place":
            folder.write_bytes(b"")

    run = start(BROKEN)
    run.before = {"decide": vanish}
    try:
        assert run.go() == "unknown", run.errors
        assert "backup" in run.errors["finalize"].split("not proven: ")[1]
        assert run.states["restore_setting"] in {"skipped", "upstream_failed"}
    finally:
        if folder.is_file():
            folder.unlink()
        elif folder.exists():
            folder.rmdir()
        away.rename(folder)
    assert_all_on(fault_lab, sides.target)
    run.before = {}
    run.clear("decide", downstream=True)
    outcome = run.go()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    tell("decide", f"of the folder of backups {what_is_left} is left", "decide cleared", f"unknown, then {outcome}")


def test_a_run_whose_cluster_cannot_be_reached_any_more_says_so(
    fault_lab: Lab, sides: Sides, start: Start, tell: Tell
) -> None:
    """Somebody edits the connection, or its kubeconfig is gone."""
    name, run = "AIRFLOW_CONN_KUBERNETES_DEFAULT", start(BROKEN)
    right = run.environment[name]
    wrong = json.dumps({"conn_type": "kubernetes", "extra": {"kube_config_path": "/no/such/file"}})
    run.before = {"decide": lambda: run.environment.update({name: wrong})}
    assert run.go() == "half rolled back", run.errors
    assert "Connection 'kubernetes_default': expected the way to a cluster" in run.errors["finalize"]
    assert_all_on(fault_lab, sides.target)
    run.before = {}
    run.environment[name] = right
    run.clear("decide", downstream=True)
    outcome = run.go()
    assert outcome == "rolled back", run.errors
    assert_all_on(fault_lab, sides.source)
    tell("decide", "the cluster's connection is broken", "decide cleared", f"half rolled back, then {outcome}")


@pytest.mark.slow
def test_a_backup_key_that_was_changed_stops_no_run(fault_lab: Lab, sides: Sides, start: Start, tell: Tell) -> None:
    first = start()
    assert first.go() == "switched", first.errors
    back = start(**Sides.of(fault_lab).params)
    connection = json.loads(back.environment["AIRFLOW_CONN_JUICEFS_BACKUP"])
    connection["password"] = base64.b64encode(os.urandom(32)).decode()
    back.environment["AIRFLOW_CONN_JUICEFS_BACKUP"] = json.dumps(connection)
    outcome = back.go()
    assert outcome == "switched", back.errors
    (finding,) = [row for row in back.xcom("check_vault", "findings") if row["level"] == "warning"]
    assert f"of the files of {fault_lab.volume.name} in the folder of backups cannot be read" in finding["message"]
    assert_all_on(fault_lab, sides.source)
    for file in (fault_lab.state / "backups").glob(f"*{back.run_id}*"):
        file.unlink()  # nobody has its key
    tell("check_vault", "another backup key", "-", outcome)


@pytest.mark.slow
def test_a_run_id_that_was_used_before_carries_nothing_out(
    fault_lab: Lab, sides: Sides, start: Start, tell: Tell
) -> None:
    first = start()
    assert first.go() == "switched", first.errors
    before = row(fault_lab)
    second = start(**Sides.of(fault_lab).params)
    second.run_id = first.run_id
    outcome = second.go()
    assert outcome == "failed", second.errors
    assert "an earlier run with the same id made it" in second.errors["backup"]
    assert row(fault_lab) == before
    assert_all_on(fault_lab, sides.target)
    home = start(**Sides.of(fault_lab).params)
    assert home.go() == "switched", home.errors
    tell("backup", "the id of an earlier run", "-", f"{outcome}, nothing changed")

"""`python -m lab.soak`: a volume in use is switched, rolled back, switched and reverted; then everything is read back.

Writers work on three mounts with different heartbeats. Peers read and delete, each through another mount, what the
writers hand over. Each keeps a manifest on the local disk. A control follows, in which the same checker must find files
that are lost: one switch that copies nothing after the first copy.
"""

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from include.juicefs_storage.names import REVERT, SWITCH
from lab.airflow import Airflow, TaskState
from lab.demo import copy_to_new_store, progress, say
from lab.environment import Lab, default_state, tear_down
from lab.fleet import add_mount
from lab.process import LabError, exit_code, wait_for
from lab.seaweed import Store
from lab.volume import copy_volume
from lab.writer import OTHER_CONTENT, Check, Summary, Writer, check_manifest, records, summarize

#: Of the three mounts, in seconds: each follows a new setting at another time.
HEARTBEATS_S = (3, 8, 20)
#: Of the control, so that much is written to the old store after the setting names the new one.
CONTROL_HEARTBEAT_S = 20
_FOLDER = "soak"
_RUN_S = 900.0
# The store that is left runs and is next door.
_IO_RETRIES = 3
_SHOWN_FILES = 10


@dataclass(frozen=True)
class Load:
    """Writers and their peers at work."""

    writers: list[Writer]
    peers: list[Writer]

    @classmethod
    def start(cls, lab: Lab, mounts: Sequence[Path], *, writers: int = 2, rate: float = 1.0) -> "Load":
        """Start so many writers on each mount, and on the next mount one peer for all of them.

        Args:
            lab: where the manifests go.
            mounts: of the volume.
            writers: on each mount.
            rate: of each writer, files a second at most.
        """
        groups = [
            [
                Writer.start(lab.state, mount / _FOLDER, name=name, rate=rate, keep=20, subfolder=name)
                for name in (f"writer-{place}-{number}" for number in range(1, writers + 1))
            ]
            for place, mount in enumerate(mounts, 1)
        ]
        # What was written through the last mount is read through the first: one to the other store than the other's.
        peers = [
            Writer.follow(
                lab.state, mount / _FOLDER, name=f"peer-{place}", of=groups[place - 2], rate=2 * writers * rate
            )
            for place, mount in enumerate(mounts, 1)
        ]
        return cls([writer for group in groups for writer in group], peers)

    @property
    def manifests(self) -> list[Path]:
        """The writers' before the peers'."""
        return [worker.manifest for worker in (*self.writers, *self.peers)]

    def stop(self) -> None:
        """Let each finish the file at hand, and end. Idempotent."""
        for worker in (*self.writers, *self.peers):
            worker.stop()

    def ended(self) -> list[str]:
        """Name the writers and peers that have ended."""
        return [worker.name for worker in (*self.writers, *self.peers) if not worker.alive()]


@dataclass(frozen=True)
class Move:
    """A run that ended. Its window is the time in which clients may be on different stores.

    Attributes:
        name: what it was to show.
        report: what finalize left.
        tasks: where its tasks stand.
        seconds: how long it took.
    """

    name: str
    report: dict[str, Any]
    tasks: list[TaskState]
    seconds: float

    @property
    def window(self) -> tuple[float, float]:
        """Unix times: from the begin of the task that writes the setting to the end of the last copy."""
        done = {task.task_id: task for task in self.tasks if task.start and task.end}
        copies = [task for name, task in done.items() if name in {"catch_up", "copy_back_again"}]
        first = done.get("write_setting")
        if not first or not copies:
            raise LabError(f"expected {self.name} to write the setting and to copy after it, found {self.report}")
        return _unix(first.start), max(_unix(task.end) for task in copies)


def _unix(at: str | None) -> float:
    return datetime.fromisoformat(at or "").timestamp()


def move(
    airflow: Airflow,
    name: str,
    dag_id: str,
    params: dict[str, Any],
    *,
    expected: str,
    meanwhile: Callable[[Callable[[], bool]], None] = lambda _: None,
) -> Move:
    """Carry out a run to its end.

    Args:
        airflow: with the DAGs.
        name: what it is to show.
        dag_id: of the switch or the revert.
        params: of the run.
        expected: the outcome.
        meanwhile: called once the run was triggered, with what tells whether the run has ended.

    Raises:
        LabError: it ended otherwise.
    """
    begun = time.monotonic()
    run_id = airflow.trigger(dag_id, {"dry_run": False, "require_approval": False} | params)
    say(f"{name}: {airflow.url}/dags/{dag_id}/runs/{run_id}")
    meanwhile(lambda: airflow.run_state(dag_id, run_id) in {"success", "failed"})
    airflow.wait_run(dag_id, run_id, timeout_s=_RUN_S, on_change=progress)
    tasks = airflow.task_states(dag_id, run_id)
    for task in tasks:
        if task.state == "failed" and task.task_id != "finalize":
            print(f"\n{task.task_id} failed: {airflow.task_error(dag_id, run_id, task)}\n")
    report = airflow.xcom(dag_id, run_id, "finalize", "report") or {}
    if report.get("outcome") != expected:
        raise LabError(f"expected {name} to end {expected}, found {report}")
    return Move(name, report, tasks, time.monotonic() - begun)


def run_soak(
    lab: Lab,
    airflow: Airflow,
    *,
    minutes: float,
    heartbeats_s: Sequence[int] = HEARTBEATS_S,
    writers: int = 2,
    late_commit_s: int = 30,
) -> list[str]:
    """Move the volume four times under load, read everything back, print the account; returns what did not hold.

    Args:
        lab: its volume on the old store; its own mounts have the first of the heartbeats.
        airflow: the lab's.
        minutes: how long the load lasts at least, from the first move on; the moves are spread over that time.
        heartbeats_s: of the mounts with the load.
        writers: on each of these mounts.
        late_commit_s: a param of the runs. The writers fsync: no slice of theirs is committed minutes after its blocks.
    """
    timing = {"settle_s": 3 * max(heartbeats_s), "client_timeout_s": 2 * max(heartbeats_s) + 5}
    timing |= {"late_commit_s": late_commit_s}
    mounts = [lab.mounts()[0], *(add_mount(lab, heartbeat_s) for heartbeat_s in heartbeats_s[1:])]
    processes = lab.mount_processes()
    load = Load.start(lab, mounts, writers=writers)
    say(f"{len(load.writers)} writers and {len(load.peers)} peers on mounts with heartbeats of {heartbeats_s} s")
    try:
        say(f"{copy_to_new_store(lab, airflow)} objects were copied to the new store")
        begun = time.time()
        moves: list[Move] = []
        for number, make in enumerate(_moves(lab, airflow, load, mounts[0], timing, moves)):
            _wait_until(begun + number * minutes * 15, load)
            moves.append(make())
            wait_for("every writer continues", partial(_all_write, load, time.time()), deadline_s=120, poll_s=0.5)
        _wait_until(begun + minutes * 60, load)
        ended, replaced = load.ended(), lab.mount_processes() != processes
    finally:
        load.stop()
    found = read_back(lab, lab.old_store, load)
    account(moves, load, begun, found)
    failures = {
        f"they ended before they were stopped: {ended}": not ended,
        "a mount's process is another one": not replaced,
        f"files that are there and should not be: {_some(found.unexpected)}": not found.unexpected,
        f"files that are lost: {_some(_lost(found))}": not found.lost,
        "no file was there to read back": found.files > 0,
    }
    for done in moves:
        failures[f"{done.name}: nothing was acknowledged in its window"] = _during(load, done).written > 0
    outside = _outside(summarize(*load.manifests, since=begun), moves)
    failures[f"reads failed outside the windows: {_some(outside)}"] = not outside
    wrong = [error["path"] for error in summarize(*load.manifests).read_errors if error["error"] == OTHER_CONTENT]
    failures[f"reads found {OTHER_CONTENT}: {_some(wrong)}"] = not wrong
    return [failure for failure, holds in failures.items() if not holds]


def _moves(
    lab: Lab, airflow: Airflow, load: Load, first_mount: Path, timing: dict[str, int], done: list[Move]
) -> list[Callable[[], Move]]:
    """List what is done with the volume, each once the ones before are `done`: it ends on the new store."""
    there = timing | {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket}
    back = timing | {"target_conn_id": "minio_old", "target_bucket": lab.old_store.bucket}

    def rolled_back() -> Move:
        break_it = partial(_refuse_writes, lab, load.writers[0], first_mount)
        try:
            return move(airflow, "rollback", SWITCH, back, expected="rolled back", meanwhile=break_it)
        finally:
            lab.old_store.allow_writes()

    def revert() -> Move:
        backup = {"backup_id": done[-1].report.get("backup_id")}
        return move(airflow, "revert", REVERT, backup, expected="reverted")

    return [
        lambda: move(airflow, "switch", SWITCH, there, expected="switched"),
        rolled_back,
        lambda: move(airflow, "switch back", SWITCH, back, expected="switched"),
        revert,
    ]


def _refuse_writes(lab: Lab, writer: Writer, mount: Path, ended: Callable[[], bool]) -> None:
    """Refuse writes on the old store as soon as a client has moved away and has written something."""

    def followed() -> bool:
        return bool(json.loads((mount / ".config").read_text())["Format"]["Bucket"] == lab.old_store.bucket_url)

    wait_for("a client has followed", lambda: followed() or ended(), deadline_s=_RUN_S, poll_s=0.5)
    written = writer.summary().written
    wait_for("it has written", lambda: writer.summary().written > written + 2 or ended(), deadline_s=60, poll_s=0.2)
    lab.old_store.refuse_writes()
    say("the store that it moves to refuses writes from now on")


def _all_write(load: Load, since: float) -> bool:
    return all(writer.summary(since=since).written for writer in load.writers)


def _wait_until(at: float, load: Load) -> None:
    if (seconds := at - time.time()) > 0:
        say(f"the load continues for {seconds:.0f} s")
        wait_for(
            "its time has come", lambda: time.time() >= at or bool(load.ended()), deadline_s=seconds + 60, poll_s=1
        )


def read_back(lab: Lab, other: Store, load: Load) -> Check:
    """End every mount, stop the other store, and read all files through a fresh mount with an empty cache.

    Raises:
        LabError: a mount was left.
    """
    say(f"ending every mount, stopping {other.name}, and reading every file back through an empty cache")
    lab.kube.stop()
    if left := lab.mounts():
        raise LabError(f"expected no mount to be left, found {left}")
    other.stop()
    return check(lab, load)


def check(lab: Lab, load: Load) -> Check:
    """Compare what a fresh mount shows with what was acknowledged."""
    with lab.fresh_mount(io_retries=_IO_RETRIES) as mount:
        return check_manifest(load.manifests[0], mount / _FOLDER, *load.manifests[1:])


def _lost(found: Check) -> list[str]:
    return [*found.missing, *found.corrupt]


def _during(load: Load, done: Move) -> Summary:
    since, until = done.window
    return summarize(*load.manifests, since=since, until=until)


def _outside(summary: Summary, moves: list[Move]) -> list[str]:
    """Return the reads that failed while all clients were on one store."""
    windows = [done.window for done in moves]
    return [
        f"{error['path']} ({error['error']})"
        for error in summary.read_errors
        if not any(since <= error["at"] <= until for since, until in windows)
    ]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN_FILES} more" if len(names) > _SHOWN_FILES else ""
    return f"{', '.join(names[:_SHOWN_FILES])}{more}"


def account(moves: list[Move], load: Load, begun: float, found: Check) -> None:
    """Print what was acknowledged and what failed in each window, and what was read back."""
    print(f"\n{'':<12}{'outcome':<13}{'run':>6}{'window':>8}{_HEAD}")
    for done in moves:
        since, until = done.window
        times = f"{done.seconds:>4.0f} s{until - since:>6.0f} s"
        print(f"{done.name:<12}{done.report['outcome']:<13}{times}{_row(_during(load, done))}")
    total = summarize(*load.manifests, since=begun)
    print(f"{'all the time':<39}{_row(total)}")
    print(
        f"""
files read back, the other store down   {found.files} ({found.bytes / 2**20:.0f} MiB)
of a change that was not acknowledged   {found.unacknowledged}
lost                                    {len(found.missing)}
corrupt                                 {len(found.corrupt)}
there, and should not be                {len(found.unexpected)}"""
    )


_HEAD = f"{'acknowledged':>14}{'MiB':>7}{'deleted':>9}{'read':>7}{'read errors':>13}{'write errors':>14}"


def _row(summary: Summary) -> str:
    size, errors = summary.written_bytes / 2**20, (len(summary.read_errors), len(summary.write_errors))
    return f"{summary.written:>14}{size:>7.0f}{summary.deleted:>9}{summary.read:>7}{errors[0]:>13}{errors[1]:>14}"


def run_control(lab: Lab, airflow: Airflow, *, heartbeat_s: int = CONTROL_HEARTBEAT_S) -> list[str]:
    """Make a switch that must lose files, and have the checker find them; return what did not hold.

    Writers at a high rate on a mount with a long heartbeat, `catch_up` off, and off what would refuse or undo such a
    switch: `consistency` and the rollback. What was acknowledged after the copy and before the setting was written can
    only be on the old store. The checker has to name each of these files; and none once the blocks were copied.
    """
    load = Load.start(lab, [add_mount(lab, heartbeat_s)], rate=5.0)
    try:
        copy_to_new_store(lab, airflow)
        copied = time.time()
        target = {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket}
        unsafe = {"catch_up": False, "consistency": "off", "on_failure": "hold"}
        timing = {"settle_s": 0, "client_timeout_s": 2 * heartbeat_s + 5, "late_commit_s": 0}
        done = move(airflow, "without catch-up", SWITCH, target | unsafe | timing, expected="held")
    finally:
        load.stop()
    found = read_back(lab, lab.old_store, load)
    lab.old_store.start()
    copy_volume(lab.volume.name, lab.old_store, lab.new_store)
    lab.old_store.stop()
    healed = check(lab, load)
    begun, acknowledged = Counter[str](), dict[str, float]()
    for record in (record for manifest in load.manifests for record in records(manifest)):
        if record["op"] == "begin":
            begun[record["path"]] += 1
        if record["op"] == "ack":
            acknowledged[record["path"]] = record["at"]
    setting_written, _ = done.window
    # A file that was changed may have been compacted since, from a cache to the new store.
    certain = {path for path, at in acknowledged.items() if copied < at < setting_written and begun[path] == 1}
    lost = {line.partition(":")[0] for line in _lost(found)}
    late = sum(acknowledged.get(path, 0) > setting_written for path in lost)
    print(
        f"""
without catch-up, the run ended               {done.report["outcome"]}
files that must be lost, by their time        {len(certain)}
files that the checker finds lost             {len(lost)} of {found.files}
of these, acknowledged after the setting      {late}
lost once the blocks were copied after all    {healed.lost} of {healed.files}
lost: {_some(sorted(lost))}"""
    )
    facts = {
        "prove_blocks passed though blocks are missing": done.report["states"]["prove_blocks"] == "failed",
        "no file had to be lost": bool(certain),
        f"the checker did not see that these are lost: {_some(sorted(certain - lost))}": not certain - lost,
        f"the checker still finds files lost: {_some(_lost(healed))}": not healed.lost,
    }
    return [failure for failure, holds in facts.items() if not holds]


def in_a_lab(state: Path, heartbeat_s: int, body: Callable[[Lab, Airflow], list[str]]) -> list[str]:
    """Run it in a lab of its own; return what did not hold. The folder is kept then: manifests, logs, reports."""
    tear_down(state, remove=True)
    say("starting MariaDB, two S3 stores, a cluster with a volume, and Airflow")
    failures = ["it did not come to an end"]
    try:
        lab = Lab.up(state, airflow=True, heartbeat_s=heartbeat_s)
        if lab.airflow is None:
            raise LabError("expected Airflow in the lab, found none")
        failures = body(lab, lab.airflow)
    finally:
        say(f"stopping everything{f', {state} is kept' if failures else ''}")
        tear_down(state, remove=not failures)
    return failures


def main() -> int:
    """Run the command line; exit code 0 only if nothing is lost, and the control finds what it has to lose."""
    parser = argparse.ArgumentParser(prog="python -m lab.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="of load, at least (default %(default)s)")
    minutes = parser.parse_args().minutes
    # Not the demo's folder, nor one for both: a demo may be up, and what failed is kept.
    soak, control = (default_state().with_name(f"{default_state().name}-{name}") for name in ("soak", "control"))

    def run() -> int:
        failures = in_a_lab(soak, HEARTBEATS_S[0], partial(run_soak, minutes=minutes))
        failures += in_a_lab(control, HEARTBEATS_S[0], run_control)
        for failure in failures:
            print(f"does not hold: {failure}", file=sys.stderr)
        print("\nnothing lost, and what the control lost was found" if not failures else "\nNOT proven")
        return 1 if failures else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())

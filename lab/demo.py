"""`python -m lab.demo`: a volume in use moves from one store to another through Airflow, and the proof of it."""

import argparse
import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from include.juicefs_storage.names import SWITCH, SYNC
from lab.airflow import Airflow, TaskState
from lab.environment import Lab, default_state, tear_down
from lab.keys import new_secret
from lab.process import LabError, exit_code
from lab.seaweed import Store
from lab.writer import Check, Summary, Writer

SEED_FILES = 300
_RUN_S = 900.0
_SHOWN = {"running": "…", "success": "✓", "failed": "✗", "up_for_retry": "↻", "upstream_failed": "-"}


@dataclass(frozen=True)
class World:
    """What the demo compares, before and after."""

    setting: str
    secret: str
    mounts: dict[str, str]
    access_keys: set[str]
    pods: dict[str, tuple[str, int]]
    processes: dict[str, set[tuple[int, float]]]

    @classmethod
    def observe(cls, lab: Lab) -> "World":
        """Read the buckets that the setting, the Secret and each mount name, and the pods that must not restart."""
        secret = lab.kubectl(
            "get", "secret", "juicefs-sc-secret", "-n", "juicefs", "-o", "go-template={{.data.bucket|base64decode}}"
        )
        pods = json.loads(lab.kubectl("get", "pods", "-A", "-o", "json"))["items"]
        forms = {mount.name: json.loads((mount / ".config").read_text())["Format"] for mount in lab.mounts()}
        return cls(
            setting=lab.mariadb.setting()["Bucket"],
            secret=secret.strip(),
            mounts={name: form["Bucket"] for name, form in forms.items()},
            access_keys={form["AccessKey"] for form in forms.values()},
            # The CSI driver's own pods are restarted by the runbook.
            pods={
                pod["metadata"]["name"]: (
                    pod["metadata"]["uid"],
                    sum(status["restartCount"] for status in pod["status"].get("containerStatuses", [])),
                )
                for pod in pods
                if not pod["metadata"].get("labels", {}).get("app", "").startswith("juicefs-csi-")
            },
            processes=lab.mount_processes(),
        )


@dataclass(frozen=True)
class DemoRun:
    """Everything the account is made of."""

    state: str
    seconds: float
    tasks: list[TaskState]
    report: dict[str, Any] | None
    before: World
    after: World
    during: Summary
    checks: list[Check]

    def failures(self, target: Store) -> list[str]:
        """Say what does not hold; empty when the switch is proven."""
        after, before, new_bucket = self.after, self.before, target.bucket_url
        restarted = sorted(name for name, pod in before.pods.items() if after.pods.get(name) != pod)
        facts = {
            f"the run ended {self.state}": self.state == "success",
            "finalize left no report": self.report is not None,
            f"the setting names {after.setting}": after.setting == new_bucket,
            f"the Secret names {after.secret}": after.secret == new_bucket,
            f"the mounts name {sorted(set(after.mounts.values()))}": set(after.mounts.values()) == {new_bucket},
            "a mount shows another access key": after.access_keys == {target.access_key},
            "no mount was there to compare": bool(before.mounts) and all(before.processes.values()),
            f"pods restarted or gone: {restarted}": not restarted,
            "a mount's process is another one": after.processes == before.processes,
            "the writer acknowledged nothing during the switch": self.during.written > 0,
            f"writes failed during the switch: {len(self.during.write_errors)}": not self.during.write_errors,
            f"files lost: {[path for check in self.checks for path in check.missing + check.corrupt]}": not any(
                check.lost for check in self.checks
            ),
        }
        return [failure for failure, holds in facts.items() if not holds]


@dataclass(frozen=True)
class Case:
    """What changes, and what is taken away before everything is read back.

    Attributes:
        conn_id: The connection of the store that the volume moves to.
        target: That store.
        withdraw: Takes away what the volume must no longer need.
        restore: Gives it back.
        withdrawn: What that is, in words.
    """

    conn_id: str
    target: Store
    withdraw: Callable[[], None]
    restore: Callable[[], None]
    withdrawn: str


def prepare_copy(lab: Lab, airflow: Airflow) -> Case:
    """Another store, which holds a copy: the writer continues meanwhile, and has outrun it when the switch begins."""
    copied = copy_to_new_store(lab, airflow)
    say(f"{copied} objects were copied to the new store, each proven; the writer has outrun them by now")
    return Case("minio_new", lab.new_store, lab.old_store.stop, lab.old_store.start, "the old store is stopped")


def prepare_rotation(lab: Lab, airflow: Airflow) -> Case:
    """Other keys for the same bucket, which the store takes beside the old ones."""
    rotated = lab.old_store.with_keys(secrets.token_hex(10).upper(), new_secret())
    lab.old_store.take_only(lab.old_store, rotated)
    airflow.connect_store("minio_rotated", rotated)
    say("the store takes a new access key and secret key as well")
    return Case(
        "minio_rotated",
        rotated,
        lambda: lab.old_store.take_only(rotated),
        lambda: lab.old_store.take_only(lab.old_store, rotated),
        "the old key is revoked",
    )


def prepare_move(lab: Lab, airflow: Airflow) -> Case:
    """The store moves as a whole: the writer waits, the data goes over, and the old address serves no more."""
    copied = copy_to_new_store(lab, airflow)
    lab.old_store.stop()
    say(f"{copied} objects are at the new address, and the old one does not answer any more")
    return Case(
        "minio_new", lab.new_store, lambda: None, lab.old_store.start, "the old store is gone since before the run"
    )


CASES = {"copy": prepare_copy, "rotation": prepare_rotation, "move": prepare_move}


def run_demo(lab: Lab, airflow: Airflow, case_name: str) -> list[str]:
    """Switch the lab's volume while it is written to, print the account, and return what did not hold."""
    say(f"writing {SEED_FILES} files through {lab.mounts()[0].name}")
    seeded = lab.seed(SEED_FILES)
    # What is written between the last copy and the end of the old address would be lost with it.
    moves = case_name == "move"
    case = CASES[case_name](lab, airflow) if moves else None
    writer = Writer.start(lab.state, lab.mounts()[1] / "app", wait=not moves)
    say(f"a writer {'waits for its store' if moves else 'continues'} in {lab.mounts()[1].name}")
    try:
        case = case or CASES[case_name](lab, airflow)
        before, start = World.observe(lab), time.time()
        run_id = airflow.trigger(
            SWITCH,
            {
                "target_conn_id": case.conn_id,
                "target_bucket": case.target.bucket,
                "dry_run": False,
                "require_approval": False,
                "settle_s": 15,
                # Six minutes by default, which nobody wants to watch.
                "late_commit_s": 5,
                "kubernetes_conn_id": "kubernetes_default",
            },
        )
        say(f"run {run_id}: {airflow.url}/dags/{SWITCH}/runs/{run_id}")
        state = airflow.wait_run(SWITCH, run_id, timeout_s=_RUN_S, on_change=progress)
        end = time.time()
    finally:
        writer.stop()
    tasks = airflow.task_states(SWITCH, run_id)
    for task in tasks:
        if task.state == "failed":
            print(f"\n{task.task_id} failed: {airflow.task_error(SWITCH, run_id, task)}")
    after = World.observe(lab)
    say(f"{case.withdrawn}: reading every acknowledged file through a fresh mount with an empty cache")
    case.withdraw()
    try:
        with lab.fresh_mount() as mount:
            checks = [lab.check(seeded, mount, "seed"), lab.check(writer.manifest, mount, "app")]
    finally:
        case.restore()
    outcome = DemoRun(
        state=state,
        seconds=end - start,
        tasks=tasks,
        report=airflow.xcom(SWITCH, run_id, "finalize", "report"),
        before=before,
        after=after,
        during=writer.summary(since=start, until=end),
        checks=checks,
    )
    account(outcome)
    return outcome.failures(case.target)


def copy_to_new_store(lab: Lab, airflow: Airflow) -> int:
    """Copy the volume's objects through Airflow, in three partitions, and return how many there were.

    Raises:
        LabError: The run did not end green; says what its report says.
    """
    run_id = airflow.trigger(
        SYNC,
        {
            "source_conn_id": "minio_old",
            "source_bucket": lab.old_store.bucket,
            "source_prefix": lab.volume.name,
            "target_conn_id": "minio_new",
            "target_bucket": lab.new_store.bucket,
            "target_prefix": lab.volume.name,
            "exclude": ["testing/*"],
            "mode": "copy",
            "partitions": 3,
            "dry_run": False,
        },
    )
    say(f"run {run_id}: {airflow.url}/dags/{SYNC}/runs/{run_id}")
    state = airflow.wait_run(SYNC, run_id, timeout_s=_RUN_S, on_change=progress)
    report = airflow.xcom(SYNC, run_id, "finalize", "report") or {}
    if state != "success":
        raise LabError(f"expected a copy that is proven, found {report}")
    return sum(objects for phase in report["phases"] for objects, _ in phase["totals"].values())


def account(outcome: DemoRun) -> None:
    """Print what happened."""
    before, after = outcome.before, outcome.after
    restarts = sum(after.pods.get(name) != pod for name, pod in before.pods.items())
    rows = [("setting", before.setting, after.setting), ("Secret", before.secret, after.secret)]
    rows += [(f"mount …{name[-6:]}", bucket, after.mounts.get(name, "gone")) for name, bucket in before.mounts.items()]
    old_key, new_key = (", ".join(map(_masked, world.access_keys)) for world in (before, after))
    rows += [("access key", old_key, new_key)]
    print(f"\n{'bucket of':<16} {'before':<36} after")
    for what, old, new in rows:
        print(f"{what:<16} {old:<36} {new}")
    print("\nstep                        seconds")
    for task in outcome.tasks:
        if task.state != "skipped":
            print(f"{task.task_id:<28}{task.duration_s or 0:>7.1f}  {task.state}")
    files, size = sum(check.files for check in outcome.checks), sum(check.bytes for check in outcome.checks)
    during = outcome.during
    print(
        f"""
run                               {outcome.state} after {outcome.seconds:.0f} s
pods restarted (business, mount)  {restarts} of {len(before.pods)}
mount processes replaced          {sum(after.processes.get(name) != now for name, now in before.processes.items())}
files written during the switch   {during.written}, failed {len(during.write_errors)}
files read during the switch      {during.read}, failed {len(during.read_errors)}
files read back afterwards        {files} ({size / 2**20:.1f} MiB)
files lost                        {sum(check.lost for check in outcome.checks)}"""
    )


def _masked(key: str) -> str:
    return f"{key[:2]}…{key[-2:]}"


def progress(task: TaskState) -> None:
    """Print a task's line as its state changes."""
    if mark := _SHOWN.get(task.state or ""):
        name = task.task_id if task.map_index < 0 else f"{task.task_id}[{task.map_index}]"
        took = f"{task.duration_s:.1f} s" if task.duration_s and task.state in {"success", "failed"} else ""
        print(f"{time.strftime('%H:%M:%S')}   {mark} {name:<28} {task.state:<16} {took}", flush=True)


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


@contextlib.contextmanager
def _lab(state: Path, *, keep: bool) -> Iterator[Lab]:
    """Bring up a lab with Airflow in place of what an earlier demo left; tear it down at the end unless it is kept."""
    tear_down(state, remove=True)
    say("starting MariaDB, two S3 stores, a cluster with two mounts of a volume, and Airflow")
    start = time.monotonic()
    try:
        lab = Lab.up(state, airflow=True)
        say(f"up after {time.monotonic() - start:.0f} s, in {state}")
        yield lab
    except BaseException as error:
        keep = keep and (state / "lab.json").exists() and not isinstance(error, KeyboardInterrupt)
        raise
    finally:
        if not keep:
            say("stopping everything")
            tear_down(state, remove=True)


def main() -> int:
    """Run the command line; exit code 0 only if all holds."""
    parser = argparse.ArgumentParser(prog="python -m lab.demo", description=__doc__)
    parser.add_argument("--state", type=Path, default=default_state(), help="the lab's folder (default %(default)s)")
    parser.add_argument("--case", choices=CASES, default="copy", help="what changes (default %(default)s)")
    arguments = parser.parse_args()
    state: Path = arguments.state
    keep = not os.environ.get("CI")

    def run() -> int:
        with _lab(state, keep=keep) as lab:
            if lab.airflow is None:
                raise LabError("expected Airflow in the lab, found none")
            failures = run_demo(lab, lab.airflow, arguments.case)
            if keep:
                print(
                    f"\nAirflow stays up: {lab.airflow.url} user {lab.airflow.user} password {lab.airflow.password}\n"
                    "Stop it with: make demo-down"
                )
        for failure in failures:
            print(f"does not hold: {failure}", file=sys.stderr)
        print("\nswitched, nothing lost" if not failures else "\nNOT proven")
        return 1 if failures else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())

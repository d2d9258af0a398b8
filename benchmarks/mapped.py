"""The same copy through Airflow with 1, 2 and 4 mapped tasks: what a task costs beside the copy itself.

`python -m benchmarks.mapped`: an Airflow of its own (LocalExecutor, SQLite), the DAG as it is, the cheap server.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from benchmarks.population import KIB, Population
from benchmarks.stores import StubStores, expected_digest, stub_stores
from include.juicefs_storage.names import COPY_POOL, SYNC
from lab.airflow import POOL_SLOTS, Airflow
from lab.process import LabError, wait_for

_RUN_S = 600


@dataclass(frozen=True)
class Mapped:
    """One run of the DAG; seconds.

    Attributes:
        run_s: Of the whole run.
        copy_s: From the first copy task's start to the last one's end.
        work_s: Of a task within the copy itself, median.
        overhead_s: Of a task beside that: the start of its process, imports, XCom; median.
        peak_mib: The most memory that a task held, Airflow's own included.
        airflow_mib: The most that it held before it began to copy.
    """

    tasks: int
    run_s: float
    copy_s: float
    work_s: float
    overhead_s: float
    peak_mib: int
    airflow_mib: int


def measure(population: Population, counts: tuple[int, ...] = (1, 2, 4)) -> list[Mapped]:
    """Run the DAG once with each number of partitions.

    Raises:
        LabError: A run failed, or the target does not hold what the source holds.
    """
    mapped = []
    with tempfile.TemporaryDirectory() as folder, stub_stores(Path(folder)) as stores:
        source, target = stores.source(population), stores.target(None)
        airflow = Airflow.start(Path(folder))
        try:
            wait_for("Airflow is healthy", airflow.healthy, deadline_s=240, poll_s=0.5)
            for name, endpoint in (("source", source.endpoint), ("target", target.endpoint)):
                connection = {"connection_id": name, "conn_type": "aws", "login": "key", "password": "stub-secret"}
                extra = json.dumps({"endpoint_url": endpoint})
                airflow.api("POST", "/connections", json={**connection, "extra": extra})
            airflow.api("POST", "/pools", json={"name": COPY_POOL, "slots": POOL_SLOTS})
            _run(airflow, stores, 1)  # the first run of all pays for what is imported and compiled once
            for count in counts:
                mapped.append(_run(airflow, stores, count))
                if stores.digest(target) != expected_digest(population):
                    raise LabError(f"with {count} tasks not everything was copied")
                print(f"  {mapped[-1]}", flush=True)
        finally:
            airflow.stop()
    return mapped


def _run(airflow: Airflow, stores: StubStores, tasks: int) -> Mapped:
    bucket = stores.target(None).bucket
    run_id = airflow.trigger(
        SYNC,
        {
            "source_conn_id": "source", "source_bucket": bucket, "target_conn_id": "target", "target_bucket": bucket,
            "mode": "copy", "partitions": tasks, "dry_run": False,
        },
    )  # fmt: skip
    state = airflow.wait_run(SYNC, run_id, timeout_s=_RUN_S)
    copies = [task for task in airflow.task_states(SYNC, run_id) if task.task_id == "copy"]
    if state != "success" or len(copies) != tasks:
        raise LabError(f"expected a run with {tasks} copies that ends well, found {state} with {len(copies)}")
    results = [airflow.xcom(SYNC, run_id, "copy", map_index=task.map_index) for task in copies]
    work = [result["span"][1] - result["span"][0] for result in results]
    run = airflow.api("GET", f"/dags/{SYNC}/dagRuns/{run_id}")
    return Mapped(
        tasks,
        _seconds(run["start_date"], run["end_date"]),
        _seconds(min(str(task.start) for task in copies), max(str(task.end) for task in copies)),
        statistics.median(work),
        statistics.median((task.duration_s or 0) - worked for task, worked in zip(copies, work, strict=True)),
        *max((result["peak_mib"], result["airflow_mib"]) for result in results),
    )


def _seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def table(mapped: list[Mapped]) -> str:
    """In Markdown."""
    lines = [
        "| tasks | run s | copies, first to last s | copy, a task s | beside it, a task s | peak MiB | before it |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {run.tasks} | {run.run_s:.1f} | {run.copy_s:.1f} | {run.work_s:.2f} | {run.overhead_s:.2f} "
        f"| {run.peak_mib} | {run.airflow_mib} |"
        for run in mapped
    ]
    return "\n".join(lines)


def run(*, quick: bool = False) -> str:
    """The table."""
    return table(measure(Population(400 if quick else 20_000, 4 * KIB)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few objects")
    print(run(quick=parser.parse_args().quick))


if __name__ == "__main__":
    main()

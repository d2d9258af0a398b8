"""The same copy by 1, 2 and 4 processes, each with its share of the keys, as by mapped tasks.

`python -m benchmarks.scaling`: against the cheap server as it is, where two cores are the limit, and with 5 ms added to
each of its answers, as over a network, where a process waits most of the time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers import Native, Task
from benchmarks.population import KIB, Population
from benchmarks.stores import expected_digest, stub_stores
from include.juicefs_storage.copy.partitions import cut_partitions
from include.juicefs_storage.copy.segments import Segment
from include.juicefs_storage.objects.model import KeyRange
from lab.process import LabError

_DEADLINE_S = 300


@dataclass(frozen=True)
class Scaled:
    """One copy by several processes: wall time until the last one ended, CPU time of all, interpreters included."""

    latency_ms: float
    processes: int
    wall_s: float
    cpu_s: float


def measure(population: Population, latency_ms: float, counts: tuple[int, ...] = (1, 2, 4)) -> list[Scaled]:
    """Copy a population with each number of processes.

    Raises:
        LabError: A process failed, or the target does not hold what the source holds.
    """
    wanted = expected_digest(population)
    segments = [Segment(key, 1, size) for key, size, _ in sorted(population.objects())]
    scaled = []
    with tempfile.TemporaryDirectory() as state, stub_stores(Path(state), latency_ms) as stores:
        source = stores.source(population)
        for count in counts:
            target = stores.target(None)
            folder = Path(state) / f"by-{count}"
            folder.mkdir()
            command = Native().command(Task("copy", source, target, folder, population.size))
            commands = [
                [
                    *(*command.argv, f"--name={partition.name}"),
                    *([f"--after={partition.after}"] if partition.after is not None else []),
                    *([f"--until={partition.until}"] if partition.until is not None else []),
                ]
                for partition in cut_partitions(segments, KeyRange(), count)
            ]
            before, start = os.times(), time.monotonic()
            running = [
                subprocess.Popen(argv, env={**os.environ, **command.env}, stdout=subprocess.DEVNULL)
                for argv in commands
            ]
            try:
                codes = [process.wait(_DEADLINE_S) for process in running]
            finally:
                for process in running:
                    process.kill()
            wall_s, after = time.monotonic() - start, os.times()
            if any(codes) or stores.digest(target) != wanted:
                raise LabError(f"{count} processes ended with {codes}, or not everything was copied")
            cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
            scaled.append(Scaled(latency_ms, len(commands), wall_s, cpu_s))
            print(f"  {latency_ms:g} ms, {len(commands)} processes: {wall_s:.2f} s, {cpu_s:.2f} CPU s", flush=True)
    return scaled


def table(scaled: list[Scaled]) -> str:
    """In Markdown."""
    lines = ["| latency of an answer | processes | wall s | CPU s, all |", "| --- | --- | --- | --- |"]
    lines += [f"| {run.latency_ms:g} ms | {run.processes} | {run.wall_s:.2f} | {run.cpu_s:.2f} |" for run in scaled]
    return "\n".join(lines)


def run(*, quick: bool = False) -> str:
    """Both latencies; the table."""
    population = Population(400 if quick else 20_000, 4 * KIB)
    return table([run for latency_ms in (0, 5) for run in measure(population, latency_ms)])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few objects")
    print(run(quick=parser.parse_args().quick))


if __name__ == "__main__":
    main()

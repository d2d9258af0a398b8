"""Our engine beside `juicefs sync`, `rclone` and `mc mirror`: `python -m benchmarks.sync [--quick] [--only CASE…]`.

Every program is a process of its own, run one after the other in an order that rotates from round to round, from a
server of ours that costs next to nothing (benchmarks.stub_store) and from SeaweedFS. What is on the target afterwards
is compared with what ought to be there, key by key, size and ETag; a run that falls short stops the benchmark, unless
it is another program's on a store that throttles: that one is counted as failed.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.peers import JuiceFS, Mc, Native, Peer, Place, Rclone, Task, Work
from benchmarks.population import KIB, MIB, Population
from benchmarks.report import OURS, Document, Result, machine, markdown, write_page
from benchmarks.stores import Stores, expected_digest, seaweed_stores, stub_stores
from lab.process import LabError, LabUnavailableError

RESULTS = Path(__file__).with_name("results.json")
_DEADLINE_S = 300


@dataclass(frozen=True)
class Case:
    """One kind of work on one pair of populations.

    Attributes:
        target: What the target holds at the start. None: nothing.
        latency_ms: Of each answer.
        at_once: Requests at once that each side takes; 0: any number.
        per_second: Requests a second that each side takes; 0: any number.
    """

    name: str
    title: str
    work: Work
    source: Population
    target: Population | None = None
    on_seaweed: bool = False
    latency_ms: float = 0
    at_once: int = 0
    per_second: int = 0

    @property
    def stores(self) -> str:
        """The servers that it runs on, for people."""
        limits = ((self.at_once, f"{self.at_once} requests at once"), (self.per_second, f"{self.per_second} a second"))
        words = [f"{self.latency_ms:g} ms", *(text for limit, text in limits if limit)]
        return "SeaweedFS" if self.on_seaweed else f"stub, {', '.join(words)}"

    @property
    def throttles(self) -> bool:
        """Whether the servers refuse requests."""
        return bool(self.at_once or self.per_second)

    def open(self, folder: Path) -> AbstractContextManager[Stores]:
        """Start them."""
        if self.on_seaweed:
            return seaweed_stores(folder)
        return stub_stores(folder, self.latency_ms, self.at_once, self.per_second)


STUB_CASES = (
    Case("start", "an empty bucket: start and end of the program", "copy", Population(0)),
    Case("4k", "20,000 of 4 KiB", "copy", Population(20_000, 4 * KIB)),
    Case("4m", "512 of 4 MiB", "copy", Population(512, 4 * MIB)),
    Case("mix", "6,000 mixed, 1.4 GiB", "copy", Population(6_000, 0)),
    Case("noop", "nothing to do, 100,000 keys", "copy", Population(100_000), Population(100_000)),
    Case("delta", "1 % of 100,000 keys", "copy", Population(100_000), Population(100_000, skip_every=100)),
    Case("listings", "verify 100,000 keys by listings", "listings", Population(100_000), Population(100_000)),
    Case("content", "verify 4 GiB by content", "content", Population(512, 4 * MIB), Population(512, 4 * MIB)),
)
#: As over a network: nearly all of the time is waiting.
LATENCY_CASES = tuple(
    Case(f"{name}-{ms}ms", f"{title}, {ms} ms an answer", "copy", population, latency_ms=ms)
    for ms in (2, 20)
    for name, title, population in (
        ("4k", "5,000 of 4 KiB", Population(5_000, 4 * KIB)),
        ("4m", "128 of 4 MiB", Population(128, 4 * MIB)),
        ("mix", "2,000 mixed, 0.5 GiB", Population(2_000, 0)),
    )
)
THROTTLED_CASES = (
    Case(
        "at-once",
        "5,000 of 4 KiB, 2 ms, 16 requests at once",
        "copy",
        Population(5_000, 4 * KIB),
        latency_ms=2,
        at_once=16,
    ),
    Case(
        "per-second",
        "5,000 of 4 KiB, 2 ms, 1,000 requests a second",
        "copy",
        Population(5_000, 4 * KIB),
        latency_ms=2,
        per_second=1_000,
    ),
)
SEAWEED_CASES = (
    Case("seaweed-4k", "SeaweedFS, 10,000 of 4 KiB", "copy", Population(10_000, 4 * KIB), None, on_seaweed=True),
    Case("seaweed-4m", "SeaweedFS, 96 of 4 MiB", "copy", Population(96, 4 * MIB), on_seaweed=True),
    Case(
        "seaweed-noop",
        "SeaweedFS, nothing to do, 10,000 keys",
        "copy",
        Population(10_000),
        Population(10_000),
        on_seaweed=True,
    ),
)


def quick(case: Case) -> Case:
    """The same with a fiftieth of the objects."""
    smaller = [
        population and replace(population, count=max(20, population.count // 50))
        for population in (case.source, case.target)
    ]
    return replace(case, source=smaller[0] or case.source, target=smaller[1])


def measure(peer: Peer, task: Task) -> tuple[float, float, float]:
    """Run a program: wall seconds, CPU seconds, peak RSS in MiB.

    Raises:
        LabError: It failed; with the last lines that it wrote.
    """
    command = peer.command(task)
    result, output = task.folder / "measured", task.folder / "output"
    launcher = [sys.executable, "-I", "-S", str(Path(__file__).with_name("measure.py")), str(result), str(_DEADLINE_S)]
    with output.open("wb") as file:
        null = os.open(os.devnull, os.O_RDONLY)
        environment = {**os.environ, **command.env, "PYTHONPATH": str(Path(__file__).parents[1])}
        pid = os.posix_spawn(
            launcher[0],
            [*launcher, *command.argv],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_DUP2, null, 0),
                (os.POSIX_SPAWN_DUP2, file.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, file.fileno(), 2),
            ],
        )
        os.close(null)
        os.waitpid(pid, 0)
    wall_s, cpu_s, peak_kib, code = result.read_text().split()
    if code != "0":
        lines = "\n".join(output.read_text(errors="replace").splitlines()[-15:])
        raise LabError(f"{peer.name} ended with exit code {code} after {float(wall_s):.0f} s\n{lines}")
    return float(wall_s), float(cpu_s), int(peak_kib) / 1024


def race(case: Case, peers: list[Peer], stores: Stores, folder: Path, round_number: int) -> list[Result]:
    """One round of one case; who begins changes from round to round.

    Raises:
        LabError: A program failed, or the target does not hold what it ought to; see the module's text.
    """
    taking_part = [peer for peer in peers if case.work in peer.does]
    first = round_number % len(taking_part)
    wanted = expected_digest(case.source)
    source = stores.source(case.source)
    results = []
    for peer in [*taking_part[first:], *taking_part[:first]]:
        target = stores.target(case.target)
        scratch = folder / f"{case.name}-{round_number}-{peer.name.replace(' ', '-')}"
        scratch.mkdir()
        task = Task(case.work, source, target, scratch, case.source.size or 4 * MIB)
        for place in (source, target):  # nobody pays for what a store keeps in memory after the first listing
            stores.digest(place)
        made, throttled = stores.requests(source, target)
        try:
            measured = measure(peer, task)
            if stores.digest(target) != wanted:
                raise LabError(f"{case.name}: after {peer.name} the target does not hold what the source holds")
        except LabError as error:
            if peer.name == OURS or not case.throttles:
                raise
            print(f"  {error}", flush=True)
            results.append(Result(case.name, round_number, peer.name, 0, 0, 0, failed=True))
            continue
        made_after, throttled_after = stores.requests(source, target)
        shutil.rmtree(scratch)
        results.append(
            Result(case.name, round_number, peer.name, *measured, made_after - made, throttled_after - throttled)
        )
        print(
            f"  {peer.name:13} {measured[0]:7.2f} s  {measured[1]:7.2f} CPU s  {measured[2]:5.0f} MiB  "
            f"{throttled_after - throttled:6} of {made_after - made} requests throttled",
            flush=True,
        )
    return results


def find_peers() -> list[Peer]:
    """Whoever is on this machine; says who is not."""
    found: list[Peer] = [Native()]
    for peer in (JuiceFS(), Rclone(), Mc()):
        try:
            peer.version()
        except LabUnavailableError as error:
            print(f"without {peer.name}: {error}")
            continue
        found.append(peer)
    return found


def run(cases: list[Case], peers: list[Peer], rounds: int) -> list[Result]:
    """All rounds of all cases."""
    results = []
    for name in dict.fromkeys(case.stores for case in cases):
        chosen = [case for case in cases if case.stores == name]
        for number in range(rounds):
            # A store's folder grows with every round, and is gone with it.
            with tempfile.TemporaryDirectory() as folder, chosen[0].open(Path(folder)) as stores:
                for case in chosen:
                    print(f"{name}, round {number + 1} of {rounds}: {case.title}", flush=True)
                    results += race(case, peers, stores, Path(folder), number)
    return results


def beyond_the_race() -> dict[str, str]:
    """Scaling and planning: heading to Markdown."""
    from benchmarks import mapped, scaling

    print("scaling: processes", flush=True)
    processes = scaling.run()
    print("scaling: Airflow", flush=True)
    tasks = mapped.run()
    print("planning", flush=True)
    # A process of its own, since its peak of memory is part of what it prints.
    planned = subprocess.run([sys.executable, "-m", "benchmarks.plan"], stdout=subprocess.PIPE, text=True, check=True)
    return {
        "The same 20,000 of 4 KiB by several processes": processes,
        "The same through Airflow": tasks,
        "Planning 1,000,000,000 objects": planned.stdout.strip(),
    }


def shown(peer: Peer) -> str:
    """How a program is called to copy, for the report: without ports and folders."""
    source, target = (Place(f"http://{name}", "bucket", "", "", "") for name in ("source", "target"))
    argv = peer.command(Task("copy", source, target, Path("FOLDER"), 4 * KIB)).argv
    return " ".join([Path(argv[0]).name, *argv[1:]])


def main() -> None:
    """Race, print, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = [*STUB_CASES, *LATENCY_CASES, *THROTTLED_CASES, *SEAWEED_CASES]
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round with a fiftieth of the objects")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in everything], metavar="CASE")
    parser.add_argument("--peers", nargs="+", help="only these: native, juicefs, rclone, mc")
    parser.add_argument("--json", type=Path, help=f"default: {RESULTS.name}, and the page of the docs, if all was run")
    given = parser.parse_args()
    # Whoever ends the benchmark ends its servers too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    cases = [case for case in everything if not given.only or case.name in given.only]
    if given.quick:
        cases = [quick(case) for case in cases]
    peers = [peer for peer in find_peers() if not given.peers or peer.name.split()[0] in given.peers]
    # As an installed package is: what is imported is compiled once, and not in every run.
    compileall.compile_dir(Path(__file__).parents[1] / "include", quiet=1)
    compileall.compile_dir(Path(__file__).parent, quiet=1)
    before = machine()
    results = run(cases, peers, 1 if given.quick else given.rounds)
    document = Document(
        machine=before,
        versions={peer.name: peer.version() for peer in peers},
        commands={peer.name: shown(peer) for peer in peers},
        cases={case.name: case.title for case in cases},
        results=results,
    )
    whole = not (given.quick or given.only or given.peers)
    if whole:
        document = replace(document, notes=beyond_the_race())
    print(f"\n{markdown(document)}")
    if path := given.json or (RESULTS if whole else None):
        path.write_text(json.dumps(asdict(document), indent=1, ensure_ascii=False) + "\n")
    if whole:
        write_page(document)


if __name__ == "__main__":
    main()

"""What a race came to: tables in Markdown, a plot, and the part of docs/benchmarks.md that is made of them."""

from __future__ import annotations

import os
import platform
import re
import statistics
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

_ROOT = Path(__file__).parents[1]
PAGE, PLOT = _ROOT / "docs/benchmarks.md", _ROOT / "docs/images/benchmarks.svg"
OURS = "native"


@dataclass(frozen=True)
class Result:
    """One run of one program: seconds of wall time, of CPU (user and system), and the peak of resident memory.

    Attributes:
        requests: Made on both sides; 0: not counted.
        throttled: Of these, answered by 503.
        failed: It gave up, or left objects out; nothing else is counted then.
    """

    case: str
    round: int
    peer: str
    wall_s: float
    cpu_s: float
    peak_mib: float
    requests: int = 0
    throttled: int = 0
    failed: bool = False


@dataclass(frozen=True)
class Document:
    """Everything a race came to; the JSON file holds just this.

    Attributes:
        machine: What the figures depend on; no names, no paths.
        versions: Of each program.
        commands: How each was called to copy.
        cases: Name and title of each.
        results: Every run.
        notes: Further tables in Markdown by their heading (scaling, planning).
    """

    machine: dict[str, str]
    versions: dict[str, str]
    commands: dict[str, str]
    cases: dict[str, str]
    results: list[Result]
    notes: dict[str, str] = field(default_factory=dict)

    def median(self, case: str, peer: str) -> Result | None:
        """Of wall time, CPU and memory each; None where the peer took no part."""
        runs = [run for run in self.results if (run.case, run.peer) == (case, peer) and not run.failed]
        if not runs:
            return None
        wall_s, cpu_s, peak_mib = (
            statistics.median(getattr(run, of) for run in runs) for of in ("wall_s", "cpu_s", "peak_mib")
        )
        return Result(case, -1, peer, wall_s, cpu_s, peak_mib)

    def ratio(self, case: str, peer: str, of: str) -> float | None:
        """Ours to the peer's, of the medians; `best`: to the best peer of each round, the median over the rounds."""
        if peer != "best":
            ours, theirs = self.median(case, OURS), self.median(case, peer)
            return getattr(ours, of) / getattr(theirs, of) if ours and theirs else None
        best: dict[int, float] = {}
        for run in self.results:
            if run.case == case and run.peer != OURS and not run.failed:
                best[run.round] = min(getattr(run, of), best.get(run.round, float("inf")))
        runs = [run for run in self.results if (run.case, run.peer) == (case, OURS) and run.round in best]
        return statistics.median(getattr(run, of) / best[run.round] for run in runs) if runs else None


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times_table(document: Document) -> str:
    """Medians: wall s / CPU s / peak MiB, a line a case."""
    peers = list(document.versions)
    rows = []
    for case, title in document.cases.items():
        medians = [document.median(case, peer) for peer in peers]
        rows.append([title, *(f"{m.wall_s:.2f} / {m.cpu_s:.2f} / {m.peak_mib:.0f}" if m else "-" for m in medians)])
    return _table(["wall s / CPU s / peak MiB", *peers], rows)


def ratios_table(document: Document) -> str:
    """Ours to each peer's, wall / CPU, a line a case: below 1 is faster."""
    peers = [*(peer for peer in document.versions if peer != OURS), "best"]
    rows = []
    for case, title in document.cases.items():
        row = [title]
        for peer in peers:
            wall, cpu = (document.ratio(case, peer, of) for of in ("wall_s", "cpu_s"))
            row.append(f"{wall:.2f} / {cpu:.2f}" if wall is not None and cpu is not None else "-")
        rows.append(row)
    return _table([f"{OURS} to …, wall / CPU, of the medians", *(peers[:-1]), "best of each round"], rows)


def requests_table(document: Document) -> str:
    """Requests made to those needed, where a store throttles, a line a case: the median over the rounds."""
    rows = []
    for case, title in document.cases.items():
        ratios: dict[str, list[float]] = {}
        for run in document.results:
            if run.case == case and run.requests:
                ratios.setdefault(run.peer, []).append(run.requests / (run.requests - run.throttled))
        if any(run.throttled for run in document.results if run.case == case):
            medians = [statistics.median(ratios[peer]) if peer in ratios else None for peer in document.versions]
            rows.append([title, *(f"{median:.2f}" if median else "-" for median in medians)])
    return _table(["requests made to needed", *document.versions], rows) if rows else ""


def failures(document: Document) -> str:
    """Which programs did not copy everything in which case, in a sentence each."""
    failed = Counter((run.peer, run.case) for run in document.results if run.failed)
    rounds = Counter((run.peer, run.case) for run in document.results)
    return " ".join(
        f"{peer} left objects out in {count} of {rounds[peer, case]} rounds of *{document.cases[case]}*; these are not "
        "counted."
        for (peer, case), count in failed.items()
    )


def markdown(document: Document) -> str:
    """Everything that the page shows of a race."""
    machine = document.machine
    rounds = 1 + max((run.round for run in document.results), default=0)
    programs = _table(
        ["program", "version", "command"],
        [[name, version, f"`{document.commands[name]}`"] for name, version in document.versions.items()],
    )
    about = (
        f"{machine['date']}, {machine['cpu']}, Linux {machine['kernel']}, load {machine['load']} at the start; "
        f"{rounds} round{'s' if rounds > 1 else ''}, medians."
    )
    parts = [
        about,
        times_table(document),
        ratios_table(document),
        requests_table(document),
        failures(document),
        programs,
    ]
    return "\n\n".join(
        [*filter(None, parts), *(f"### {heading}\n\n{text}" for heading, text in document.notes.items())]
    )


def draw(document: Document, file: Path) -> None:
    """Wall and CPU time of each program as multiples of ours, a group of bars a case, as SVG."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # The same results give the same file; text stays text.
    mpl.rcParams.update({"svg.hashsalt": "benchmarks", "svg.fonttype": "none", "font.size": 8})
    peers = list(document.versions)
    colours = dict(zip(peers, ("#1f6feb", "#2da44e", "#bf8700", "#cf222e"), strict=False))
    cases = [case for case in document.cases if document.median(case, OURS)]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.62 * len(cases) + 0.9), sharey=True, layout="constrained")
    thickness = 0.8 / len(peers)
    for axis, of, title in zip(axes, ("wall_s", "cpu_s"), ("wall time", "CPU time"), strict=True):
        for place, peer in enumerate(peers):
            bars = [
                (row + (place - (len(peers) - 1) / 2) * thickness, getattr(theirs, of) / getattr(ours, of))
                for row, case in enumerate(cases)
                if (theirs := document.median(case, peer)) and (ours := document.median(case, OURS))
            ]
            axis.barh([y for y, _ in bars], [x for _, x in bars], thickness * 0.9, label=peer, color=colours[peer])
        axis.axvline(1, color="#57606a", linewidth=0.8)
        axis.set_title(f"{title}, {OURS} = 1 (less is better)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(cases)), [document.cases[case] for case in cases])
    axes[0].invert_yaxis()
    axes[1].legend(frameon=False)
    figure.savefig(file, format="svg", metadata={"Date": None})
    plt.close(figure)


def write_page(document: Document) -> None:
    """Put the tables between the page's marks, and the plot beside it."""
    text = PAGE.read_text()
    marked = re.sub(
        r"(<!-- results -->\n).*(<!-- end of results -->)",
        lambda found: f"{found[1]}\n{markdown(document)}\n\n{found[2]}",
        text,
        flags=re.DOTALL,
    )
    PAGE.write_text(marked)
    draw(document, PLOT)


def machine() -> dict[str, str]:
    """What the figures depend on; no names, no paths."""
    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cpu": f"{len(models)} x {models[0]}" if models else f"{os.cpu_count()} x {platform.machine()}",
        "kernel": platform.release().split("-")[0],
        "load": f"{os.getloadavg()[0]:.1f}",
    }

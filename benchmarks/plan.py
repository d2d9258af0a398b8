"""What the plan of a copy costs: `python -m benchmarks.plan [OBJECTS]`.

A source of so many objects is made up: block keys in JuiceFS' layout, each page answered after 20 ms without building
the keys that are not looked at. It is planned as the DAG does it: a survey that begins, shares for several processes,
eight at once, their files joined. Before that the same source of fewer objects, and one behind HTTP (the cheap server,
each answer late), are planned by 1, 2 and 4 processes. What is waited for is really waited for.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, cast, overload

from benchmarks.population import Population
from benchmarks.report import machine
from benchmarks.stores import stub_stores
from include.juicefs_storage.adapters.listing_files import ListingFiles
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import S3Store
from include.juicefs_storage.copy.partitions import cut_partitions, task_groups
from include.juicefs_storage.copy.segments import Ruler, most_segments
from include.juicefs_storage.copy.survey import ALONE_CALLS, Survey, share_out
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.model import KeyRange, Page
from lab.process import LabError

_PAGE = 1000
_BLOCK_BYTES = 4 * 2**20
_DELAY_S, _HTTP_DELAY_MS = 0.02, 50
#: So many requests that finding where to share out is little beside them, without as many objects to be made.
_HTTP_PAGE_KEYS = 20
#: As the DAG has it, where eight tasks of a run work at once.
_AT_ONCE, _SHARES = 8, 16


@dataclass(frozen=True)
class _Keys(Sequence[str]):
    """Keys `first` … `end` of the volume, made when they are looked at."""

    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> _Keys: ...
    def __getitem__(self, at: int | slice) -> str | _Keys:
        if isinstance(at, slice):
            first, end, _ = at.indices(len(self))
            return _Keys(self.first + first, self.first + end)
        return key_of(self.first + at if at >= 0 else self.end + at)


def key_of(number: int) -> str:
    """A block's key; zeros in front, so that the order of keys is that of the numbers."""
    return f"chunks/{number // 10**6:06}/{number // 10**3:09}/{number:012}_0_{_BLOCK_BYTES}"


class Volume:
    """As much of a bucket as a survey takes, with so many blocks."""

    name = "made up"

    def __init__(self, blocks: int, delay_s: float = 0.0) -> None:
        self._keys, self._delay_s = _Keys(0, blocks), delay_s
        self._sizes, self._etags = [_BLOCK_BYTES] * _PAGE, [""] * _PAGE

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """As a store lists them."""
        at = bisect_right(self._keys, keys.after) if keys.after is not None else 0
        stop = bisect_right(self._keys, keys.until) if keys.until is not None else len(self._keys)
        while at < stop:
            time.sleep(self._delay_s)
            end = min(at + _PAGE, stop)
            count = end - at
            # A list in every way that the survey uses it.
            yield Page(self._keys[at:end], self._sizes[:count], self._etags[:count])  # type: ignore[arg-type]
            at = end

    def first_after(self, key: str) -> str | None:
        """By bisection."""
        time.sleep(self._delay_s)
        at = bisect_right(self._keys, key)
        return self._keys[at] if at < len(self._keys) else None


Source: TypeAlias = Volume | S3Store


@dataclass(frozen=True)
class Planned:
    """What a plan cost.

    Attributes:
        processes: That listed at once.
        wall_s: From the first request to the partitions, without the start of interpreters.
        cpu_s: Of all processes together.
        requests: LIST requests for pages; without those of one key that found where to share out.
        busiest: Most of these requests in one share, over their mean.
        peak_mib: The most memory that a process held.
        counts: Objects of each partition.
        tasks: That would copy these partitions.
    """

    processes: int
    wall_s: float
    cpu_s: float
    requests: int
    busiest: float
    peak_mib: int
    counts: list[int]
    tasks: int


def plan(source: Source, objects: int, processes: int, shares: int, alone: int = 0) -> Planned:
    """Plan a copy, and say what it cost.

    Args:
        source: Where its objects are.
        objects: How many it has.
        processes: That list at once.
        shares: That are shared out.
        alone: Requests before that.

    Raises:
        LabError: Not all objects were counted.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(processes, context) as pool:
        list(pool.map(_ready, range(processes)))
        files, cpu, start = ListingFiles(Path(folder) / "listing"), time.process_time(), time.monotonic()
        survey = Survey(_bucket(source), most_calls=alone)
        survey.run(KeyRange())
        dealt = share_out(survey.source, survey.left, shares) if survey.left else []
        survey.ruler.shrink(most_segments(len(dealt)))
        files.write(0, survey.calls, survey.ruler.segments())
        files.write_shares(dealt)
        listed = list(pool.map(partial(_list, source, files, len(dealt)), range(1, len(dealt) + 1)))
        requests, segments = files.read(len(dealt))
        partitions = cut_partitions(segments, KeyRange())
        wall_s = time.monotonic() - start
    if sum(partition.objects for partition in partitions) != objects:
        raise LabError(f"expected {objects} objects in the plan, found {sum(each.objects for each in partitions)}")
    calls = [share[0] for share in listed] or [requests]
    return Planned(
        processes,
        wall_s,
        time.process_time() - cpu + sum(share[1] for share in listed),
        requests,
        max(calls) * len(calls) / sum(calls),
        max(_peak_mib(), *(share[2] for share in listed), 0),
        [partition.objects for partition in partitions],
        len(task_groups(partitions)),
    )


def _ready(_: int) -> None:
    """Have an interpreter start."""
    time.sleep(0.2)


def _list(source: Source, files: ListingFiles, shares: int, number: int) -> tuple[int, float, int]:
    """List a share; return its requests, CPU seconds and the process's peak of memory in MiB."""
    cpu = time.process_time()
    survey = Survey(_bucket(source), ruler=Ruler(most_segments(shares)))
    segments = survey.run(*files.share(number))
    files.write(number, survey.calls, segments)
    return survey.calls, time.process_time() - cpu, _peak_mib()


def _bucket(source: Source) -> Bucket:
    return S3Bucket(source) if isinstance(source, S3Store) else cast("Bucket", source)


def _peak_mib() -> int:
    """Return the most memory that this process held; ru_maxrss counts that of its parent as well."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def by_several(objects: int, behind_http: int) -> str:
    """Plan with 1, 2 and 4 processes, the made-up source and the one behind HTTP; the table in Markdown.

    Args:
        objects: Of the made-up source.
        behind_http: Of the one behind HTTP.
    """
    lines = [
        "| source | processes | wall s | to one | CPU s, all | peak MiB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as state, stub_stores(Path(state), _HTTP_DELAY_MS) as stores:
        place = stores.source(Population(behind_http, page_keys=_HTTP_PAGE_KEYS))
        store = S3Store(place.endpoint, place.bucket, "", place.access_key, place.secret_key)
        sources: list[tuple[str, Source, int]] = [
            (f"made up, {objects // 1000:,} pages, 20 ms", Volume(objects, _DELAY_S), objects),
            (f"HTTP, {behind_http // _HTTP_PAGE_KEYS:,} pages, {_HTTP_DELAY_MS} ms", store, behind_http),
        ]
        for name, source, count in sources:
            one = 0.0
            for processes in (1, 2, 4):
                cost = plan(source, count, processes, processes)
                one = one or cost.wall_s
                lines.append(
                    f"| {name} | {processes} | {cost.wall_s:.1f} | {cost.wall_s / one:.2f} | {cost.cpu_s:.1f} "
                    f"| {cost.peak_mib} |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def in_words(cost: Planned, small: Planned) -> str:
    """Say what the plan of a very large source cost, beside a small one's."""
    about = machine()
    one_s, all_s = cost.requests * _DELAY_S / 16, cost.requests * _DELAY_S / 16 / cost.processes
    return (
        f"{cost.requests:,} LIST requests of 20 ms each, sixteen at once in a process: by one process {one_s:,.0f} s, "
        f"divided by {cost.processes} {all_s:,.0f} s; measured with {cost.processes} processes and {_SHARES} shares: "
        f"{cost.wall_s:,.0f} s. The largest share had {cost.busiest:.2f} of the mean. {cost.cpu_s:,.0f} s of CPU in "
        f"all; {cost.peak_mib} MiB at most in a process ({sum(small.counts):,} objects: {small.peak_mib} MiB). "
        f"{len(cost.counts):,} partitions of {min(cost.counts):,} to {max(cost.counts):,} objects in {cost.tasks:,} "
        f"mapped tasks. {about['date']}, load {about['load']}."
    )


def run(objects: int = 10**9, fewer: int = 5 * 10**7, behind_http: int = 200_000) -> str:
    """Everything, in Markdown.

    Args:
        objects: Of the very large source.
        fewer: Of the made-up one that 1, 2 and 4 processes plan.
        behind_http: Of the one behind HTTP.
    """
    # First the small one: a process's peak of memory never falls.
    small = plan(Volume(10**6), 10**6, 1, 1, ALONE_CALLS)
    cost = plan(Volume(objects, _DELAY_S), objects, _AT_ONCE, _SHARES, ALONE_CALLS)
    words = in_words(cost, small)
    print(words, file=sys.stderr, flush=True)
    return f"{words}\n\n{by_several(fewer, behind_http)}"


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects", type=float, nargs="?", default=1e9)
    parser.add_argument("--quick", action="store_true", help="few objects")
    given = parser.parse_args()
    print(run(10**7, 10**6, 20_000) if given.quick else run(int(given.objects)))


if __name__ == "__main__":
    main()

"""`python -m benchmarks.plan [OBJECTS]`: what the plan of a very large volume costs, without a store.

The source is made up: block keys in JuiceFS' layout, each page answered without building the keys that are not looked
at. What is measured is the plan's own: LIST requests, CPU, memory, partitions and how even they are.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast, overload

from include.juicefs_storage.copy.partitions import cut_partitions, task_groups
from include.juicefs_storage.copy.survey import LISTERS, Survey
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.objects.model import KeyRange, Page

_PAGE = 1000
_BLOCK_BYTES = 4 * 2**20
_LATENCY_S = 0.02


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

    def __init__(self, blocks: int) -> None:
        self._keys = _Keys(0, blocks)
        self._sizes, self._etags = [_BLOCK_BYTES] * _PAGE, [""] * _PAGE

    def check(self) -> None:
        """Nothing can be wrong."""

    def pages(self, keys: KeyRange) -> Iterator[Page]:
        """As a store lists them."""
        at = bisect_right(self._keys, keys.after) if keys.after is not None else 0
        stop = bisect_right(self._keys, keys.until) if keys.until is not None else len(self._keys)
        while at < stop:
            end = min(at + _PAGE, stop)
            count = end - at
            # A list in every way that the survey uses it.
            yield Page(self._keys[at:end], self._sizes[:count], self._etags[:count])  # type: ignore[arg-type]
            at = end

    def first_after(self, key: str) -> str | None:
        """By bisection."""
        at = bisect_right(self._keys, key)
        return self._keys[at] if at < len(self._keys) else None

    def md5(self, key: str) -> str | None:
        """Not asked for."""
        raise NotImplementedError(key)


def simulate(objects: int) -> dict[str, float]:
    """Plan a copy of so many objects, and say what it cost."""
    cpu, start = time.process_time(), time.monotonic()
    survey = Survey(cast("Bucket", Volume(objects)))
    partitions = cut_partitions(survey.run(KeyRange()), KeyRange())
    if survey.objects != objects or sum(partition.objects for partition in partitions) != objects:
        raise SystemExit(f"expected {objects} objects in the plan, found {survey.objects}")
    counts = [partition.objects for partition in partitions]
    return {
        "objects": objects,
        "list_requests": survey.calls,
        "partitions": len(partitions),
        "tasks": len(task_groups(partitions)),
        "smallest_partition": min(counts),
        "largest_partition": max(counts),
        "cpu_s": round(time.process_time() - cpu, 1),
        "wall_s": round(time.monotonic() - start, 1),
        "listing_s_at_20_ms_a_page": round(survey.calls * _LATENCY_S / LISTERS, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def main() -> None:
    """Print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("objects", type=float, nargs="?", default=1e9)
    print(json.dumps(simulate(int(parser.parse_args().objects)), indent=1))


if __name__ == "__main__":
    main()

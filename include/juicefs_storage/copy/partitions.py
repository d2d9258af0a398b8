"""Cut the keys of a source into partitions of about the same work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice

from include.juicefs_storage.copy.midpoint import shared_length
from include.juicefs_storage.copy.segments import Segment
from include.juicefs_storage.objects.model import KeyRange
from include.juicefs_storage.objects.progress import sized
from include.juicefs_storage.records import Record

#: A partition ends at this many objects or bytes, whichever comes first.
PARTITION_OBJECTS, PARTITION_BYTES = 250_000, 256 * 2**30
#: Airflow maps a task over so many values at most (core.max_map_length); of more partitions a task takes several.
MAX_TASKS = 1_024


class Partition(Record):
    """The keys with `after` < key <= `until`, and what the source had there when it was listed."""

    index: int
    after: str | None
    until: str | None
    objects: int
    bytes: int
    where: str

    @property
    def label(self) -> str:
        """For the grid: where, and how much."""
        return f"{self.index:03} {self.where} {amount(self.objects, self.bytes)}"

    @property
    def keys(self) -> KeyRange:
        """The range of keys."""
        return KeyRange(self.after, self.until)

    @property
    def name(self) -> str:
        """The name of its manifest."""
        return f"{self.index:05}"


def cut_partitions(segments: Sequence[Segment], keys: KeyRange, count: int | None = None) -> list[Partition]:
    """Cut a range into partitions of about the same work.

    Args:
        segments: What a listing found there, in order.
        keys: The range; together the partitions hold all of it, also where nothing was found.
        count: How many partitions; None: as many as PARTITION_OBJECTS and PARTITION_BYTES ask for. There may be fewer.
    """
    loads = [max(each.objects / PARTITION_OBJECTS, each.bytes / PARTITION_BYTES) for each in segments]
    total = sum(loads)
    wanted = count or max(1, math.ceil(total))
    groups: list[list[Segment]] = [[]]
    done = 0.0
    for segment, load in zip(segments, loads, strict=True):
        # Cut where the share is reached, before or after this segment, whichever is nearer.
        share = total * len(groups) / wanted
        if groups[-1] and len(groups) < wanted and done + load / 2 > share:
            groups.append([])
        groups[-1].append(segment)
        done += load
    partitions: list[Partition] = []
    for index, group in enumerate(groups):
        after = groups[index - 1][-1].until if index else keys.after
        until = group[-1].until if index < len(groups) - 1 else keys.until
        objects, size = sum(each.objects for each in group), sum(each.bytes for each in group)
        where = _where(after, group[0].until if group else None)
        partitions.append(Partition(index=index, after=after, until=until, objects=objects, bytes=size, where=where))
    return partitions


def _where(after: str | None, first: str | None) -> str:
    """Say where a partition begins: no more of the key than distinguishes it from the next."""
    if first is None:
        return "all keys"
    same = shared_length(after or "", first)
    text = first[: max(same + 1, 12)] if len(first) > 24 else first
    # No braces: the text goes where Airflow renders templates.
    shown = "".join(char if char.isprintable() and char not in "{}" else "?" for char in text[-40:])
    return f"{'…' if len(text) > 40 else ''}{shown}{'…' if text != first else ''}"


def amount(objects: int, size: int) -> str:
    """Format objects and bytes for people."""
    return f"{objects:,} objects, {sized(size)}"


def task_groups(partitions: Sequence[Partition], most: int = MAX_TASKS) -> list[list[int]]:
    """Share the partitions among tasks, by index: one each, or neighbours together where there are too many."""
    each = math.ceil(len(partitions) / most)
    ordered = iter(partition.index for partition in partitions)
    return [group for _ in partitions if (group := list(islice(ordered, each)))]

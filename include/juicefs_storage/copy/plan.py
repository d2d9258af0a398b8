"""The plan of a copy: its partitions, written down beside the manifests, which are joined with it at the end."""

from __future__ import annotations

import hashlib
from datetime import datetime
from functools import cached_property

from include.juicefs_storage.copy.params import SyncParams
from include.juicefs_storage.copy.partitions import Partition, amount
from include.juicefs_storage.records import Record
from include.juicefs_storage.volume.layout import ObjectSizes

_SHOWN = 200
_STEPS = {
    "copy": "copy what the target lacks, and check each object at once",
    "verify": "compare every object of both sides",
}


class NeededPlan(Record):
    """What the metadata said that a volume needs.

    Attributes:
        volume: Its name and UUID.
        folder: Where the blocks are written down, beside the manifests.
        chunks: Where they lie below the source's prefix.
        sizes: How long their objects may be.
        next_since_id: Where the next delta begins.
        shard: Which of the volume's buckets the source is, and of how many; empty: it has one.
    """

    volume: str
    folder: str
    chunks: str
    sizes: ObjectSizes
    next_since_id: int
    shard: str = ""

    def scope(self, since_id: int) -> list[str]:
        """Return which of the volume's blocks these are, where not all."""
        return [f"of slices from id {since_id} on"] * bool(since_id) + [self.shard] * bool(self.shard)


class SyncPlan(Record):
    """What a run does, cut into partitions.

    Attributes:
        source: Its name for people.
        target: Its name for people.
        cut_by: What the partitions were counted by.
        requests: LIST requests that this took.
        needed: Only with plan=metadata.
        made_at: When the keys were cut, by the source's clock: before any task copied.
    """

    source: str
    target: str
    params: SyncParams
    partitions: tuple[Partition, ...]
    cut_by: str
    requests: int = 0
    needed: NeededPlan | None = None
    made_at: datetime | None = None

    @cached_property
    def id(self) -> str:
        """Tells plans apart: manifests of another one are none of this one's."""
        return hashlib.sha256(self.model_dump_json(exclude={"requests", "made_at"}).encode()).hexdigest()[:16]

    @property
    def phases(self) -> tuple[str, ...]:
        """`copy`, `verify`, or both."""
        return tuple(self.params.mode.split("+"))

    @property
    def objects(self) -> int:
        """Of the source."""
        return sum(partition.objects for partition in self.partitions)

    @property
    def bytes(self) -> int:
        """Of the source."""
        return sum(partition.bytes for partition in self.partitions)

    def to_markdown(self) -> str:
        """Render the plan for a person."""
        params = self.params
        different = "are overwritten" if params.overwrite else "are reported, not overwritten"
        lines = [
            f"## {params.mode} of {amount(self.objects, self.bytes)}",
            "",
            "| | |",
            "|---|---|",
            f"| from | `{self.source}` |",
            f"| to | `{self.target}` |",
            f"| engine | {params.engine} |",
            f"| compared by | {params.compare} |",
            f"| objects that differ | {different if 'copy' in self.phases else 'are reported'} |",
            "| objects that the target alone has | are reported, never deleted |",
            f"| partitions | {len(self.partitions)}, cut by {self.cut_by} |",
            *self._needed_lines(),
            "",
            "### Steps, in this order",
            *(f"{number}. {_STEPS[phase]}" for number, phase in enumerate(self.phases, 1)),
            "",
            "### Partitions",
            "| | keys | objects | bytes |",
            "|---|---|---|---|",
            *(
                f"| {each.index} | after `{_cell(each.after)}` | {each.objects:,} | {each.bytes:,} |"
                for each in self.partitions[:_SHOWN]
            ),
        ]
        if len(self.partitions) > _SHOWN:
            lines.append(f"\n… and {len(self.partitions) - _SHOWN} more, in `plan.json` beside the manifests.")
        return "\n".join(lines)

    def _needed_lines(self) -> list[str]:
        if self.needed is None:
            return []
        which = ", ".join(self.needed.scope(self.params.since_id)) or "all of them"
        return [
            f"| blocks that files of {self.needed.volume} refer to | {which} |",
            "| blocks that no file refers to | are left alone, and counted |",
            f"| the next delta | `since_id={self.needed.next_since_id}` |",
        ]


def _cell(key: str | None) -> str:
    """Return a key as a cell of a table."""
    shown = "".join(character if character.isprintable() and character not in "|`" else "?" for character in key or "")
    return shown or " "

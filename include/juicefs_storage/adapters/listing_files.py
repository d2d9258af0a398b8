"""What the tasks that list a source found, written down beside the manifests for the plan to join.

`00000.jsonl` is what was listed before anything was shared out; then one file a share. The first line of each is the
number of LIST requests, each further one a segment. `shares.json` says which ranges each share is of.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from include.juicefs_storage.adapters.manifests import Folder, write
from include.juicefs_storage.copy.segments import Segment
from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.objects.model import KeyRange

_SHARES = "shares.json"


@dataclass(frozen=True)
class ListingFiles:
    """The files of one listing.

    Attributes:
        folder: Theirs alone.
    """

    folder: Folder

    def write_shares(self, shares: Sequence[Sequence[KeyRange]]) -> None:
        """Write down which ranges are whose."""
        ranges = [[(keys.after, keys.until) for keys in share] for share in shares]
        write(self.folder / _SHARES, json.dumps(ranges).encode())

    def share(self, number: int) -> list[KeyRange]:
        """Return the ranges of a share; the first is 1.

        Raises:
            PermanentError: They were not written down.
        """
        content = _existing(self.folder / _SHARES, "the shares of the listing", "check").read_bytes()
        return [KeyRange(after, until) for after, until in json.loads(content)[number - 1]]

    def write(self, number: int, requests: int, segments: Sequence[Segment]) -> None:
        """Write down what was found; where a task runs again, in the place of what it had found.

        Args:
            number: Of the share; 0: before there were any.
            requests: LIST requests that it took.
            segments: What was found, in order.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(requests), *map(json.dumps, segments)]
        write(self._file(number), "\n".join(lines).encode())

    def read(self, shares: int) -> tuple[int, list[Segment]]:
        """Return the LIST requests of the whole listing, and its segments in order.

        Args:
            shares: How many there are.

        Raises:
            PermanentError: Of some share nothing was written down.
        """
        requests, segments = 0, list[Segment]()
        for number in range(shares + 1):
            lines = self._lines(number)
            requests += int(next(lines))
            segments += (Segment(*json.loads(line)) for line in lines)
        return requests, sorted(segments)

    def _lines(self, number: int) -> Iterator[bytes]:
        task = f"list_source {number - 1}" if number else "check"
        with _existing(self._file(number), f"what {task} found", task).open("rb") as file:
            yield from file

    def _file(self, number: int) -> Folder:
        return self.folder / f"{number:05}.jsonl"


def _existing(file: Folder, what: str, task: str) -> Folder:
    if not file.exists():
        raise PermanentError(
            f"Expected {what} in {file}, found nothing.",
            next_step=f"clear {task} with Downstream; all workers need the same folder for manifests",
        )
    return file

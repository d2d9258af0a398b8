"""How a fleet ended: one line a volume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from include.juicefs_storage.markdown import table
from include.juicefs_storage.names import SWITCH, run_url
from include.juicefs_storage.records import Record
from include.juicefs_storage.switch.outcome import RUN_MEANING

FleetOutcome = Literal["moved", "planned", "refused", "rejected", "stopped", "incomplete"]

FLEET_MEANING: Mapping[FleetOutcome, str] = {
    "moved": "Every volume of the fleet is on the new store, and was well for `soak_s` after its move.",
    "planned": "Dry run: nothing was changed. Trigger again with dry_run=false to carry the plan out.",
    "refused": "Nothing was changed. Remove what blocks volumes, or leave them out (`exclude`), then trigger again.",
    "rejected": "The plan was not approved. Nothing was changed.",
    "stopped": "The fleet stopped: what was moved stays moved, what had not begun was not touched. See the runs of "
    "those that failed, then trigger a new run for the rest.",
    "incomplete": "The fleet ran to its end, and not every volume is proven on the new store. See the runs of "
    "those that failed, then trigger a new run for the rest.",
}


def explain_run(outcome: str | None, run_id: str) -> str:
    """Return how a volume's run ended, for the person who reads the fleet's report."""
    meaning = next((text for name, text in RUN_MEANING.items() if name == outcome), "It left no report.")
    return f"run {run_id} ended {outcome or 'without a report'}: {meaning}"


class VolumeEnd(Record):
    """One line of the fleet's report."""

    key: str
    wave: str
    state: str
    detail: str = ""
    run_id: str | None = None


def fleet_markdown(title: str, meaning: str, ends: Sequence[VolumeEnd], failed: Sequence[str] = ()) -> str:
    """Return the table of the volumes and their states; no table where there are none.

    Args:
        title: How the fleet ended, in a line.
        meaning: What that means.
        ends: Of each volume.
        failed: The task that failed first, as lines of Markdown.
    """
    lines = [f"## {title}", *failed, meaning]
    if ends:
        lines += ["", *table(["wave", "volume", "state", "", "run"], map(_row, ends))]
    return "\n".join(lines)


def _row(end: VolumeEnd) -> list[str]:
    link = f"[run]({run_url(SWITCH, end.run_id)})" if end.run_id else ""
    return [end.wave, f"`{end.key}`", end.state, end.detail, link]

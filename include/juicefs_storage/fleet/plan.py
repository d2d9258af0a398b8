"""The plan of a fleet: a canary, then waves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.fleet.members import Member
from include.juicefs_storage.fleet.params import FleetParams
from include.juicefs_storage.markdown import bullets, counted, one_line, table
from include.juicefs_storage.names import SWITCH, page_url, volume_run_id
from include.juicefs_storage.records import Record


class FleetPlan(Record):
    """What a fleet will do, and what it will not.

    Attributes:
        run_id: Of the fleet's run.
        waves: Keys of the volumes; the first wave is the canary alone.
    """

    run_id: str
    params: FleetParams
    members: tuple[Member, ...]
    waves: tuple[tuple[str, ...], ...]

    def member(self, key: str) -> Member:
        """Return the volume of this key."""
        return next(member for member in self.members if member.key == key)

    def wave_of(self, key: str) -> int | None:
        """Return the number of its wave, 0 for the canary; None where it is not to be moved."""
        return next((number for number, wave in enumerate(self.waves) if key in wave), None)

    @property
    def keys(self) -> list[str]:
        """Every volume that is to be moved, in order."""
        return [key for wave in self.waves for key in wave]

    @property
    def blocked(self) -> list[Member]:
        """Every volume that cannot be moved."""
        return [member for member in self.members if member.blockers]

    @property
    def title(self) -> str:
        """What is planned, in a line."""
        source = self.params.source_endpoint or ("its store" if len(self.keys) == 1 else "their stores")
        waves = " in waves" if len(self.keys) > 1 else ""
        return f"Move {counted(len(self.keys), 'volume')} from {source}{waves}"

    def to_markdown(self) -> str:
        """Render the plan for the person who approves it."""
        order = {key: number for number, key in enumerate(self.keys)}
        members = sorted(self.members, key=lambda member: order.get(member.key, len(order)))
        blockers = [f"`{member.key}`: {one_line(line)}" for member in self.blocked for line in member.blockers]
        columns = ["wave", "volume", "Secret", "from", "to", "clients", "blocks to copy", "warnings", "dry run"]
        lines = [f"## {self.title}", "", *table(columns, map(self._row, members))]
        lines += ["", "### What blocks", *bullets(blockers)]
        if steps := [f"{number}. {step}" for number, step in enumerate(self._steps(), 1)]:
            lines += ["", "### Steps, in this order", *steps]
        return "\n".join(lines)

    def _row(self, member: Member) -> list[object]:
        # A volume without params had no dry run.
        dry_run = page_url("plan", SWITCH, volume_run_id(self.run_id, member.key, dry_run=True))
        return [
            self._place(member), f"`{member.key}`", f"`{member.secret}`", f"`{member.before or '?'}`",
            f"`{member.after or '?'}`", member.clients, "" if member.missing is None else member.missing,
            member.warnings, f"[plan]({dry_run})" if member.params else "none",
        ]  # fmt: skip

    def _place(self, member: Member) -> str:
        number = self.wave_of(member.key)
        if number is None:
            return "already there" if member.there else "**blocked**"
        return "canary" if number == 0 else str(number)

    def _steps(self) -> Iterator[str]:
        params = self.params
        if not self.waves:
            return
        watched = f"watch it for {params.soak_s} s: clients proven, no restarts; then no block missing"
        yield f"switch `{self.waves[0][0]}`, the canary, in a run of its own; {watched}"
        if len(self.waves) > 1:
            if params.approve_after_canary:
                yield "ask for approval once more"
            waves = ["`, `".join(wave) for wave in self.waves[1:]]
            yield f"switch the others wave by wave, each watched before the next: `{'`; `'.join(waves)}`"
            if params.restart_csi:
                yield f"restart the CSI components once, at the end, and wait up to {params.rollout_timeout_s} s"
        stop = "start no other volume" if params.on_failure == "stop" else "continue with the next wave"
        yield f"if a volume fails: its own run rolls it back; {stop}, leave those that are moved"


def make_waves(ready: Sequence[Member], canary: str | None, size: int) -> tuple[tuple[str, ...], ...]:
    """Plan a canary, then waves; the volumes with the fewest clients first.

    Args:
        ready: The volumes that can be moved.
        canary: The key of the one that goes first; None: the one with the fewest clients, but at least one, which
            proves it.
        size: Of a wave, at most.

    Raises:
        PermanentError: `canary` is not among the volumes that can be moved.
    """
    order = [member.key for member in sorted(ready, key=lambda member: (member.clients, member.key))]
    if canary and canary not in order:
        raise PermanentError(
            f"Param `canary`: {canary!r} is not among the volumes that can be moved: {', '.join(order) or 'none'}.",
            state="nothing was changed",
            next_step="choose another, or leave it empty",
        )
    if not order:
        return ()
    first = canary or next(
        (member.key for key in order for member in ready if member.key == key and member.clients), order[0]
    )
    order.remove(first)
    return ((first,), *(tuple(order[start : start + size]) for start in range(0, len(order), size)))

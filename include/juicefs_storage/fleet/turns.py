"""Which volume of a fleet may be started now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from include.juicefs_storage.fleet.params import OnFailure

#: `left out` was never started; `failed` is every volume that is not proven on the new store.
VolumeState = Literal["waits", "under way", "moved", "failed", "left out"]
Turn = Literal["go", "wait", "stop"]


def volume_state(start: str, watch: str) -> VolumeState:
    """Return the state of a volume, by the states of the two tasks that start its run and watch it."""
    if start in {"skipped", "upstream_failed", "removed"}:
        return "left out"
    if start == "failed" or watch in {"failed", "upstream_failed"}:
        return "failed"
    if watch == "success":
        return "moved"
    return "under way" if start == "success" else "waits"


def whose_turn(
    waves: Sequence[Sequence[str]],
    key: str,
    states: Mapping[str, VolumeState],
    *,
    running: bool,
    on_failure: OnFailure,
) -> Turn:
    """Return whether a volume may be started now: never beside another wave, and after a failure only with `continue`.

    Args:
        waves: As planned.
        key: The volume.
        states: Of every volume.
        running: Whether a run of a volume of another wave is queued or running, whatever its tasks' states are.
        on_failure: Of the fleet.
    """
    mine = next(number for number, wave in enumerate(waves) if key in wave)
    if on_failure == "stop" and any(states[other] == "failed" for wave in waves for other in wave if other != key):
        return "stop"
    before = {states[other] for wave in waves[:mine] for other in wave}
    return "wait" if running or before & {"waits", "under way"} else "go"


def waves_ahead(waves: Sequence[Sequence[str]], key: str, states: Mapping[str, VolumeState]) -> int:
    """Count the waves that must end before this volume's may begin.

    Args:
        waves: The keys of the volumes of each wave, in order.
        key: The volume's key.
        states: Key -> state.
    """
    mine = next(number for number, wave in enumerate(waves) if key in wave)
    return sum(any(states[other] in {"waits", "under way"} for other in wave) for wave in waves[:mine])

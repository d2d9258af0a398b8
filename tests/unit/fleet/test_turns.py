"""Whose turn it is: wave by wave, and no volume after a failure."""

from __future__ import annotations

import pytest

from include.juicefs_storage.fleet.turns import VolumeState, volume_state, waves_ahead, whose_turn

WAVES = (("a",), ("b", "c"), ("d",))


@pytest.mark.parametrize(
    ("key", "states", "turn"),
    [
        ("b", {"a": "moved"}, "go"),
        ("b", {"a": "moved", "c": "under way"}, "go"),
        ("b", {"a": "under way"}, "wait"),
        ("d", {"a": "moved", "b": "moved"}, "wait"),
        ("d", {"a": "moved", "b": "moved", "c": "under way"}, "wait"),
        ("d", {"a": "moved", "b": "moved", "c": "moved"}, "go"),
        ("d", {"a": "moved", "b": "failed", "c": "moved"}, "stop"),
        ("d", {"a": "moved", "b": "failed", "c": "under way"}, "stop"),
        ("c", {"a": "moved", "b": "failed"}, "stop"),
        ("c", {"a": "moved", "b": "moved", "d": "failed"}, "stop"),
        # Its own failure, of an earlier try, is no reason not to try again.
        ("b", {"a": "moved", "b": "failed"}, "go"),
    ],
)
def test_a_wave_begins_when_those_before_it_have_ended_well(
    key: str, states: dict[str, VolumeState], turn: str
) -> None:
    all_states: dict[str, VolumeState] = {"a": "waits", "b": "waits", "c": "waits", "d": "waits", **states}
    assert whose_turn(WAVES, key, all_states, running=False, on_failure="stop") == turn


@pytest.mark.parametrize(
    ("start", "end", "state"),
    [
        ("none", "none", "waits"),
        ("up_for_reschedule", "none", "waits"),
        ("success", "none", "under way"),
        ("success", "up_for_reschedule", "under way"),
        ("success", "up_for_retry", "under way"),
        ("success", "success", "moved"),
        ("success", "failed", "failed"),
        ("failed", "upstream_failed", "failed"),
        ("skipped", "skipped", "left out"),
        ("upstream_failed", "upstream_failed", "left out"),
    ],
)
def test_the_state_of_a_volume_follows_from_its_two_tasks(start: str, end: str, state: VolumeState) -> None:
    assert volume_state(start, end) == state


def test_with_continue_a_wave_waits_for_the_end_of_those_before_it_however_they_end() -> None:
    states: dict[str, VolumeState] = {"a": "moved", "b": "failed", "c": "under way", "d": "waits"}
    assert whose_turn(WAVES, "d", states, running=False, on_failure="continue") == "wait"
    states["c"] = "left out"
    assert whose_turn(WAVES, "d", states, running=False, on_failure="continue") == "go"


def test_a_run_of_another_wave_that_nobody_watches_any_more_is_waited_for() -> None:
    states: dict[str, VolumeState] = {"a": "moved", "b": "failed", "c": "moved", "d": "waits"}
    assert whose_turn(WAVES, "d", states, running=True, on_failure="continue") == "wait"


def test_who_comes_later_knows_how_many_waves_are_ahead() -> None:
    states: dict[str, VolumeState] = {"a": "moved", "b": "moved", "c": "waits", "d": "waits"}
    assert [waves_ahead(WAVES, key, states) for key in "abd"] == [0, 0, 1]
    assert waves_ahead(WAVES, "d", dict.fromkeys("abcd", "waits")) == 2

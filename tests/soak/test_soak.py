"""`make soak` in short: a volume under load moves four times; the control loses files, and the checker finds them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from lab.soak import in_a_lab, run_control, run_soak
from tests.support.labs import lab_required

HEARTBEATS_S = (1, 2, 4)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path) -> None:
    soak = partial(run_soak, minutes=0, heartbeats_s=HEARTBEATS_S, writers=1, late_commit_s=5)
    with lab_required():
        assert in_a_lab(tmp_path / "soak", HEARTBEATS_S[0], soak) == []


def test_the_checker_finds_what_a_switch_without_catch_up_loses(tmp_path: Path) -> None:
    with lab_required():
        assert in_a_lab(tmp_path / "control", HEARTBEATS_S[0], partial(run_control, heartbeat_s=6)) == []

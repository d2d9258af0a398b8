"""The old store is idle when nothing has come to it for long enough."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from include.juicefs_storage.finish.idle import check_idle
from tests.support.fakes import FakeStore, setting

NOW = datetime(2026, 11, 29, 3, 0, tzinfo=UTC)
DAY_S = 86_400
BLOCK = "myjfs/chunks/0/0/9_0_1"


@pytest.mark.parametrize(
    ("written", "moved_ago_s", "level", "words"),
    [
        (NOW - timedelta(days=3), 2 * DAY_S, "ok", "no block on fake is newer than 2026-11-28 03:00"),
        (NOW - timedelta(hours=1), 2 * DAY_S, "warning", BLOCK),
        (NOW - timedelta(days=3), DAY_S // 2, "warning", "not yet 86400 s ago"),
    ],
    ids=["idle", "somebody writes", "left too lately"],
)
def test_what_came_to_it(written: datetime, moved_ago_s: int, level: str, words: str) -> None:
    store = FakeStore({BLOCK: 1, "theirs/chunks/0/0/1_0_1": 1}, written={BLOCK: written}, time=NOW)
    found = check_idle(store, setting(), NOW - timedelta(seconds=moved_ago_s), DAY_S)
    assert found.level == level
    assert words in found.message

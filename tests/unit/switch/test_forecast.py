"""What the plan says of the time that is left."""

from __future__ import annotations

import itertools

import pytest

from include.juicefs_storage.switch.forecast import forecast_lines, kept_lines, reading_rate
from include.juicefs_storage.volume.layout import block_objects
from tests.support.fakes import FakeMetadata, FakeStore, setting

ROW = setting()


def test_what_is_left_and_how_long_it_takes() -> None:
    first, window = forecast_lines(300, 25.0, [12, 60])
    assert first.startswith("300 blocks are left to copy before the setting is written: about 12 s at the 25 a second")
    assert window.endswith("up to 63 s")
    assert "about 56 min" in forecast_lines(100_000, 30.0, [])[0]
    assert "about 9.3 h" in forecast_lines(1_000_000, 30.0, [])[0]
    assert forecast_lines(0, None, []) == ["no block is left to copy now"]
    assert forecast_lines(7, None, []) == ["7 blocks are left to copy before the setting is written"]
    assert "not counted" in forecast_lines(None, None, [])[0]


def test_the_rate_is_of_blocks_that_were_read_and_the_measurement_ends() -> None:
    rows = [(number, 100) for number in range(1, 1001)]
    store = FakeStore({key: length for row in rows for key, length in block_objects(ROW, *row)})
    ticks = itertools.count(step=0.1)
    assert reading_rate(FakeMetadata(ROW, rows), ROW, store, lambda: next(ticks)) == pytest.approx(64 / 0.9)
    slow = itertools.count()
    assert reading_rate(FakeMetadata(ROW, rows), ROW, store, lambda: next(slow)) == pytest.approx(8 / 3)
    assert reading_rate(FakeMetadata(ROW, rows), ROW, FakeStore(), lambda: next(ticks)) is None
    assert reading_rate(FakeMetadata(ROW), ROW, store, lambda: next(ticks)) is None


def test_the_forecast_is_held_against_what_came() -> None:
    copy, window = kept_lines(300, 7.3, [10, 60], copied_s=58, window_s=31.5)
    assert copy == "the copy before the setting was written: estimated 41 s, took 58 s (1.4×)"  # noqa: RUF001
    assert window == (
        "the last client was proven 32 s after the setting was written; the plan had estimated up to 63 s (0.5×)"  # noqa: RUF001
    )
    assert kept_lines(None, None, [], copied_s=58, window_s=3) == [
        "the last client was proven 3 s after the setting was written"
    ]
    assert kept_lines(None, None, [], None, None, [41.0, 58.0]) == [
        "the proof of the blocks: estimated 41 s, took 58 s (1.4×)"  # noqa: RUF001
    ]
    assert kept_lines(300, None, [10], copied_s=58, window_s=None) == [], "no forecast, nothing to hold it against"

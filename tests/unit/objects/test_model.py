"""Ranges of keys: the folder that holds one, which is all that limited keys may list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from include.juicefs_storage.objects.model import KeyRange, below

KEYS = st.text(st.sampled_from("ab/\U0010ffff"), max_size=8)


@given(after=st.none() | KEYS, until=st.none() | KEYS, key=KEYS)
def test_every_key_of_a_range_is_in_its_folder(after: str | None, until: str | None, key: str) -> None:
    if (after is None or after < key) and (until is None or key <= until):
        assert key.startswith(KeyRange(after, until).folder)


@pytest.mark.parametrize(
    ("keys", "folder"),
    [
        (KeyRange(), ""),
        (KeyRange("vol/a", None), ""),
        (KeyRange(None, "vol/a"), ""),
        (KeyRange("a", "b"), ""),
        (below("vol/chunks/"), "vol/chunks/"),
        (KeyRange("vol/chunks/0/12_", "vol/chunks/0/13_0_4"), "vol/chunks/0/"),
        (KeyRange("vol/chunks/0/12", "vol/chunks/1/13"), "vol/chunks/"),
        # Stores that keep objects as files refuse these prefixes, or list what is below another one.
        (KeyRange("a//b", "a//c"), "a/"),
        (KeyRange("/lea", "/lead"), ""),
        (KeyRange("a/b/../c", "a/b/../d"), "a/b/"),
    ],
)
def test_the_folder_is_the_deepest_one(keys: KeyRange, folder: str) -> None:
    assert keys.folder == folder

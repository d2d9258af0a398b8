"""A partition that is killed anywhere, again and again: the target equals the source, and nothing is copied twice."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.juicefs_storage.adapters.manifests import ManifestReader, ParquetManifest
from include.juicefs_storage.copy import run
from include.juicefs_storage.copy.run import Options, Transfer
from include.juicefs_storage.objects.comparison import Rows
from include.juicefs_storage.objects.model import KeyRange, ObjectOutcome
from tests.support.copy_fakes import KilledError, MemoryBucket, MemoryEngine

#: Few characters: many keys that begin like others.
KEYS = st.text("ab/\u00e9\U0001f600", min_size=1, max_size=5) | st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=8
)
BODIES = st.binary(max_size=3)
BATCH_KEYS = 2


class Killed(ParquetManifest):
    """A manifest whose process dies before or after a checkpoint."""

    def arm(self, checkpoints: int, *, before: bool) -> Killed:
        self.left, self.before = checkpoints, before
        return self

    def append(self, rows: Rows) -> None:
        self.left -= 1
        if self.left < 0 and self.before:
            raise KilledError
        super().append(rows)
        if self.left < 0:
            raise KilledError


@settings(max_examples=60, deadline=None)
@given(
    source=st.dictionaries(KEYS, BODIES, min_size=8, max_size=25),
    target=st.dictionaries(KEYS, BODIES, max_size=8),
    kills=st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.none() | st.integers(1, 12)), min_size=1, max_size=4),
    shared=st.booleans(),
    overwrite=st.booleans(),
)
def test_kills_lose_nothing_and_copy_nothing_twice(
    source: dict[str, bytes],
    target: dict[str, bytes],
    kills: list[tuple[int, bool, int | None]],
    shared: bool,
    overwrite: bool,
) -> None:
    if shared:
        target = {**dict(list(source.items())[::2]), **target}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(run, "BATCH_KEYS", BATCH_KEYS)
        patch.setattr(run, "CHECKPOINT_KEYS", BATCH_KEYS)
        before = dict(target)
        left, right = MemoryBucket(dict(source)), MemoryBucket(target)
        copied: list[str] = []

        def attempt(manifest: ParquetManifest, dies_after: int | None) -> None:
            engine = MemoryEngine(left, right, dies_after=dies_after)
            try:
                Transfer(left, right, engine, Options(overwrite=overwrite)).copy(KeyRange(), manifest)
            finally:
                copied.extend(engine.copied)

        for checkpoints, early, objects in kills:
            try:
                attempt(Killed(Path(folder), "p", {}).arm(checkpoints, before=early), objects)
            except KilledError:
                continue
            break
        final = ParquetManifest(Path(folder), "p", {})
        attempt(final, None)

        rows = list(ManifestReader(final.file).rows(set(ObjectOutcome)))
        outcomes = {row.key: row.outcome for row in rows}
        assert [row.key for row in rows] == sorted(outcomes), "one row a key, in order"
        different = {key for key in source.keys() & before.keys() if source[key] != before[key]}
        assert right.objects == {**before, **{k: v for k, v in source.items() if overwrite or k not in different}}
        assert outcomes.keys() == source.keys() | before.keys()
        assert {
            key for key, outcome in outcomes.items() if outcome == ObjectOutcome.EXTRA
        } == before.keys() - source.keys()
        assert {k for k, outcome in outcomes.items() if outcome == ObjectOutcome.DIFFERENT} == (
            set() if overwrite else different
        )
        assert len(copied) == len(set(copied)), "what is there already is not copied again"
        assert set(copied) == (source.keys() - before.keys()) | (different if overwrite else set())

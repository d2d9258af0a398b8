"""The two locations of a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.switch.change import Change, ChangeKind
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.run import SwitchRun
from tests.support.fakes import OLD, FakeStore, setting


def silent() -> bool:
    raise TransientError("no answer")


@pytest.mark.parametrize(
    ("kind", "knows_new_keys", "looked_at_by"),
    [
        ("keys", lambda: True, "new keys"),
        ("keys", lambda: False, "old keys"),
        ("keys", silent, "new keys"),
        ("copied", lambda: True, "old keys"),
    ],
)
def test_by_which_keys_the_old_location_is_looked_at(
    kind: ChangeKind, knows_new_keys: object, looked_at_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old key may be withdrawn where keys change; where the new one is, the way back must not depend on it."""
    new = FakeStore(name="new keys")
    monkeypatch.setattr(new, "knows_keys", knows_new_keys, raising=False)
    runtime = SimpleNamespace(
        source=lambda found: found.config, target_store=new, source_store=lambda _: FakeStore(name="old keys")
    )
    run = SwitchRun(cast("Runtime", runtime))
    monkeypatch.setattr(SwitchRun, "before", setting(OLD))
    monkeypatch.setattr(SwitchRun, "change", Change(kind=kind))
    assert run.old.store.name == looked_at_by

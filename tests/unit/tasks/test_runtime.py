"""Whether a store takes a key: Airflow's word counts where it is yes."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError, UnreachableError
from include.juicefs_storage.tasks import runtime
from include.juicefs_storage.tasks.runtime import VolumeRuntime
from tests.support.fakes import NEW, OLD


@pytest.mark.parametrize(
    ("refuses_airflow", "clients", "expected", "asked"),
    [(False, "not asked", "", 0), (True, "", "", 1), (True, "SignatureDoesNotMatch", "SignatureDoesNotMatch", 1)],
    ids=["taken", "taken from the clients alone", "refused"],
)
def test_who_is_asked(
    refuses_airflow: bool, clients: str, expected: str, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def by_juicefs(config: Any) -> str:
        calls.append(config)
        return clients

    class Probed(VolumeRuntime):
        juicefs: Any = SimpleNamespace(try_storage=by_juicefs)

        def _by_setting(self, config: Any) -> Any:
            def check() -> None:
                if refuses_airflow:
                    raise PermanentError("403")

            return SimpleNamespace(ping=lambda: None, check=check)

    monkeypatch.setattr(runtime, "mask_keys", lambda config: None)
    params: Any = SimpleNamespace()
    assert Probed(params).try_storage(OLD) == expected
    assert len(calls) == asked


def test_a_store_that_is_silent_towards_airflow_and_the_clients_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With each key that a carrier has, it would take half a minute again."""
    asked: list[str] = []

    def by_juicefs(config: Any, *, timeout_s: int = 30) -> str:
        asked.append(f"juicefs for {timeout_s} s")
        return f"no answer within {timeout_s} s"

    def ping() -> None:
        asked.append("Airflow")
        raise UnreachableError("no answer in time")

    class Probed(VolumeRuntime):
        juicefs: Any = SimpleNamespace(try_storage=by_juicefs)

        def _by_setting(self, config: Any) -> Any:
            return SimpleNamespace(ping=ping)

    monkeypatch.setattr(runtime, "mask_keys", lambda config: None)
    params: Any = SimpleNamespace()
    probed = Probed(params)
    for config in (OLD, replace(OLD, secret_key=NEW.secret_key)):
        assert probed.try_storage(config) == "no answer within 12 s"
    assert asked == ["Airflow", "juicefs for 12 s"]
    probed.try_storage(NEW)
    assert len(asked) == 4

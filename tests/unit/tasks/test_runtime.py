"""Whether a store takes a key: Airflow's word counts where it is yes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.tasks import runtime
from include.juicefs_storage.tasks.runtime import VolumeRuntime
from tests.support.fakes import OLD


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

            return SimpleNamespace(check=check)

    monkeypatch.setattr(runtime, "mask_keys", lambda config: None)
    params: Any = SimpleNamespace()
    assert Probed(params).try_storage(OLD) == expected
    assert len(calls) == asked

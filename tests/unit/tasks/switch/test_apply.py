"""What was approved is what is done, whatever the connection says later."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.plan import fingerprint
from include.juicefs_storage.tasks.runtime import Runtime
from include.juicefs_storage.tasks.switch.apply import approved_target
from include.juicefs_storage.tasks.switch.run import SwitchRun
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD, plan, setting

KEY = b"k" * 32


def run_to(described: StorageConfig) -> SwitchRun:
    """A run that was planned to NEW, with a connection that describes something now."""
    runtime = SimpleNamespace(
        setting=lambda: setting(OLD),
        target=lambda now: described,
        vault=SimpleNamespace(keys=(KEY,)),
        params=SimpleNamespace(target_conn_id="minio_new"),
    )
    run = SwitchRun(cast("Runtime", runtime))
    run.plan = plan(target_fingerprint=fingerprint(NEW, KEY))
    return run


def test_an_unchanged_connection_is_what_was_approved() -> None:
    assert approved_target(run_to(NEW)) == NEW


@pytest.mark.parametrize(
    "edited",
    [
        StorageConfig(NEW.storage, "https://elsewhere:9000/data2", NEW.access_key, NEW.secret_key),
        StorageConfig(NEW.storage, NEW.bucket, SecretStr("OTHER"), NEW.secret_key),
        StorageConfig(NEW.storage, NEW.bucket, NEW.access_key, SecretStr("other-secret-value")),
    ],
)
def test_a_connection_that_was_edited_since_the_plan_is_refused(edited: StorageConfig) -> None:
    with pytest.raises(PermanentError, match="changed since the plan was made") as refused:
        approved_target(run_to(edited))
    assert "other-secret-value" not in str(refused.value)

"""The look at the setting: is it still where the last run left it?"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from pydantic import SecretStr

from include.juicefs_storage.switch.marks import Mark, mark_id
from include.juicefs_storage.switch.moved_back import check_setting
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.fakes import NEW, OLD, UUID, FakeVault, backup, setting

BACKUP, LATER = "myjfs.manual__1", "myjfs.manual__2"
AT = datetime(2026, 11, 28, 3, 0, tzinfo=UTC)
THIRD = replace(NEW, bucket="https://third:9000/data3")


def vault(*, uuid: str = UUID) -> FakeVault:
    found = FakeVault()
    found.save(BACKUP, backup(BACKUP, AT).to_bytes())
    found.save(mark_id(BACKUP, "switched"), Mark(uuid, AT + timedelta(minutes=9)).to_bytes())
    return found


@pytest.mark.parametrize(
    ("now", "level", "words"),
    [
        (NEW, "ok", ["as myjfs.manual__1 left it"]),
        (OLD, "refusal", ["moved since the last switch, back to http://old:9000/data", "left it at https://new:9000"]),
        (THIRD, "refusal", ["moved since the last switch: it names https://third:9000/data3"]),
        (replace(NEW, access_key=SecretStr("OTHER")), "refusal", ["moved since the last switch: it names"]),
    ],
    ids=["as it was left", "back to the old store", "to another store", "another key"],
)
def test_where_the_setting_is_now(now: StorageConfig, level: str, words: list[str]) -> None:
    (found,) = check_setting(vault(), setting(now))
    assert found.level == level
    assert [word for word in words if word not in found.message] == []


def test_the_latest_run_counts() -> None:
    found = vault()
    back = backup(LATER, AT + timedelta(days=1), setting_hex=setting(NEW).raw.hex(), target=_target(OLD))
    found.save(LATER, back.to_bytes())
    found.save(mark_id(LATER, "switched"), Mark(UUID, AT + timedelta(days=1, minutes=9)).to_bytes())
    assert [row.level for row in check_setting(found, setting(OLD))] == ["ok"]
    assert "back to https://new:9000/data2" in check_setting(found, setting(NEW))[0].message


@pytest.mark.parametrize("other", [FakeVault(), vault(uuid="another volume of this name")], ids=["none", "another"])
def test_a_volume_that_no_run_has_moved_is_well(other: FakeVault) -> None:
    assert [row.level for row in check_setting(other, setting(OLD))] == ["ok"]


def test_what_cannot_be_read_is_a_warning() -> None:
    found = vault()
    found.files[BACKUP] = b"?"
    assert [row.level for row in check_setting(found, setting(OLD))] == ["warning"]


def _target(config: StorageConfig) -> tuple[str, str, str, str]:
    keys = config.access_key.get_secret_value(), config.secret_key.get_secret_value()
    return config.storage, config.bucket, *keys

"""The row `format`: reading it, decrypting it, merging it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.volume.setting import Setting, StorageConfig, masked
from tests.support.fakes import NEW, OLD, setting


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_secret_key_is_decrypted(encrypted: bool) -> None:
    assert setting(OLD, encrypted=encrypted).config == OLD
    assert setting(OLD, encrypted=encrypted).uses(OLD)
    assert not setting(OLD, encrypted=encrypted).uses(NEW)


def test_a_secret_key_of_another_volume_is_refused_with_a_remedy() -> None:
    row = json.loads(setting(OLD).raw) | {"UUID": "99999999-2222-3333-4444-555555555555"}
    with pytest.raises(PermanentError, match="source_conn_id"):
        Setting(json.dumps(row).encode()).config  # noqa: B018


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"not json"])
def test_what_is_no_setting_is_refused(raw: bytes) -> None:
    with pytest.raises(PermanentError, match="not the JSON of a JuiceFS volume"):
        Setting(raw).name  # noqa: B018


def test_restoring_gives_the_exact_bytes_back_when_nothing_else_changed() -> None:
    before, now = setting(OLD), setting(NEW)
    assert now.with_storage_of(before).raw == before.raw


def test_restoring_keeps_what_else_changed_meanwhile() -> None:
    before, now = setting(OLD), setting(NEW, TrashDays=7, FieldOfTomorrow={"a": 1})
    merged = now.with_storage_of(before)
    assert merged.uses(OLD)
    fields = json.loads(merged.raw)
    assert (fields["TrashDays"], fields["FieldOfTomorrow"]) == (7, {"a": 1})


def test_a_reencrypted_setting_has_other_bytes_and_the_same_meaning() -> None:
    row = setting(OLD, TrashDays=7)
    again = row.reencrypted()
    assert again.raw != row.raw
    assert json.loads(again.raw).keys() == json.loads(row.raw).keys()
    assert {key for key, value in json.loads(again.raw).items() if json.loads(row.raw)[key] != value} == {"SecretKey"}
    assert again.uses(OLD)
    with pytest.raises(PermanentError, match="--encrypt-secret"):
        setting(OLD, encrypted=False).reencrypted()


def test_a_plain_row_restored_over_an_encrypted_one_stays_readable() -> None:
    before = setting(OLD, encrypted=False)
    assert setting(NEW, TrashDays=7).with_storage_of(before).uses(OLD)


def test_no_repr_shows_a_key() -> None:
    shown = repr(OLD) + repr(setting(OLD)) + repr([setting(OLD).config])
    assert "OLDKEY" not in shown
    assert "old-secret" not in shown


@pytest.mark.parametrize("encrypted", [True, False])
def test_the_session_token_is_decrypted(encrypted: bool) -> None:
    temporary = replace(OLD, session_token=SecretStr("old-token"))
    found = setting(temporary, encrypted=encrypted)
    assert found.config == temporary
    assert not found.uses(OLD)
    assert "old-token" not in repr(found.config)


def test_a_token_that_cannot_be_decrypted_is_named() -> None:
    row = json.loads(setting(OLD).raw) | {"SessionToken": "bm90IHNlYWxlZCBieSBqdWljZWZz"}
    with pytest.raises(PermanentError, match="session token"):
        Setting(json.dumps(row).encode()).config  # noqa: B018


def test_restoring_brings_back_that_there_was_no_token() -> None:
    before, now = setting(OLD), setting(replace(NEW, session_token=SecretStr("new-token")), TrashDays=7)
    assert now.with_storage_of(before).config == OLD


def test_a_token_is_reencrypted_with_the_key() -> None:
    temporary = replace(OLD, session_token=SecretStr("old-token"))
    assert setting(temporary).reencrypted().uses(temporary)


def test_a_kind_in_capitals_is_read_as_juicefs_reads_it() -> None:
    capitals = setting(replace(OLD, storage="MINIO"))
    assert capitals.storage == "minio"
    assert capitals.uses(OLD)
    assert b"MINIO" in setting(NEW).with_storage_of(capitals).raw


def test_masked_keys_are_distinct_but_useless() -> None:
    assert masked(StorageConfig("s3", "", type(OLD.access_key)("AKIAIOSFODNN7"), OLD.secret_key).access_key) == "AK…N7"
    assert masked(OLD.access_key) == "…"

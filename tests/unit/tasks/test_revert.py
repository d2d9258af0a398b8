"""Which backup, and what a revert takes from the run that made it."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr

from include.juicefs_storage.errors import PermanentError
from include.juicefs_storage.switch.backup import backup_ids, read_backup
from include.juicefs_storage.switch.params import RevertForm, resolve_revert_params
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.tasks import revert
from include.juicefs_storage.volume.setting import STORAGE_FIELDS
from tests.support.fakes import NEW, OLD, UUID, FakeJuiceFS, FakeMetadata, FakeVault, backup, setting

RECORDED = {"namespace": "fs", "target_conn_id": "minio_new", "settle_s": 7, "dry_run": False, "on_failure": "hold"}


@pytest.fixture
def vault() -> FakeVault:
    vault = FakeVault()
    for name, day, params in (("myjfs.one", 1, {}), ("myjfs.two", 2, RECORDED)):
        vault.save(name, backup(name, datetime(2026, 11, day, tzinfo=UTC), params=params).to_bytes())
    vault.save("myjfs.two.switched", b"2026-11-02T10:00:00+00:00")
    vault.save("myjfs.one.rolled-back", b"2026-11-01T10:00:00+00:00")
    return vault


def test_what_lies_beside_a_backup_is_no_backup(vault: FakeVault) -> None:
    vault.save("myjfs-2.x", b"")
    vault.save("myjfs.two.2", b"")
    assert backup_ids(vault, "myjfs") == ["myjfs.one", "myjfs.two", "myjfs.two.2"]
    assert backup_ids(vault) == ["myjfs-2.x", "myjfs.one", "myjfs.two", "myjfs.two.2"]


def test_an_unknown_id_is_answered_with_the_known_ones(vault: FakeVault) -> None:
    with pytest.raises(PermanentError, match=r"no backup 'myjfs\.tow'.*myjfs\.one, myjfs\.two"):
        read_backup(vault, "myjfs.tow")


def test_what_is_not_a_backup_is_refused_without_its_content(vault: FakeVault) -> None:
    vault.save("myjfs.odd", b'{"secret_key": "old-secret-value"}')
    with pytest.raises(PermanentError, match=r"myjfs\.odd can be decrypted and is not a backup") as refused:
        read_backup(vault, "myjfs.odd")
    assert "old-secret-value" not in str(refused.value)


def test_backups_are_offered_newest_first_with_how_their_run_ended_and_no_key(vault: FakeVault) -> None:
    vault.save("myjfs.damaged", b"?")
    backups = revert.readable_backups(vault)
    assert [found.backup_id for found in backups] == ["myjfs.two", "myjfs.one"]
    rows = [row for row in revert.offer(backups, vault).splitlines() if row.startswith("| `")]
    assert "2026-11-02 00:00 UTC" in rows[0]
    assert rows[0].endswith("| switched |")
    assert rows[1].endswith("| rolled-back |")
    assert OLD.bucket in rows[0]
    assert not [secret for secret in ("OLDKEY", "old-secret-value", "new-secret-value") if secret in "".join(rows)]


def test_the_backup_fills_in_what_the_form_leaves_open_but_never_safety() -> None:
    params = resolve_revert_params(RevertForm(), "myjfs.two", RECORDED, "data", still_there=True)
    assert (params.namespace, params.settle_s, params.backup_id) == ("fs", 7, "myjfs.two")
    assert (params.dry_run, params.require_approval, params.on_failure) == (True, True, "rollback")
    # The stores change places.
    assert (params.source_conn_id, params.target_conn_id, params.target_bucket) == ("minio_new", "", "data")


def test_a_volume_that_moved_on_is_reached_by_its_setting_and_the_form_has_the_last_word() -> None:
    form = RevertForm(namespace="other", settle_s=1, target_conn_id="minio_old")
    params = resolve_revert_params(form, "myjfs.two", RECORDED, "data", still_there=False)
    assert (params.namespace, params.settle_s) == ("other", 1)
    assert (params.source_conn_id, params.target_conn_id) == (None, "minio_old")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"dryrun": False}, ["`dryrun` is not a param of this DAG", "backup_id"]),
        ({"target_bucket": "data"}, ["`target_bucket` is not a param of this DAG"]),
        ({"on_failure": "panic"}, ["`on_failure`", "panic"]),
    ],
)
def test_a_bad_param_is_refused_by_name(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PermanentError) as refused:
        RevertForm.validated(given)
    assert [word for word in words if word not in str(refused.value)] == []


def test_a_number_out_of_its_range_is_refused_by_name() -> None:
    with pytest.raises(PermanentError, match=r"`settle_s`.*greater than or equal to 0"):
        resolve_revert_params(RevertForm.validated({"settle_s": -1}), "myjfs.two", RECORDED, "data", still_there=True)


def now_on(monkeypatch: pytest.MonkeyPatch, uuid: str = UUID) -> None:
    row = setting(NEW, UUID=uuid)
    monkeypatch.setattr(revert, "Runtime", lambda params: SimpleNamespace(setting=lambda: row))


@pytest.mark.parametrize(
    ("given", "chosen"), [({"backup_id": "myjfs.two"}, None), ({}, {"chosen_options": ["myjfs.two"]})]
)
def test_the_backup_is_the_one_given_or_chosen(
    monkeypatch: pytest.MonkeyPatch, vault: FakeVault, given: dict[str, Any], chosen: dict[str, Any] | None
) -> None:
    now_on(monkeypatch)
    params = revert.resolve(given, chosen, vault)
    assert (params["backup_id"], params["target_bucket"], params["source_conn_id"]) == (
        "myjfs.two",
        "data",
        "minio_new",
    )


def test_a_backup_of_another_volume_is_refused(monkeypatch: pytest.MonkeyPatch, vault: FakeVault) -> None:
    now_on(monkeypatch, uuid="99999999-2222-3333-4444-555555555555")
    with pytest.raises(PermanentError, match=r"is of volume myjfs .*; the metadata database holds myjfs"):
        revert.resolve({"backup_id": "myjfs.two"}, None, vault)


@pytest.mark.parametrize("chosen", [None, {"chosen_options": []}])
def test_without_any_backup_it_says_so(vault: FakeVault, chosen: dict[str, Any] | None) -> None:
    with pytest.raises(PermanentError, match="no readable backup"):
        revert.resolve({}, chosen, FakeVault())


def test_the_recorded_storage_goes_back_to_the_letter_and_nothing_else_does() -> None:
    old = replace(OLD, session_token=SecretStr("old-token"))
    recorded = setting(old)
    metadata = FakeMetadata(setting(NEW, TrashDays=9))
    juicefs = FakeJuiceFS(metadata)
    step = WriteSetting(metadata, juicefs, metadata.row, old, recorded=recorded)
    assert step.apply().written
    fields: dict[str, Any] = metadata.row._fields
    assert [fields[name] for name in STORAGE_FIELDS] == [recorded._fields[name] for name in STORAGE_FIELDS]
    assert (fields["TrashDays"], juicefs.calls) == (9, 0)
    assert not step.apply().written

"""Prove a fresh mount: what `juicefs status` names, and where its writes land."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.switch.prove_fresh_mount import prove_status, use_fresh_mount
from tests.support.bare import BareJuiceFS
from tests.support.fakes import NEW, OLD, FakeStore, setting

CANARY = ".storage-switch-run"


@dataclass
class Mounts(BareJuiceFS):
    """A client that mounts; `fails` says that it does not come up."""

    shown: dict[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ("myjfs/chunks/0/0/7_0_4",)
    fails: bool = False
    mounted: list[str] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        return self.shown

    def mount_fresh(self, canary: str, lost_files: Sequence[str] = ()) -> list[str]:
        self.mounted.append(canary)
        if self.fails:
            raise TransientError("not mounted")
        return list(self.keys)

    def unmount_fresh(self, canary: str) -> None:
        self.mounted.remove(canary)


def test_the_status_of_this_volume_on_the_new_storage_is_a_proof() -> None:
    row = setting(NEW)
    prove_status(Mounts({"Setting": {"UUID": row.uuid, "Bucket": NEW.bucket}}), row, NEW)


@pytest.mark.parametrize(
    "shown",
    [
        {},
        {"Setting": None},
        {"Setting": {"UUID": setting().uuid, "Bucket": OLD.bucket}},
        {"Setting": {"UUID": "of-another-volume", "Bucket": NEW.bucket}},
    ],
)
def test_a_status_that_names_something_else_is_no_proof(shown: dict[str, Any]) -> None:
    with pytest.raises(TransientError, match=f"expected '{NEW.bucket}'"):
        prove_status(Mounts(shown), setting(NEW), NEW)


def test_what_a_fresh_mount_writes_is_counted_on_the_store() -> None:
    juicefs = Mounts()
    assert use_fresh_mount(juicefs, FakeStore(dict.fromkeys(juicefs.keys, 4)), NEW, CANARY) == 1
    assert juicefs.mounted == []


def test_a_block_that_is_not_on_the_store_is_named_and_the_mount_is_taken_down() -> None:
    juicefs = Mounts()
    with pytest.raises(TransientError, match="7_0_4, which is not in https://new:9000/data2"):
        use_fresh_mount(juicefs, FakeStore(), NEW, CANARY)
    assert juicefs.mounted == []


def test_a_mount_that_does_not_come_up_is_taken_down_too() -> None:
    juicefs = Mounts(fails=True)
    with pytest.raises(TransientError, match="not mounted"):
        use_fresh_mount(juicefs, FakeStore(), NEW, CANARY)
    assert juicefs.mounted == []

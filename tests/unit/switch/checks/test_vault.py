"""Files that cannot be read are named and stop nothing."""

from __future__ import annotations

from include.juicefs_storage.switch.checks import check_readable
from tests.support.fakes import FakeVault


def test_readable_files_are_no_news() -> None:
    assert check_readable(FakeVault({"myjfs.a": b"x", "other.b": b"?", "myjfs-2.c": b"?"}), "myjfs") == []


def test_what_cannot_be_read_is_named_and_the_rest_counted() -> None:
    vault = FakeVault({f"myjfs.{number}.switched": b"?" for number in range(7)} | {"myjfs.a": b"x"})
    (finding,) = check_readable(vault, "myjfs")
    assert finding.level == "warning"
    assert "7 of the files of myjfs" in finding.message
    assert "myjfs.6.switched and 2 more" in finding.message
    assert "old_keys" in finding.remedy

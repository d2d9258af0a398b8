"""Which changes by others our write took back."""

from __future__ import annotations

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.switch.concurrent_changes import lost_fields, watch_setting
from include.juicefs_storage.volume.setting import Setting
from lab.process import wait_for
from tests.support.fakes import NEW, OLD, setting


def test_a_field_that_was_changed_again_since_is_left_alone() -> None:
    earlier = [setting(OLD), setting(OLD, TrashDays=7)]
    assert lost_fields(earlier, setting(NEW, TrashDays=30)) == ()
    assert lost_fields(earlier, setting(NEW)) == ("TrashDays",)
    assert lost_fields(earlier[:1], setting(NEW, Capacity=5)) == ()


def test_a_watch_sees_each_version_once() -> None:
    versions = [setting(OLD), setting(OLD, TrashDays=7)]
    reads: list[Setting] = []

    def read() -> Setting:
        reads.append(versions[0] if len(reads) < 2 else versions[1])
        return reads[-1]

    with watch_setting(read, versions[0]) as seen:
        wait_for("several reads", lambda: len(reads) > 4, deadline_s=10, poll_s=0.01)
    assert seen == versions


def test_a_watch_that_cannot_read_disturbs_nobody() -> None:
    def read() -> Setting:
        raise TransientError("away")

    first = setting(OLD)
    with watch_setting(read, first) as seen:
        pass
    assert seen == [first]

"""How long the clients are waited for before the cut-over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.switch.report import proof_lines
from include.juicefs_storage.switch.wait_for_quiet import Quiet, wait_for_quiet
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods
from tests.support.fakes import MOUNT


@dataclass
class Pods:
    """One client, whose uploads at each look are told in advance; the last of them stays."""

    uploads: list[int]
    staged: int = 0
    away: bool = False
    now_s: float = field(default=0.0)

    def mounts(self) -> list[MountPod]:
        if self.away:
            raise TransientError("Mount pod a: no answer.")
        found = self.uploads.pop(0) if len(self.uploads) > 1 else self.uploads[0]
        return [MOUNT.model_copy(update={"uploading": found, "staged_blocks": self.staged})]

    def wait(self, timeout_s: float = 5) -> Quiet:
        def sleep(seconds: float) -> None:
            self.now_s += seconds

        clock: Callable[[], float] = lambda: self.now_s  # noqa: E731
        return wait_for_quiet(cast("VolumePods", self), timeout_s=timeout_s, clock=clock, sleep=sleep)


def test_it_is_quiet_when_two_looks_on_end_find_no_upload() -> None:
    found = Pods([1, 0, 2, 0, 0, 7]).wait()
    assert (found.quiet, found.waited_s, found.busy) == (True, 4.0, {})
    (line,) = proof_lines({"write_setting": {"quiet": found.model_dump()}})
    assert line == "no client uploaded when the setting was written: that took 4.0 s"


def test_it_goes_ahead_when_the_time_is_over_and_names_who_still_uploads() -> None:
    found = Pods([3]).wait()
    assert (found.quiet, found.waited_s) == (False, 5.0)
    (line,) = proof_lines({"write_setting": {"quiet": found.model_dump()}})
    assert "was over after 5.0 s" in line
    assert f"`{MOUNT.name}`: 0.0 MiB in its buffers, 3 uploads, 0 staged blocks" in line


@pytest.mark.parametrize(("pods", "words"), [(Pods([0], staged=1), "1 staged block"), (Pods([0], away=True), "answer")])
def test_blocks_that_wait_and_clients_that_do_not_answer_are_not_quiet(pods: Pods, words: str) -> None:
    found = pods.wait()
    assert not found.quiet
    assert words in "".join(found.busy.values())

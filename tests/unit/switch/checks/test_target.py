"""What the pods answer about the new endpoint."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.ports import ExecResult
from include.juicefs_storage.switch.checks.target import check_reach
from tests.support.bare import BareCluster
from tests.support.fakes import MOUNT, NEW


class Pods(BareCluster):
    """A cluster whose pods answer every exec alike."""

    def __init__(self, answer: ExecResult | TransientError) -> None:
        self.answer = answer

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        if isinstance(self.answer, TransientError):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        (ExecResult(0, "", ""), "ok"),
        (ExecResult(7, "", "curl: (7) Failed to connect"), "refusal"),
        (ExecResult(69, "", ""), "warning"),
        (ExecResult(127, "", "sh: not found"), "warning"),
        (TransientError("the connection was lost"), "warning"),
    ],
)
def test_what_the_pods_say_about_the_endpoint(answer: ExecResult | TransientError, level: str) -> None:
    (finding,) = check_reach(Pods(answer), NEW, [MOUNT], controller=False)
    assert finding.level == level

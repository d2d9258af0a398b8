"""Restart the CSI components: an answer that is lost, a restart that fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.ports import Workload, WorkloadKind
from include.juicefs_storage.switch.restart_csi import RestartCsi
from include.juicefs_storage.volume.clusters import Clusters
from tests.support.bare import BareCluster

STAMP = "juicefs-storage-switch/restarted-by"


@dataclass
class Workloads(BareCluster):
    """The annotations of two workloads; `answers` lost or refused, in order."""

    stamps: dict[str, str] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    calls: int = 0

    def workload(self, kind: WorkloadKind, name: str) -> Workload:
        annotations = {STAMP: self.stamps[name]} if name in self.stamps else {}
        return Workload(kind, name, args=(), annotations=annotations, rolled_out=True, progress="")

    def stamp_template(self, kind: WorkloadKind, name: str, annotations: Mapping[str, str]) -> None:
        self.calls += 1
        answer = self.answers.pop(0) if self.answers else "ok"
        if answer != "request lost":
            self.stamps[name] = annotations[STAMP]
        if answer != "ok":
            raise TransientError(answer)


@pytest.mark.parametrize(
    ("answers", "calls"), [(["answer lost"], 2), (["request lost"], 3), (["ok", "answer lost"], 2)]
)
def test_a_restart_whose_answer_is_lost_is_looked_up(answers: list[str], calls: int) -> None:
    cluster = Workloads(answers=list(answers))
    assert RestartCsi(Clusters(cluster), "run-1").apply() == [
        "StatefulSet/juicefs-csi-controller",
        "DaemonSet/juicefs-csi-node",
    ]
    assert set(cluster.stamps.values()) == {"run-1"}
    assert cluster.calls == calls


def test_a_restart_that_cannot_be_ordered_fails_and_says_so() -> None:
    cluster = Workloads(answers=["request lost"] * 99)
    with pytest.raises(TransientError, match="request lost"):
        RestartCsi(Clusters(cluster), "run-1").apply()
    assert cluster.stamps == {}
    assert cluster.calls == 6

"""What the proofs will need, asked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from include.juicefs_storage.errors import PermanentError, TransientError
from include.juicefs_storage.ports import ExecResult, Pod
from include.juicefs_storage.switch.checks.proofs import check_canaries, check_metadata, check_room
from include.juicefs_storage.switch.findings import Finding
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods
from tests.support.bare import BareCluster, BareJuiceFS
from tests.support.fakes import MOUNT, OLD, UUID, FakeMetadata, FakeStore, setting

#: Another mount of the same volume.
READER = MOUNT.model_copy(update={"name": "reader", "uid": "2", "mount_path": "/jfs/pvc-1-reader", "read_only": True})


class StatusOf(BareJuiceFS):
    """A juicefs that reads the volume with this UUID."""

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid

    def status(self) -> Mapping[str, Any]:
        return {"Setting": {"UUID": self.uuid}}


def test_metadata_that_serve_the_way_there_and_back() -> None:
    assert [finding.level for finding in check_metadata(FakeMetadata(setting()), StatusOf(UUID), setting())] == ["ok"]


def test_a_setting_that_cannot_be_updated() -> None:
    with pytest.raises(PermanentError, match="1142"):
        check_metadata(FakeMetadata(setting(), refuses_writes=True), StatusOf(UUID), setting())


def test_juicefs_that_reads_another_volume() -> None:
    (finding,) = check_metadata(FakeMetadata(setting()), StatusOf("another"), setting())
    assert finding.level == "refusal"
    assert "juicefs reads volume another" in finding.message


@dataclass
class Mounts(BareCluster):
    """Mount pods: what they answer to `stat`, and whether a block that is written through them arrives."""

    room: str = "1000000 4096 1000"
    store: FakeStore = field(default_factory=FakeStore)
    written: str = "myjfs/chunks/0/0/7_0_4096"
    arrives: bool = True
    files: list[str] = field(default_factory=list)
    mounts: Sequence[MountPod] = (MOUNT,)
    #: How many bytes can be read of the block that another one writes.
    reads: int = 0

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        return [
            Pod("juicefs", mount.name, mount.uid, "node", True, 0, "", {}, (f"juicefs mount x {mount.mount_path}",), ())
            for mount in self.mounts
        ]

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        if "stat -f" in command[2]:
            return ExecResult(0 if self.room else 127, self.room, "")
        if ".config" in command[2]:
            keys = f'"Bucket": "{OLD.bucket}", "AccessKey": "{OLD.access_key.get_secret_value()}"'
            return ExecResult(0, f'{{"Format": {{"UUID": "{UUID}", "Storage": "minio", {keys}}}}}', "")
        if "wc -c" in command[2]:
            return ExecResult(0, str(self.reads), "Input/output error")
        if "dd " in command[2]:
            self.files.append(command[5])
            if self.arrives:
                self.store.objects[self.written] = 4096
            return ExecResult(0 if self.written else 1, f"objects: {self.written}", "dd: Disk quota exceeded")
        self.files.remove(command[-1])
        return ExecResult(0, "", "")

    def log_tail(self, pod: str, lines: int = 20, container: str = "", since_s: float | None = None) -> str:
        return ""


@pytest.mark.parametrize(
    ("room", "level"),
    [
        ("1000000 4096 1000", "ok"),
        ("0 4096 1000", "refusal"),
        ("1000000 4096 0", "refusal"),
        ("100 4096 1000", "refusal"),
        ("", "warning"),
        ("unknown 4096 7", "warning"),
    ],
)
def test_room_for_the_proofs(room: str, level: str) -> None:
    (finding,) = check_room(Mounts(room), [MOUNT])
    assert finding.level == level


def canaries(
    cluster: Mounts, *, mounts: Sequence[MountPod] = (), going_back: bool = False, **more: Mounts
) -> list[Finding]:
    pods = VolumePods(Clusters(cluster, more), setting(), "main")
    return check_canaries(pods, mounts or cluster.mounts, OLD, cluster.store, "canary", going_back=going_back)


def test_a_block_through_every_mount_before_anything_is_written() -> None:
    cluster = Mounts()
    assert [finding.level for finding in canaries(cluster)] == ["ok"]
    assert cluster.files == [], "the files are removed again"


@pytest.mark.parametrize(
    ("cluster", "words"),
    [(Mounts(written=""), "Disk quota exceeded"), (Mounts(arrives=False), "is not in http://old:9000/data")],
)
def test_a_client_that_cannot_be_proven_now(cluster: Mounts, words: str) -> None:
    (finding,) = canaries(cluster)
    assert (finding.level, words in finding.message) == ("refusal", True)
    assert [finding.level for finding in canaries(cluster, going_back=True)] == ["warning"]


@pytest.mark.parametrize(("reads", "level"), [(4 << 20, "ok"), (0, "refusal")])
def test_a_mount_that_only_reads_reads_a_block_that_another_writes(reads: int, level: str) -> None:
    cluster = Mounts(mounts=(MOUNT, READER), reads=reads)
    (finding,) = canaries(cluster)
    assert finding.level == level
    assert ("; 1 that only read have each read one" if level == "ok" else "reader cannot be proven") in finding.message
    assert cluster.files == [], "the files are removed again"


@pytest.mark.parametrize(("reads", "level"), [(4 << 20, "ok"), (0, "refusal")])
def test_a_mount_of_another_cluster_reads_there_what_one_of_the_first_writes(reads: int, level: str) -> None:
    there = READER.model_copy(update={"name": f"other/{READER.name}"})
    (finding,) = canaries(Mounts(), mounts=(MOUNT, there), other=Mounts(mounts=(READER,), reads=reads))
    assert finding.level == level
    assert ("; 1 that only read have each read one" if level == "ok" else f"{there.name} cannot") in finding.message
    assert level == "ok" or "(in cluster other)" in finding.remedy


def test_where_nobody_can_write_for_them_mounts_that_only_read_are_not_tried() -> None:
    (finding,) = canaries(Mounts(mounts=(MOUNT, READER), arrives=False))
    assert MOUNT.name in finding.message
    assert [finding.level for finding in canaries(Mounts(mounts=(READER,)))] == ["ok"]


def test_a_mount_that_other_checks_refuse_is_not_tried() -> None:
    cluster = Mounts(written="")
    others = [MOUNT.model_copy(update={"read_only": True}), MOUNT.model_copy(update={"bucket": "http://x/y"})]
    assert [finding.level for finding in canaries(cluster, mounts=others)] == ["ok"]


def test_a_store_that_is_dead_is_no_reason_to_stay_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(below: str = "") -> None:
        raise TransientError("no answer")

    cluster = Mounts()
    monkeypatch.setattr(cluster.store, "check", away)
    (finding,) = canaries(cluster)
    assert finding.level == "warning"
    assert "no answer" in finding.message

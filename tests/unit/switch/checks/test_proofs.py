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
    """A mount pod: what it answers to `stat`, and whether a block that is written through it arrives."""

    room: str = "1000000 4096 1000"
    store: FakeStore = field(default_factory=FakeStore)
    written: str = "myjfs/chunks/0/0/7_0_4096"
    arrives: bool = True
    files: list[str] = field(default_factory=list)

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        return [
            Pod(
                "juicefs", MOUNT.name, MOUNT.uid, "node-1", True, 0, "", {}, (f"juicefs mount x {MOUNT.mount_path}",),
                (),
            )
        ]  # fmt: skip

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        if "stat -f" in command[2]:
            return ExecResult(0 if self.room else 127, self.room, "")
        if ".config" in command[2]:
            keys = f'"Bucket": "{OLD.bucket}", "AccessKey": "{OLD.access_key.get_secret_value()}"'
            return ExecResult(0, f'{{"Format": {{"UUID": "{UUID}", "Storage": "minio", {keys}}}}}', "")
        if "dd " in command[2]:
            self.files.append(command[-1])
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


def canaries(cluster: Mounts, *, mounts: Sequence[MountPod] = (MOUNT,), going_back: bool = False) -> list[Finding]:
    pods = VolumePods(Clusters(cluster), setting(), "main")
    return check_canaries(pods, mounts, OLD, cluster.store, "canary", going_back=going_back)


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

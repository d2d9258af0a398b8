"""Faults that several tests order: effects by their adapters' methods, and tasks that fail for good."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab.environment import Lab
from tests.support.worker import Fault, Point

#: `juicefs config`.
CONFIG = "include.juicefs_storage.adapters.juicefs_command:JuiceFSCommand.write_storage"
ORDERED = "ordered to fail"
#: What begins a rollback: a proof that fails after all clients have moved.
BROKEN = Fault("prove_blocks", "after", error=ORDERED, tries=2)


@dataclass(frozen=True)
class StuckClient:
    """A client that cannot build a new storage while its configuration of the S3 client is broken.

    It reads the new setting, fails to use it, stays with the storage that it has, and does not try again by itself.
    """

    file: Path

    @classmethod
    def of(cls, lab: Lab, pod_uid: str) -> StuckClient:
        """Return the client of a mount pod. It is not stuck yet."""
        return cls(lab.kube.state / "pods" / pod_uid / "rootfs/root/.aws/config")

    @classmethod
    def first(cls, lab: Lab) -> StuckClient:
        """Return the client of the first mount pod. It is not stuck yet."""
        uid = lab.kubectl(
            "-n", "juicefs", "get", "pods", "-l", "app.kubernetes.io/name=juicefs-mount",
            "-o", "jsonpath={.items[0].metadata.uid}",
        ).strip()  # fmt: skip
        return cls.of(lab, uid)

    def stick(self) -> None:
        """Break the configuration: the next reload fails."""
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text("[default]\nretry_mode = broken\n")

    def release(self) -> None:
        """Mend the configuration: the next reload works."""
        self.file.unlink(missing_ok=True)


def fails(task: str, point: Point = "after") -> Fault:
    """Fail a task at every try."""
    return Fault(task, point, error=ORDERED, tries=9)

"""The ports with no answers: a fake answers what its test needs, and whatever else is called fails the test.

Each is checked against its Protocol, so that a method that is added there or changed is missed nowhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from include.juicefs_storage.ports import (
    Cluster,
    DumpKind,
    ExecResult,
    JuiceFS,
    Lease,
    PersistentVolume,
    Pod,
    Right,
    SecretObject,
    StorageClass,
    Workload,
    WorkloadKind,
    WorkloadTemplate,
)
from include.juicefs_storage.volume.setting import StorageConfig


def unexpected(what: str) -> NoReturn:
    """Fail the test: it has prepared no answer to this."""
    raise AssertionError(f"expected no call of {what}: the test has prepared no answer")


class BareCluster(Cluster):
    """A cluster of which nothing is known."""

    namespace = "juicefs"

    def allows(self, right: Right) -> bool:
        unexpected("allows")

    def secret(self, name: str) -> SecretObject:
        unexpected("secret")

    def secrets(self, label_selector: str = "") -> Sequence[SecretObject]:
        unexpected("secrets")

    def secrets_everywhere(self) -> Sequence[SecretObject] | None:
        unexpected("secrets_everywhere")

    def patch_secret(self, secret: SecretObject, values: Mapping[str, str]) -> None:
        unexpected("patch_secret")

    def workload(self, kind: WorkloadKind, name: str) -> Workload:
        unexpected("workload")

    def workload_templates(self) -> Sequence[WorkloadTemplate]:
        unexpected("workload_templates")

    def deployments_everywhere(self) -> Sequence[WorkloadTemplate] | None:
        unexpected("deployments_everywhere")

    def stamp_template(self, kind: WorkloadKind, name: str, annotations: Mapping[str, str]) -> None:
        unexpected("stamp_template")

    def templates(self) -> Mapping[str, Any]:
        unexpected("templates")

    def pods(self, label_selector: str = "", namespace: str | None = None) -> Sequence[Pod]:
        unexpected("pods")

    def persistent_volumes(self) -> Sequence[PersistentVolume]:
        unexpected("persistent_volumes")

    def storage_classes(self) -> Sequence[StorageClass]:
        unexpected("storage_classes")

    def driver_mount_options(self) -> Sequence[str]:
        unexpected("driver_mount_options")

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        unexpected("exec")

    def dump(self, kind: DumpKind) -> Sequence[Mapping[str, Any]]:
        unexpected("dump")

    def lease(self, name: str) -> Lease | None:
        unexpected("lease")

    def write_lease(self, lease: Lease) -> bool:
        unexpected("write_lease")

    def log_tail(self, pod: str, lines: int = 20, container: str = "", since_s: float | None = None) -> str:
        unexpected("log_tail")


class BareJuiceFS(JuiceFS):
    """A juicefs that is not expected to run."""

    def version(self) -> str:
        unexpected("version")

    def now(self) -> float:
        unexpected("now")

    def write_storage(self, config: StorageConfig, *, not_after: float) -> None:
        unexpected("write_storage")

    def await_config(self, *, timeout_s: float) -> None:
        unexpected("await_config")

    def status(self) -> Mapping[str, Any]:
        unexpected("status")

    def mount_fresh(self, canary: str, lost_files: Sequence[str] = ()) -> Sequence[str]:
        unexpected("mount_fresh")

    def unmount_fresh(self, canary: str) -> None:
        unexpected("unmount_fresh")

    def try_storage(self, config: StorageConfig, write_below: str = "", *, timeout_s: int = 30) -> str | None:
        unexpected("try_storage")

    def probe_storage(self, config: StorageConfig, blocks: Sequence[str], probe_key: str | None) -> str:
        unexpected("probe_storage")

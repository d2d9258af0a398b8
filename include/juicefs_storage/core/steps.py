"""The steps that change something. Each observes first, answers "already done", and can be undone.

Every step has the same verbs: `observe` reads the world, `plan` says what would be done, `apply` does it, `verify`
reads it back. `undo` goes back; where a step has none, `apply` with the old storage as its target is its undo.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from include.juicefs_storage.core.errors import (
    LostAnswerError,
    NeedsHumanError,
    PermanentError,
    StillAwayError,
    TransientError,
)
from include.juicefs_storage.core.ports import Cluster, JuiceFS, MetadataStore, Pod, SecretObject, WorkloadKind
from include.juicefs_storage.core.secrets import desired_values, volume_secrets
from include.juicefs_storage.core.setting import Setting, StorageConfig

#: Annotation of the pod templates; its value is the run, so that a retry does not restart twice.
RESTART_ANNOTATION = "juicefs-storage-switch/restarted-by"
CSI_WORKLOADS: tuple[tuple[WorkloadKind, str], ...] = (
    ("StatefulSet", "juicefs-csi-controller"),
    ("DaemonSet", "juicefs-csi-node"),
)
CSI_CONTAINER = "juicefs-plugin"
CSI_CONFIG_MAP = "juicefs-csi-driver-config"
CSI_CONTROLLER_SELECTOR, CSI_NODE_SELECTOR = "app=juicefs-csi-controller", "app=juicefs-csi-node"
_TRIES = 3
_SETTLE_PATIENCE_S, _SETTLE_LIMIT_S = 60, 300
#: How long a `juicefs config` whose answer was lost may go on, in seconds: it gives up on a store after 12.
_LATE_S = 20
_BAD_STARTS = frozenset({"CrashLoopBackOff", "ImagePullBackOff", "ErrImagePull", "CreateContainerConfigError"})
#: A component that ends once or twice while the node settles is not broken yet.
_CRASHES = 3

Fence = Callable[[], None]
T = TypeVar("T")


def no_fence() -> None:
    """For whoever needs no lock."""


def _carry_out(plan: Callable[[], list[T]], write: Callable[[T], None], fence: Fence) -> list[T]:
    """Write what is planned. Where a write fails the plan is made again, from the world as it is then.

    An answer may be lost on its way back, or somebody else may have written first: only a new look tells.

    Returns:
        What was planned at first.

    Raises:
        TransientError: A write did not come through.
    """
    first = pending = plan()
    for left in reversed(range(_TRIES)):
        problem: TransientError | None = None
        for item in pending:
            fence()
            try:
                write(item)
            except TransientError as error:
                problem = error
        if problem is None or not (pending := plan()):
            break
        if not left:
            raise problem
    return first


@dataclass(frozen=True)
class WriteSetting:
    """Point the volume's setting at a storage; the clients follow on their next heartbeat. This is the cut-over.

    Attributes:
        recorded: An earlier setting whose storage fields are taken to the letter; else `juicefs config` writes them.
        stale: What Secrets held before, where that is neither `before` nor `target`: a mount pod may have written it.
    """

    metadata: MetadataStore
    juicefs: JuiceFS
    before: Setting
    target: StorageConfig
    recorded: Setting | None = None
    fence: Fence = no_fence
    sleep: Callable[[float], None] = time.sleep
    stale: Sequence[StorageConfig] = ()

    def observe(self) -> Setting:
        """The setting as it is now.

        Raises:
            NeedsHumanError: It is neither what was backed up, setting or Secrets, nor the target: somebody changed it.
        """
        now = self.metadata.read_setting()
        if now.uuid != self.before.uuid:
            raise NeedsHumanError(
                f"The metadata database holds volume {now.uuid}, expected {self.before.uuid}.",
                state="nothing was written by this step",
                next_step="compare the metadata connection with the Secret's metaurl",
            )
        if not any(now.uses(config) for config in (self.target, self.before.config, *self.stale)):
            raise NeedsHumanError(
                f"The setting's bucket or keys changed during this run: now {now.bucket}; "
                f"expected {self.before.bucket} (as backed up) or {self.target.bucket} (as planned).",
                state="this step left the setting as it found it",
                next_step="find out who changed it (a mount pod started with other values?), then start a new run",
            )
        return now

    def plan(self) -> str:
        """What `apply` does, in words."""
        how = "one UPDATE that compares and sets" if self.recorded else "`juicefs config`"
        return f"{how}: bucket `{self.before.bucket}` → `{self.target.bucket}`, keys likewise"

    def apply(self) -> bool:
        """Write the setting and read it back.

        Returns:
            False where it was already written.
        """
        now = self.observe()
        if now.uses(self.target):
            return False
        self.fence()
        try:
            if self.recorded:
                self._replace(now, self.recorded)
            else:
                self.juicefs.write_storage(self.target)
        except LostAnswerError:
            # The row decides; and whoever judges this step must not do so while the command is still under way.
            if not self._written_late():
                raise
        self.verify()
        return True

    def _written_late(self) -> bool:
        for _ in range(_LATE_S):
            if self.observe().uses(self.target):
                return True
            self.sleep(1)
        return self.observe().uses(self.target)

    def _replace(self, now: Setting, storage_of: Setting) -> None:
        """Give the row the storage of another setting by compare-and-set; its other fields stay as they are."""
        if not self.metadata.replace_setting(expected=now, new=now.with_storage_of(storage_of)):
            raise self._changed()

    def _changed(self) -> TransientError:
        return TransientError(
            "The setting changed between reading it and putting other values into it.",
            state="the setting is as somebody else wrote it",
            next_step="the task tries again by itself",
        )

    def verify(self) -> None:
        """Compare the row with the target, field by field.

        Raises:
            TransientError: The write reported success and the row does not show it.
        """
        now = self.observe()
        if not now.uses(self.target):
            raise TransientError(
                f"The setting still shows bucket {now.bucket}, expected {self.target.bucket}.",
                state="the clients stay on the old store, or go back to it on their next heartbeat",
                next_step="the task tries again; if it goes on, look for mount pods that start with old values",
            )

    def rewrite(self) -> None:
        """Write the target once more, in other bytes: a client that could not build the new storage tries again then.

        Raises:
            PermanentError: The setting has no secret that could be encrypted anew.
            TransientError: Somebody else wrote it meanwhile.
        """
        now = self.observe()
        if now.uses(self.target):
            self.fence()
            if not self.metadata.replace_setting(expected=now, new=now.sealed_anew()):
                raise self._changed()

    @property
    def back(self) -> WriteSetting:
        """The step that puts the old storage back: by compare-and-set, other fields stay as they are."""
        return replace(self, target=self.before.config, recorded=self.before, stale=(self.target, *self.stale))

    def undo(self) -> bool:
        """Put the old storage back; the row is never absent.

        Returns:
            False where the old storage was in place already.
        """
        return self.back.apply()


@dataclass(frozen=True)
class PatchSecrets:
    """Make every Secret that holds a copy of the storage's values agree with the setting.

    To undo it, apply it with the old storage as `target` and the backed-up values as `exact`.

    Attributes:
        exact: Name of a Secret -> values that it gets to the letter, whatever `target` says.
    """

    cluster: Cluster
    secret_name: str
    volume: str
    target: StorageConfig
    exact: Mapping[str, Mapping[str, str]] = field(default_factory=dict, repr=False)
    fence: Fence = no_fence

    def observe(self) -> list[SecretObject]:
        """The volume's Secrets as they are now."""
        return volume_secrets(self.cluster, self.secret_name, self.volume)

    def plan(self) -> list[tuple[SecretObject, dict[str, str]]]:
        """Which values each Secret lacks; Secrets that lack none are left out."""
        wanted = []
        for secret in self.observe():
            desired = {**desired_values(secret, self.target), **self.exact.get(secret.name, {})}
            if values := {key: value for key, value in desired.items() if secret.data.get(key) != value}:
                wanted.append((secret, values))
        return wanted

    def apply(self) -> list[str]:
        """Patch what differs; the resourceVersion is tested, so that nobody's change is overwritten unseen.

        Returns:
            The names of the Secrets that were changed; empty where all agreed already.
        """
        changed = _carry_out(self.plan, lambda row: self.cluster.patch_secret(*row), self.fence)
        self.verify()
        return [f"{secret.namespace}/{secret.name}" for secret, _ in changed]

    def verify(self) -> None:
        """Read every Secret again.

        Raises:
            TransientError: A Secret does not hold the values: somebody (Helm, GitOps) put others back.
        """
        if differing := [f"{secret.namespace}/{secret.name}" for secret, _ in self.plan()]:
            raise TransientError(
                f"Secrets {', '.join(differing)} do not hold the values that were just written.",
                state="starting mount pods may write the values of these Secrets into the setting",
                next_step="stop what manages them (Helm, GitOps), then clear this task",
            )


@dataclass(frozen=True)
class RestartCsi:
    """Restart the CSI controller and node components. In mount-pod mode the mounts do not notice."""

    cluster: Cluster
    stamp: str
    fence: Fence = no_fence

    def plan(self) -> list[tuple[WorkloadKind, str]]:
        """The workloads that do not carry this run's stamp yet."""
        return [
            (kind, name)
            for kind, name in CSI_WORKLOADS
            if self.cluster.workload(kind, name).annotations.get(RESTART_ANNOTATION) != self.stamp
        ]

    def apply(self) -> list[str]:
        """Stamp the templates; the workloads' controllers do the rest.

        Returns:
            The workloads that were told to restart; empty where this run had told them already.
        """
        annotations = {RESTART_ANNOTATION: self.stamp}
        restarted = _carry_out(self.plan, lambda row: self.cluster.stamp_template(*row, annotations), self.fence)
        return [f"{kind}/{name}" for kind, name in restarted]

    def verify(self) -> list[str]:
        """The rollouts that are not done yet, each with its progress; empty when all are done.

        Raises:
            PermanentError: A pod of a workload cannot start.
        """
        waiting = []
        for kind, name in CSI_WORKLOADS:
            workload = self.cluster.workload(kind, name)
            if workload.rolled_out:
                continue
            line = f"{kind}/{name}: {workload.progress}"
            for pod in self.cluster.pods(f"app={name}"):
                if pod.problem not in _BAD_STARTS:
                    continue
                stamp = workload.annotations.get(RESTART_ANNOTATION)
                if pod.annotations.get(RESTART_ANNOTATION) != stamp:
                    # One from before the restart, which is to be replaced: no verdict on the restart.
                    line += f"; pod {pod.name} from before the restart is in {pod.problem}"
                    if kind == "StatefulSet":
                        line += f" and may hold the others up: kubectl -n {pod.namespace} delete pod {pod.name}"
                elif pod.problem != "CrashLoopBackOff" or pod.restarts >= _CRASHES:
                    raise PermanentError(
                        f"Pod {pod.name} of {kind}/{name} is in {pod.problem}. Its last lines:\n"
                        f"{self.cluster.log_tail(pod.name, container=pod.waiting_container)}",
                        state="the existing mounts go on; new volumes may not mount",
                        next_step=f"kubectl -n {pod.namespace} describe pod {pod.name}",
                    )
            waiting.append(line)
        return waiting


@dataclass(frozen=True)
class Settled:
    """What happened while the setting was guarded.

    Attributes:
        repaired: What was put right, one line each; usually empty.
        wrote: Mount pods that started meanwhile with other values: they may have written the setting.
        waiting: Those of them that have not started yet: they may still do so.
    """

    repaired: tuple[str, ...] = ()
    wrote: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


def settle(
    step: WriteSetting,
    secrets: PatchSecrets,
    stale_pods: Callable[[], Sequence[Pod]],
    *,
    for_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    every_s: float = 1,
) -> Settled:
    """Guard the setting and the Secrets against a mount pod that starts with old values and writes them back.

    A pod that was made before the Secret was patched may start much later: it is waited for, within limits.

    Args:
        step: The step whose result is guarded; it is applied again where the row moved.
        secrets: Likewise, for the Secrets.
        stale_pods: The mount pods that appeared since the plan and whose command names other values.
        for_s: How long nothing must have moved, in seconds.
        clock: A monotonic clock.
        sleep: Waits the given seconds.
        every_s: Seconds between two looks.

    Raises:
        TransientError: Looking failed for a minute on end.
        StillAwayError: The metadata database was waited for in vain.
    """
    start = quiet_since = clock()
    failing_since: float | None = None
    repaired: list[str] = []
    wrote: dict[str, None] = {}
    while True:
        pods: Sequence[Pod] = ()
        try:
            # First the pods: what one that is ready has written can be seen then.
            pods = stale_pods()
            moved = [f"the setting did not name {step.target.bucket} any more"] if step.apply() else []
            moved += [f"Secret {name} held other values" for name in secrets.apply()]
            failing_since = None
        except StillAwayError:
            raise
        except TransientError:
            failing_since = clock() if failing_since is None else failing_since
            if clock() - failing_since >= _SETTLE_PATIENCE_S:
                raise
            moved = []
        if moved:
            repaired += moved
            wrote |= dict.fromkeys(pod.name for pod in pods)
        if moved or failing_since is not None:
            quiet_since = clock()
        waiting = tuple(pod.name for pod in pods if not pod.ready)
        late = clock() - start >= for_s + _SETTLE_LIMIT_S
        if clock() - quiet_since >= for_s and failing_since is None and (late or not waiting):
            return Settled(tuple(repaired), tuple(wrote), waiting)
        if late and repaired:
            raise NeedsHumanError(
                f"Something goes on writing other values: {len(repaired)} times in {clock() - start:.0f} s.",
                state="the setting names the new store at this moment",
                next_step=f"stop what writes them; mount pods with old values: {', '.join(wrote) or 'none'}",
            )
        sleep(every_s)

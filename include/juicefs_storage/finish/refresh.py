"""Replace a mount pod by the driver's smooth upgrade: its mount goes on, with a command by the Secret as it is now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from include.juicefs_storage.errors import NeedsHumanError, StorageSwitchError, TransientError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import Pod
from include.juicefs_storage.records import Record
from include.juicefs_storage.switch.step import LeaseCheck, no_lease
from include.juicefs_storage.volume.canary import Move, prove_client
from include.juicefs_storage.volume.clusters import Clusters, cluster_of, kubectl, name_in
from include.juicefs_storage.volume.csi import CSI_CONTAINER, CSI_NODE_SELECTOR
from include.juicefs_storage.volume.format_command import find_format
from include.juicefs_storage.volume.mount_pods import (
    MountPod,
    VolumePods,
    find_mount_path,
    read_config,
    running_mount_pods,
)
from include.juicefs_storage.volume.setting import StorageConfig
from include.juicefs_storage.volume.users import PodIdentity

log = logging.getLogger(__name__)

#: The driver waits 5 minutes for its canary Job and 1 for the new pod (pkg/fuse/grace/grace.go, driver 0.32).
UPGRADE_TIMEOUT_S = 400
#: How long the new pod may take after the driver has said that it is there, and its client to answer.
READY_TIMEOUT_S = 120
_PROOF_TIMEOUT_S = 60
_SUCCESS, _FAILURE = "POD-SUCCESS", "POD-FAIL"


class Refreshed(Record):
    """One mount pod that was replaced.

    Attributes:
        old: Its name before.
        new: The name of the pod that took its place.
        node: Where both run.
        took_s: From the command to the proof, in seconds.
        proven: What was proven of the new one.
    """

    old: str
    new: str
    node: str
    took_s: float
    proven: str


@dataclass(frozen=True)
class Refresh:
    """Replace mount pods of one volume, each with its proof.

    Attributes:
        pods: The volume's mount pods.
        target: What the setting names, and each new command must name.
        store: The bucket behind it, as Airflow reaches it.
        canary: How the names of the files begin that prove mounts.
        clock: A monotonic clock.
        sleep: Waits the given seconds.
        confirm_lease: Called before each change.
    """

    pods: VolumePods
    target: StorageConfig
    store: Bucket
    canary: str
    clock: Callable[[], float]
    sleep: Callable[[float], None]
    confirm_lease: LeaseCheck = no_lease

    @property
    def clusters(self) -> Clusters:
        """Where the pods are."""
        return self.pods.clusters

    def observe(self, mount: MountPod) -> Pod | None:
        """Find the pod that serves a mount now, by node and path; None where none is ready."""
        found = [pod for pod in running_mount_pods(self.clusters) if self._serves(pod, mount) and not pod.terminating]
        return next((pod for pod in found if pod.ready), None)

    def apply(self, mount: MountPod, *, pause_s: float = 0) -> Refreshed | None:
        """Replace one mount pod and prove the one that took its place.

        Args:
            mount: As it was planned.
            pause_s: How long to wait before the proof, in seconds.

        Returns:
            None where the pod carries the target's values already: nothing was changed.

        Raises:
            NeedsHumanError: The driver refused, or something is not as before.
            StorageSwitchError: It cannot be seen whether the pod was replaced.
        """
        began, before = self.clock(), self._business()
        now = self.observe(mount)
        if now is not None and not self.is_stale(now):
            return None
        if now is None:
            raise NeedsHumanError(
                f"Mount pod {mount.name} on {mount.node} is not ready, or no pod serves {mount.mount_path} any more.",
                state="it was not touched",
                next_step=f"{kubectl(self.clusters.namespace, 'describe pod', mount.name)}; then trigger the DAG again",
            )
        self.confirm_lease()
        said = self._upgrade(now)
        new = self._await_successor(mount, now, said)
        self.sleep(pause_s)
        proven = self._prove(new)
        self._require_same(before, mount)
        return Refreshed(
            old=now.name, new=new.name, node=mount.node, took_s=round(self.clock() - began, 1), proven=proven
        )

    def is_stale(self, pod: Pod) -> bool:
        """Return whether a pod's command carries the values of another store or key."""
        found = find_format(pod.commands)
        if found is None or not found.bucket:
            return False
        return (found.bucket, found.access_key) != (self.target.bucket, self.target.access_key.get_secret_value())

    def _serves(self, pod: Pod, mount: MountPod) -> bool:
        here = cluster_of(pod.name) == cluster_of(mount.name) and pod.node == mount.node
        return here and find_mount_path(pod) == mount.mount_path

    def _upgrade(self, pod: Pod) -> str:
        """Ask the csi-node of the pod's node; return what it said. Its exit code is 0 whatever becomes of the pod."""
        cluster, _, name = pod.name.rpartition("/")
        nodes = [
            node
            for node in self.clusters.pods(CSI_NODE_SELECTOR)
            if (cluster_of(node.name), node.node) == (cluster, pod.node) and node.ready
        ]
        if not nodes:
            raise NeedsHumanError(
                f"No csi-node pod is ready on {pod.node}: it alone can replace {pod.name}.",
                state="that pod was not touched",
                next_step=self._list_pods(CSI_NODE_SELECTOR, cluster),
            )
        command = ["juicefs-csi-driver", "upgrade", name, "--recreate"]
        try:
            result = self.clusters.exec(nodes[0].name, CSI_CONTAINER, command, timeout_s=UPGRADE_TIMEOUT_S)
        except TransientError as error:
            # The driver goes on by itself: what became of the pod is looked at.
            log.warning("The answer of the smooth upgrade of %s was lost: %s", pod.name, error.problem)
            return ""
        said = result.stdout
        log.info("Smooth upgrade of %s:\n%s", pod.name, said)
        if _FAILURE in said or (result.returncode and _SUCCESS not in said):
            lines = [line for line in f"{said}\n{result.stderr}".splitlines() if line.strip()]
            why = next((line for line in lines if _FAILURE in line), lines[-1] if lines else "it said nothing")
            raise NeedsHumanError(
                f"The driver did not replace mount pod {pod.name}: {why[-300:]}",
                state="a pod that cannot be upgraded is left as it is; see below which pods were replaced before",
                next_step=f"{kubectl(self.clusters.namespace, 'delete pod', pod.name)} at a quiet time (its users wait "
                "about 12 s); it takes driver 0.25 and client 1.2.1 to do without",
            )
        return said

    def _await_successor(self, mount: MountPod, old: Pod, said: str) -> Pod:
        """Wait until another pod serves the mount.

        Raises:
            NeedsHumanError: None does in time, or it carries the old values too.
        """
        deadline = self.clock() + READY_TIMEOUT_S
        while True:
            new = self.observe(mount)
            if new is not None and new.uid != old.uid:
                break
            if self.clock() > deadline:
                raise NeedsHumanError(
                    f"No other mount pod serves {mount.mount_path} on {mount.node} {READY_TIMEOUT_S} s after the "
                    f"smooth upgrade of {old.name}.",
                    state="its users may wait; no other pod was touched",
                    next_step=f"{self._list_pods(f'volume-id={mount.volume_id}', cluster_of(mount.name))}; "
                    f"the driver said: {said[-300:] or 'nothing, its answer was lost'}",
                )
            self.sleep(1)
        if self.is_stale(new):
            raise NeedsHumanError(
                f"Mount pod {new.name}, which took the place of {old.name}, was made with other values too.",
                state="its mount works; no other pod was touched",
                next_step="look at the PersistentVolume's Secret: the driver makes pods by it as it is",
            )
        return new

    def _prove(self, pod: Pod) -> str:
        """Prove the new client: it writes a block, and the store has it.

        Raises:
            NeedsHumanError: It is not proven.
        """
        config = read_config(self.clusters, pod)
        if config["Format"].get("UUID") != self.pods.setting.uuid:
            raise self._not_as_before(pod, "its mount shows another volume")
        if (config.get("Meta") or {}).get("ReadOnly"):
            return "it is mounted read-only, and its `.config` shows the setting's bucket"
        name = f"{self.canary}-{pod.uid[:8]}"
        state = prove_client(self.clusters, pod, Move(self.target, self.store), name, timeout_s=_PROOF_TIMEOUT_S)
        if state.problem:
            raise self._not_as_before(pod, state.problem)
        return "it wrote a block, which the store has"

    def _business(self) -> Mapping[tuple[str, str], PodIdentity]:
        found = self.pods.business_pods(())
        return {(pod.namespace, pod.name): pod for pod in found}

    def _require_same(self, before: Mapping[tuple[str, str], PodIdentity], mount: MountPod) -> None:
        """Compare the business pods with those before.

        Raises:
            NeedsHumanError: One restarted or was replaced.
        """
        now = self._business()
        changed = [
            f"{namespace}/{name}"
            for (namespace, name), pod in before.items()
            if (found := now.get((namespace, name))) and (found.uid, found.restarts) != (pod.uid, pod.restarts)
        ]
        if changed:
            raise NeedsHumanError(
                f"Business pods restarted while mount pod {mount.name} was replaced: {', '.join(changed)}.",
                state="the mount is proven; no other mount pod was touched",
                next_step="kubectl describe these pods before you go on",
            )

    def _list_pods(self, selector: str, cluster: str) -> str:
        return kubectl(self.clusters.namespace, f"get pods -l {selector} -o wide", name_in(cluster, ""))

    def _not_as_before(self, pod: Pod, problem: str) -> StorageSwitchError:
        return NeedsHumanError(
            f"Mount pod {pod.name} is not as before: {problem}.",
            state="no other pod was touched",
            next_step=kubectl(self.clusters.namespace, "logs", pod.name),
        )

"""Patch the Secrets that hold a copy of the storage's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from include.juicefs_storage.errors import StorageSwitchError, TransientError
from include.juicefs_storage.ports import Cluster, SecretObject
from include.juicefs_storage.switch.step import LeaseCheck, carry_out, no_lease
from include.juicefs_storage.volume.clusters import Clusters, name_in
from include.juicefs_storage.volume.secret import desired_values, volume_secrets
from include.juicefs_storage.volume.setting import StorageConfig


@dataclass(frozen=True)
class SecretPatch:
    """What a Secret lacks.

    Attributes:
        cluster: The name of its cluster.
        secret: As it was read.
        values: Key -> value that it should hold.
    """

    cluster: str
    secret: SecretObject
    values: Mapping[str, str] = field(repr=False)

    @property
    def name(self) -> str:
        """Name the Secret, with its namespace and its cluster."""
        return name_in(self.cluster, _name(self.secret))


@dataclass(frozen=True)
class PatchSecrets:
    """Make every Secret that holds a copy of the storage's values agree with the setting, in every cluster.

    To undo it, apply it with the old storage as `target` and the backed-up values as `exact`.

    Attributes:
        clusters: Where the Secrets are.
        secret_name: The volume's Secret, in each cluster.
        exact: Name of a cluster -> name of a Secret -> values that it gets to the letter, whatever `target` says.
    """

    clusters: Clusters
    secret_name: str
    volume: str
    target: StorageConfig
    exact: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict, repr=False)
    confirm_lease: LeaseCheck = no_lease

    def observe(self, cluster: Cluster) -> list[SecretObject]:
        """Read the volume's Secrets in a cluster as they are now."""
        return volume_secrets(cluster, self.secret_name, self.volume)

    def look(self) -> tuple[list[SecretPatch], dict[str, StorageSwitchError]]:
        """Find out which values each Secret lacks; leave out Secrets that lack none.

        Returns:
            What is lacking in the clusters that answer, and the errors of the others by their names.
        """
        return self.clusters.ask_each(self._lacking)

    def plan(self) -> list[SecretPatch]:
        """Do what `look` does.

        Raises:
            StorageSwitchError: A cluster does not answer.
        """
        return self.clusters.ask_all(self._lacking)

    def apply(self) -> list[str]:
        """Patch what differs; the resourceVersion is tested, so that nobody's change is overwritten unseen.

        Returns:
            The names of the Secrets that were changed; empty where all agreed already.

        Raises:
            StorageSwitchError: It failed in a cluster; in the others it was done.
        """
        return self.clusters.in_each(self._apply)

    def _lacking(self, name: str, cluster: Cluster) -> list[SecretPatch]:
        wanted = []
        for secret in self.observe(cluster):
            desired = {**desired_values(secret, self.target), **self.exact.get(name, {}).get(secret.name, {})}
            if values := {key: value for key, value in desired.items() if secret.data.get(key) != value}:
                wanted.append(SecretPatch(name, secret, values))
        return wanted

    def _apply(self, name: str, cluster: Cluster) -> list[str]:
        changed = carry_out(
            lambda: self._lacking(name, cluster),
            lambda patch: cluster.patch_secret(patch.secret, patch.values),
            self.confirm_lease,
        )
        self._verify(name, cluster)
        return [_name(patch.secret) for patch in changed]

    def _verify(self, name: str, cluster: Cluster) -> None:
        """Read every Secret of a cluster again.

        Raises:
            TransientError: A Secret does not hold the values: somebody (Helm, GitOps) put others back.
        """
        if differing := [_name(patch.secret) for patch in self._lacking(name, cluster)]:
            raise TransientError(
                f"Secrets {', '.join(differing)} do not hold the values that were just written.",
                state="starting mount pods may write the values of these Secrets into the setting",
                next_step="stop what manages them (Helm, GitOps), then clear this task",
            )


def _name(secret: SecretObject) -> str:
    return f"{secret.namespace}/{secret.name}"

"""Patch the Secrets that hold a copy of the storage's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from include.juicefs_storage.errors import (
    TransientError,
)
from include.juicefs_storage.ports import Cluster, SecretObject
from include.juicefs_storage.switch.step import LeaseCheck, carry_out, no_lease
from include.juicefs_storage.volume.secret import desired_values, volume_secrets
from include.juicefs_storage.volume.setting import StorageConfig


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
    confirm_lease: LeaseCheck = no_lease

    def observe(self) -> list[SecretObject]:
        """Read the volume's Secrets as they are now."""
        return volume_secrets(self.cluster, self.secret_name, self.volume)

    def plan(self) -> list[tuple[SecretObject, dict[str, str]]]:
        """Find out which values each Secret lacks; leave out Secrets that lack none."""
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
        changed = carry_out(self.plan, lambda row: self.cluster.patch_secret(*row), self.confirm_lease)
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

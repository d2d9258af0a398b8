"""The volumes of a fleet: found by their Secrets, each with what its dry run found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from include.juicefs_storage.ports import SecretObject
from include.juicefs_storage.records import Record
from include.juicefs_storage.volume.secret import holds_volume
from include.juicefs_storage.volume.setting import normal_endpoint

#: The label on the driver's copies of a Secret, one a volume.
_DRIVERS_COPY = ("juicefs/secret", "true")


class Member(Record):
    """A volume of the fleet.

    Attributes:
        key: Its name, made unique within the fleet; part of the ids of its runs.
        secret: `namespace/name`.
        uuid: Empty where the setting could not be read.
        before: The bucket by the setting.
        after: The bucket that the dry run planned.
        fingerprint: A keyed digest of the target with its keys, from the dry run's plan.
        params: Of its runs, resolved.
        there: It is on the target already.
        blockers: What forbids its move, each with its remedy.
        warnings: How many the dry run found.
        clients: Mount pods.
        missing: Blocks that are not on the new store yet.
    """

    key: str
    secret: str
    uuid: str = ""
    before: str = ""
    after: str = ""
    fingerprint: str = ""
    params: dict[str, Any] = Field(default_factory=dict)
    there: bool = False
    blockers: tuple[str, ...] = ()
    warnings: int = 0
    clients: int = 0
    missing: int | None = None

    @property
    def ready(self) -> bool:
        """Whether it is to be moved and can be."""
        return not self.there and not self.blockers

    def conf(self, *, dry_run: bool, restart_csi: bool) -> dict[str, Any]:
        """Return the params of a run of its own. The run asks for no approval: the fleet's plan was approved."""
        return {**self.params, "dry_run": dry_run, "require_approval": False, "restart_csi": restart_csi}


def unique_keys(members: Sequence[Member]) -> list[Member]:
    """Give the volumes unique keys: where two have one name, part of the UUID follows it."""
    count = Counter(member.key for member in members)
    return [
        member if count[member.key] == 1 else member.model_copy(update={"key": f"{member.key}-{member.uuid[:8] or n}"})
        for n, member in enumerate(members)
    ]


def volumes_by_secret(secrets: Sequence[SecretObject], namespace: str) -> list[tuple[SecretObject, bool]]:
    """Return one Secret for each volume, and whether a switch can patch it: those of `namespace`.

    Copies of a Secret (the same metadata and name) are one volume. The driver's own copies are left out.
    """
    groups: list[list[SecretObject]] = []
    key, value = _DRIVERS_COPY
    for secret in secrets:
        if not secret.data.get("metaurl") or not secret.data.get("name") or secret.labels.get(key) == value:
            continue
        group = next((group for group in groups if holds_volume(secret, group[0])), None)
        if group is None:
            groups.append([secret])
        else:
            group.append(secret)

    def rank(secret: SecretObject) -> tuple[bool, bool, str]:
        return secret.namespace != namespace, "bucket" not in secret.data, secret.name

    chosen = [min(group, key=rank) for group in groups]
    return [(secret, secret.namespace == namespace) for secret in chosen]


def on_endpoint(bucket_endpoint: str, endpoint: str) -> bool:
    """Return whether two endpoints are the same, however they are written."""
    return normal_endpoint(bucket_endpoint) == normal_endpoint(endpoint)

"""From the objects of the Kubernetes client to those of `ports`."""

from __future__ import annotations

import base64
from typing import Any

from include.juicefs_storage.ports import Pod, SecretObject, WorkloadKind, WorkloadTemplate


def to_secret(item: Any) -> SecretObject:
    """Decode a Secret; bytes that are no UTF-8 are replaced."""
    return SecretObject(
        namespace=item.metadata.namespace,
        name=item.metadata.name,
        resource_version=item.metadata.resource_version,
        labels=dict(item.metadata.labels or {}),
        annotations=dict(item.metadata.annotations or {}),
        owners=tuple(
            f"{owner.kind}/{owner.name}" for owner in item.metadata.owner_references or () if owner.controller
        ),
        immutable=bool(item.immutable),
        data={key: base64.b64decode(value).decode(errors="replace") for key, value in (item.data or {}).items()},
    )


def container_args(template: Any) -> tuple[str, ...]:
    """Read commands and arguments of the containers of a pod template."""
    return tuple(arg for box in template.spec.containers for arg in [*(box.command or []), *(box.args or [])])


def to_template(kind: str, item: Any) -> WorkloadTemplate:
    """Read what restarts or replaces the pods of a Deployment, StatefulSet or DaemonSet."""
    template = item.spec.template
    boxes = [*(template.spec.containers or ()), *(template.spec.init_containers or ())]
    variables = [one.value_from.secret_key_ref for box in boxes for one in box.env or () if one.value_from]
    variables += [one.secret_ref for box in boxes for one in box.env_from or ()]
    volumes = [one.secret.secret_name for one in template.spec.volumes or () if one.secret]
    return WorkloadTemplate(
        kind=kind,
        namespace=item.metadata.namespace,
        name=item.metadata.name,
        annotations={
            **(item.metadata.annotations or {}),
            **((template.metadata and template.metadata.annotations) or {}),
        },
        secrets=frozenset([*(ref.name for ref in variables if ref), *volumes]),
        args=container_args(template),
    )


def to_pod(item: Any) -> Pod:
    """Read a pod."""
    statuses = (item.status and item.status.container_statuses) or []
    waiting = [status for status in statuses if status.state and status.state.waiting and status.state.waiting.reason]
    conditions = (item.status and item.status.conditions) or []
    return Pod(
        namespace=item.metadata.namespace,
        name=item.metadata.name,
        uid=item.metadata.uid,
        node=item.spec.node_name or "",
        ready=any(row.type == "Ready" and row.status == "True" for row in conditions)
        and not item.metadata.deletion_timestamp,
        restarts=sum(status.restart_count for status in statuses),
        problem=waiting[0].state.waiting.reason if waiting else "",
        labels=dict(item.metadata.labels or {}),
        commands=tuple(" ".join([*(box.command or []), *(box.args or [])]) for box in item.spec.containers),
        claims=tuple(
            volume.persistent_volume_claim.claim_name
            for volume in item.spec.volumes or []
            if volume.persistent_volume_claim
        ),
        annotations=dict(item.metadata.annotations or {}),
        waiting_container=waiting[0].name if waiting else "",
        phase=(item.status and item.status.phase) or "Unknown",
        terminating=bool(item.metadata.deletion_timestamp),
        started_at=max(
            (row.state.running.started_at for row in statuses if row.state and row.state.running), default=None
        ),
        unready_since=next(
            (row.last_transition_time for row in conditions if row.type == "Ready" and row.status != "True"), None
        ),
    )


def rollout(kind: WorkloadKind, item: Any) -> tuple[bool, str]:
    """Return whether a rollout is done, and its progress, by kubectl's rules (polymorphichelpers/rollout_status.go)."""
    status = item.status
    observed = (status.observed_generation or 0) >= item.metadata.generation
    if kind == "DaemonSet":
        desired = status.desired_number_scheduled or 0
        updated, available = status.updated_number_scheduled or 0, status.number_available or 0
        done = observed and updated >= desired and available >= desired
    else:
        desired = item.spec.replicas if item.spec.replicas is not None else 1
        updated, available = status.updated_replicas or 0, status.ready_replicas or 0
        done = (
            observed
            and updated >= desired
            and available >= desired
            and status.update_revision == status.current_revision
        )
    return done, f"{updated} of {desired} updated, {available} ready{'' if observed else ', change not seen yet'}"

"""Leases of coordination.k8s.io."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from include.juicefs_storage.adapters.kubernetes.requests import REQUEST_TIMEOUT_S, Requests
from include.juicefs_storage.ports import Lease


class Leases:
    """The Leases of one namespace."""

    def __init__(self, requests: Requests) -> None:
        from kubernetes.client import CoordinationV1Api

        self._requests = requests
        self._coordination = CoordinationV1Api(requests.api)

    def read(self, name: str) -> Lease | None:
        """Read a Lease of the namespace."""
        action = f"get Lease {self._requests.namespace}/{name}"
        found = self._requests.find(action, self._coordination.read_namespaced_lease, name, self._requests.namespace)
        return _lease(found) if found else None

    def write(self, lease: Lease) -> bool:
        """Create the Lease, or replace it with its resourceVersion tested; a 409 is an answer, never tried again."""
        from kubernetes.client import ApiException

        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {
                "name": lease.name,
                "namespace": self._requests.namespace,
                **({"resourceVersion": lease.resource_version} if lease.resource_version else {}),
            },
            "spec": {
                "holderIdentity": lease.holder,
                "leaseDurationSeconds": lease.duration_s,
                # The API server takes times with exactly six digits, which the client's own serialiser may leave out.
                "acquireTime": lease.acquired_at.isoformat(timespec="microseconds"),
                "renewTime": lease.renewed_at.isoformat(timespec="microseconds"),
                "leaseTransitions": lease.transitions,
            },
        }
        name = [lease.name] if lease.resource_version else []
        api = self._coordination
        write = api.replace_namespaced_lease if lease.resource_version else api.create_namespaced_lease
        with self._requests.explained(f"write Lease {self._requests.namespace}/{lease.name}"):
            try:
                write(*name, self._requests.namespace, body, _request_timeout=REQUEST_TIMEOUT_S)
            except ApiException as error:
                # 404: it was deleted since it was read.
                if error.status == 409 or (error.status == 404 and lease.resource_version):
                    return False
                raise
        return True


def _lease(item: Any) -> Lease:
    spec = item.spec
    made: datetime = item.metadata.creation_timestamp
    return Lease(
        name=item.metadata.name,
        holder=spec.holder_identity or "",
        duration_s=spec.lease_duration_seconds or 0,
        acquired_at=spec.acquire_time or made,
        renewed_at=spec.renew_time or spec.acquire_time or made,
        transitions=spec.lease_transitions or 0,
        resource_version=item.metadata.resource_version,
    )

"""Pods as the table that `kubectl get` asks for."""

import datetime as dt

from lab.kube.store import Obj


def pod_table(pods: list[Obj], version: str) -> Obj:
    """Return the Table that `kubectl get pods` prints."""
    columns = (
        ("Name", "string"),
        ("Ready", "string"),
        ("Status", "string"),
        ("Restarts", "integer"),
        ("Age", "string"),
    )
    rows = []
    for pod in pods:
        meta, status = pod["metadata"], pod.get("status", {})
        containers = status.get("containerStatuses", [])
        reasons = [r["reason"] for c in containers for r in c["state"].values() if "reason" in r]
        state = "Terminating" if "deletionTimestamp" in meta else next(iter(reasons), status.get("phase", "Unknown"))
        age = dt.datetime.now(dt.UTC) - dt.datetime.fromisoformat(meta["creationTimestamp"])
        ready = f"{sum(c['ready'] for c in containers)}/{len(pod['spec']['containers'])}"
        cells = [meta["name"], ready, state, sum(c["restartCount"] for c in containers), _age(int(age.total_seconds()))]
        partial = {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": meta}
        rows.append({"cells": cells, "object": partial})
    kinds = [{"name": n, "type": t, "format": "name" if n == "Name" else "", "priority": 0} for n, t in columns]
    head = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": version}}
    return head | {"columnDefinitions": kinds, "rows": rows}


def _age(seconds: int) -> str:
    minutes, hours = divmod(seconds, 60)[0], seconds // 3600
    return f"{seconds}s" if seconds < 120 else (f"{minutes}m" if hours < 3 else f"{hours}h")

"""The Kubernetes cluster: its objects, commands in its pods, its Leases."""

from include.juicefs_storage.adapters.kubernetes.cluster import KubernetesCluster

__all__ = ["KubernetesCluster"]

"""A second stand-in cluster, with a mount of the lab's volume under the very names that the first one has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lab.environment import Lab
from lab.kube.client import KubeServer
from lab.process import binary, run
from lab.seaweed import Store
from lab.volume import config_for_csi

#: The connection that leads there.
EAST = "kubernetes_east"
_DEAD = "https://127.0.0.1:1"


@dataclass(frozen=True)
class SecondCluster:
    """The cluster, and the kubeconfig of a connection that can lose it.

    Attributes:
        kube: The stand-in.
        kubeconfig: A copy of its own kubeconfig.
    """

    kube: KubeServer
    kubeconfig: Path

    @property
    def connection(self) -> dict[str, str]:
        """The connection `EAST`, as Airflow takes it from the environment."""
        value = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(self.kubeconfig)}}
        return {f"AIRFLOW_CONN_{EAST.upper()}": json.dumps(value)}

    def go_away(self) -> None:
        """Let nobody reach it. Its pods and mounts live on."""
        self.kubeconfig.write_text(self.kubeconfig.read_text().replace(self.kube.url, _DEAD))

    def come_back(self) -> None:
        """Let it be reached again."""
        self.kubeconfig.write_text(self.kube.kubeconfig.read_text())

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl against it; return what it prints."""
        return run([binary("kubectl"), f"--kubeconfig={self.kube.kubeconfig}", *arguments])

    def mounts(self) -> list[Path]:
        """Return the host's paths of its mounts."""
        return sorted((self.kube.state / "jfs").iterdir())


@contextmanager
def second_cluster(
    lab: Lab, store: Store, state: Path, heartbeat_s: int = 1, *, keeps_fuse: bool = False
) -> Iterator[SecondCluster]:
    """Run one, of a single node.

    Args:
        lab: Its volume is mounted.
        store: Where the volume is now.
        state: An empty or new folder.
        heartbeat_s: Of the mount.
        keeps_fuse: Whether the driver there can replace a mount pod without a pause.
    """
    config = config_for_csi(lab.volume, lab.mariadb, store)
    kube = KubeServer.start(
        state, config, juicefs=binary("juicefs"), heartbeat_s=heartbeat_s, nodes=1, keeps_fuse=keeps_fuse
    )
    east = SecondCluster(kube, state / "connection.kubeconfig")
    try:
        east.come_back()
        east.kubeconfig.chmod(0o600)
        yield east
    finally:
        mounted = [mount.name for mount in east.mounts()]
        kube.stop()
        for name in mounted:  # no run of another test may wait for its session to expire
            lab.mariadb.query("DELETE FROM jfs_session2 WHERE info LIKE %s", (f"%{name}%",))

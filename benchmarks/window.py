"""How long clients take to follow a new setting: from its write to the last client proven, against the heartbeat.

`python -m benchmarks.window [--rounds N] [--heartbeat S]` starts a lab of its own and moves its volume to and fro.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from kubernetes import client, config
from pydantic import SecretStr

from include.juicefs_storage.adapters.juicefs_command import in_controller_pod
from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.switch.prove_clients import prove_every_client
from include.juicefs_storage.switch.write_setting import WriteSetting
from include.juicefs_storage.volume.canary import Move
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.mount_pods import VolumePods
from include.juicefs_storage.volume.secret import metaurl_of
from include.juicefs_storage.volume.setting import StorageConfig
from lab.environment import Lab
from lab.seaweed import Store


def measure(lab: Lab, rounds: int) -> list[float]:
    """Move the volume to and fro; seconds from the setting's write to the last client proven, for each round."""
    configuration = client.Configuration()
    config.load_kube_config(str(lab.kube.kubeconfig), client_configuration=configuration)
    cluster = KubernetesCluster(client.ApiClient(configuration), "juicefs")
    metaurl = metaurl_of(cluster.secret("juicefs-sc-secret"))
    metadata, juicefs = MySqlMetadata.from_metaurl(metaurl), in_controller_pod(cluster, metaurl)
    windows = []
    for number in range(rounds):
        target = _storage(lab.old_store if number % 2 else lab.new_store)
        before = metadata.read_setting()
        WriteSetting(metadata, juicefs, before, target).apply()
        start = time.monotonic()
        prove_every_client(
            VolumePods(Clusters(cluster), before, "juicefs-sc-secret"),
            Move(target, S3Bucket.from_storage(target)), ".window",
            timeout_s=120, clock=time.monotonic, sleep=lambda seconds: time.sleep(seconds / 4),
        )  # fmt: skip
        windows.append(time.monotonic() - start)
        print(f"round {number + 1}: {windows[-1]:.1f} s", flush=True)
    return windows


def _storage(store: Store) -> StorageConfig:
    return StorageConfig("minio", store.bucket_url, SecretStr(store.access_key), SecretStr(store.secret_key))


def main() -> None:
    """Print each round, then median and worst, in seconds and in heartbeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--heartbeat", type=int, default=12, help="of the lab's mounts, in seconds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lab = Lab.up(Path(folder) / "lab", heartbeat_s=arguments.heartbeat)
        try:
            windows = measure(lab, arguments.rounds)
        finally:
            lab.down()
    for name, value in (("median", statistics.median(windows)), ("worst", max(windows))):
        print(f"{name}: {value:.1f} s, {value / arguments.heartbeat:.2f} heartbeats of {arguments.heartbeat} s")


if __name__ == "__main__":
    main()

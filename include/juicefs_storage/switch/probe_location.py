"""Find out whether a location serves the clients, before they are sent back there."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.one_store import new_probe_key
from include.juicefs_storage.ports import JuiceFS, MetadataStore, PodAccess
from include.juicefs_storage.switch.location import Location
from include.juicefs_storage.volume.bucket_url import BucketUrl
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.mount_pods import MOUNT_CONTAINER
from include.juicefs_storage.volume.reach import cannot_reach
from include.juicefs_storage.volume.setting import Setting

#: Try one block of each of so many of the oldest slices: a block may have been lost years ago.
_BLOCKS_TRIED = 3
_PARALLEL_PODS = 8


def find_problem(
    cluster: PodAccess,
    juicefs: JuiceFS,
    metadata: MetadataStore,
    setting: Setting,
    location: Location,
    mount_pods: Sequence[str],
    *,
    write: bool,
    lost_before: Collection[str] = frozenset(),
) -> str:
    """Find out why a location would not serve the clients.

    Each mount pod connects to it, and juicefs uses it with the clients' own keys, where it runs: it reads a block, and
    writes, reads back and removes an object under a new key.

    Args:
        cluster: Where the pods are.
        juicefs: Runs in a pod.
        metadata: Names the oldest slices.
        setting: The volume's setting, for the keys of their blocks.
        location: The storage.
        mount_pods: Names of the volume's mount pods. One that cannot be asked is left out.
        write: Try to write as well.
        lost_before: Keys of blocks that were accepted as lost: no store has them.

    Returns:
        The first problem; empty where there is none.
    """
    config = location.config
    url = config.url
    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        answers = pool.map(lambda pod: (pod, _cannot_reach(cluster, pod, url)), mount_pods)
        if unreached := [f"pod {pod} cannot use {url.endpoint}: {problem}" for pod, problem in answers if problem]:
            return unreached[0]
    blocks = list(islice(_oldest_blocks(metadata, setting, lost_before), _BLOCKS_TRIED))
    try:
        if not url.verify:
            # `juicefs sync`, which reads a block, checks every certificate.
            problem = juicefs.try_storage(config, setting.name if write else "")
            return problem or _problem_for_airflow(location, f"{setting.name}/", blocks)
        return juicefs.probe_storage(config, blocks, new_probe_key(f"{setting.name}/") if write else None)
    except StorageSwitchError as error:
        why = f"No pod could be asked either: {error.problem}"
        return _problem_for_airflow(location, f"{setting.name}/", blocks, why)


def _oldest_blocks(metadata: MetadataStore, setting: Setting, lost_before: Collection[str]) -> Iterator[str]:
    """Yield one block of each slice that has one left, the oldest slice first."""
    for slice_id, size in metadata.slices():
        keys = (key for key, _ in block_objects(setting, slice_id, size) if key not in lost_before)
        yield from islice(keys, 1)


def _cannot_reach(cluster: PodAccess, pod: str, url: BucketUrl) -> str | None:
    """Ask a pod whether it reaches an endpoint; None also where the pod is gone meanwhile."""
    try:
        return cannot_reach(cluster, pod, MOUNT_CONTAINER, url)
    except StorageSwitchError:
        return None


def _problem_for_airflow(location: Location, below: str, blocks: Sequence[str], why: str = "") -> str:
    """Ask from where Airflow runs what no pod could be asked.

    Args:
        location: The storage.
        below: What the volume's keys begin with.
        blocks: Keys of blocks, of which one must be there.
        why: Why no pod could be asked.
    """
    try:
        location.store.check(below)
        if blocks and not any(location.store.exists(key) for key in blocks):
            return f"none of {len(blocks)} blocks is in {location.config.bucket}"
    except StorageSwitchError as error:
        return f"{error.problem} {why}".rstrip()
    return ""

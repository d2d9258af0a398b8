"""What the proofs and the way back will need: asked while nothing has been changed yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import JuiceFS, MetadataStore, Pod, PodAccess
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.volume.canary import Move, nearest_writer, prove_client, prove_reader, room_of
from include.juicefs_storage.volume.clusters import kubectl
from include.juicefs_storage.volume.mount_pods import MountPod, VolumePods, running_mount_pods
from include.juicefs_storage.volume.setting import Setting, StorageConfig

_PARALLEL_PODS = 8
_CANARY_TIMEOUT_S = 30.0
#: Room for the canaries of one mount, retries and what the trash keeps of them included: files, and bytes of each with
#: its inode.
_CANARIES, _CANARY_BYTES = 16, 8192
#: The largest block that JuiceFS knows, and how many are written for each mount that only reads: by check and proof.
_BLOCK_BYTES, _BLOCKS = 16 << 20, 2
#: What the fresh mount writes, and some more.
_FRESH_MOUNT_BYTES, _FRESH_MOUNT_FILES = 1 << 20, 8


def check_metadata(metadata: MetadataStore, juicefs: JuiceFS, setting: Setting) -> list[Finding]:
    """Check that the setting can be put back, and that juicefs reaches the same volume where it will run.

    Args:
        metadata: As Airflow reaches it.
        juicefs: Where `juicefs_runner` says, with the metaurl of the volume's Secret.
        setting: The setting as it is now.

    Raises:
        PermanentError: The setting cannot be updated, or juicefs is refused by the metadata.
        TransientError: juicefs does not reach the metadata.
    """
    metadata.confirm_writable()
    found = (juicefs.status().get("Setting") or {}).get("UUID")
    if found != setting.uuid:
        return [
            refusal(
                "metadata",
                f"With the Secret's metaurl juicefs reads volume {found}, expected {setting.uuid}.",
                "correct `meta_conn_id` or `secret_name`: both must name the same database and table_prefix",
            )
        ]
    return [ok("metadata", "the setting can be updated, juicefs reads the same volume")]


def check_secret_leads_to(juicefs: JuiceFS, setting: Setting) -> list[Finding]:
    """Check that the Secret of a further cluster is this volume's: another one may have its name, or its address there.

    Args:
        juicefs: In that cluster, with the metaurl of its Secret.
        setting: The volume's setting.
    """
    found = (juicefs.status().get("Setting") or {}).get("UUID")
    if found != setting.uuid:
        return [
            refusal(
                "metadata",
                f"With the Secret's metaurl juicefs reads volume {found}, expected {setting.uuid}.",
                "take the cluster out of more_kubernetes_conn_ids, or correct the Secret there",
            )
        ]
    return [ok("metadata", "juicefs reads the same volume there")]


def check_room(cluster: PodAccess, mounts: Sequence[MountPod]) -> list[Finding]:
    """Check that every mount has room for the canaries: neither the volume nor a directory is at its quota.

    Args:
        cluster: Where the mount pods are.
        mounts: The volume's mount pods.
    """
    check = "quota"
    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        rooms = list(pool.map(lambda mount: room_of(cluster, mount.name, mount.mount_path), mounts))
    files = _CANARIES * len(mounts) + _FRESH_MOUNT_FILES
    size = _CANARY_BYTES * _CANARIES * len(mounts) + _FRESH_MOUNT_BYTES
    size += _BLOCK_BYTES * _BLOCKS * sum(mount.read_only for mount in mounts)
    findings = []
    for mount, room in zip(mounts, rooms, strict=True):
        if room is None:
            findings.append(
                warning(
                    check,
                    f"Mount pod {mount.name} cannot tell how much may still be written through it.",
                    f"make sure that no quota is met: expected room for {files} files and {size} bytes",
                )
            )
        elif room.free_files < files or room.free_bytes < size:
            findings.append(
                refusal(
                    check,
                    f"Through mount pod {mount.name} only {room.free_files} files and {room.free_bytes} bytes may be "
                    f"written: a quota of the volume or of a directory is met. The proofs need {files} files and "
                    f"{size} bytes.",
                    "raise the quota (juicefs config --capacity, --inodes; juicefs quota set), or delete files",
                )
            )
    return findings or [ok(check, f"every mount has room for {files} files and {size} bytes")]


def check_canaries(
    pods: VolumePods, mounts: Sequence[MountPod], config: StorageConfig, store: Bucket, canary: str, *, going_back: bool
) -> list[Finding]:
    """Check that a file can be written through every mount, and that its block lands on the volume's current store.

    A mount that only reads reads a block that another writes. The files are removed again; the volume's trash keeps
    them for as long as it keeps anything.

    Args:
        pods: The volume's mount pods.
        mounts: Those of the plan. What other checks refuse is left out.
        config: The storage that the volume is on.
        store: The bucket behind it, as Airflow reaches it.
        canary: How the names of the files begin.
        going_back: A way back does not depend on the store that it leaves: what fails is a warning.
    """
    check = "canaries"
    try:
        store.ping()
        store.check(f"{pods.setting.name}/")
    except StorageSwitchError as error:
        return [
            warning(
                check,
                f"The store that the volume is on cannot be used from Airflow: no client was tried. {error.problem}",
                "if its clients cannot use it either, what they have not written yet is lost with it",
            )
        ]
    read_only = {mount.uid: mount.read_only for mount in mounts if mount.bucket == config.bucket}
    found = [pod for pod in running_mount_pods(pods.clusters) if pod.uid in read_only]
    writers, readers = ([pod for pod in found if read_only[pod.uid] is only_reads] for only_reads in (False, True))
    # A client whose reload failed once has kept this storage: its log alone does not speak against it.
    move = Move(config, store, returning=True)

    def write(pod: Pod) -> str:
        return prove_client(pods.clusters, pod, move, f"{canary}-{pod.uid}", timeout_s=_CANARY_TIMEOUT_S).problem

    def read(pod: Pod) -> str:
        return prove_reader(
            pods.clusters, pod, nearest_writer(able, pod), move, f"{canary}-{pod.uid}",
            block_bytes=pods.setting.block_bytes, timeout_s=_CANARY_TIMEOUT_S,
        ).problem  # fmt: skip

    written = _problems(write, writers)
    # Where nobody can write for them, they will be proven by their logs; that the others cannot is refused already.
    able = [pod for pod, problem in written if not problem]
    tried = readers if able else []
    grade = warning if going_back else refusal
    read_too = f"; {len(tried)} that only read have each read one" if tried else ""
    return [
        grade(
            check,
            f"Mount pod {pod.name} cannot be proven on the store that the volume is on: {text}",
            f"{kubectl(pod.namespace, 'logs', pod.name)}; a client that cannot be proven now cannot be proven later",
        )
        for pod, text in [*written, *_problems(read, tried)]
        if text
    ] or [ok(check, f"a block was written through each of {len(writers)} mounts to {config.bucket}{read_too}")]


def _problems(prove: Callable[[Pod], str], pods: Sequence[Pod]) -> list[tuple[Pod, str]]:
    """Try clients side by side; each with its problem, empty where there is none."""

    def problem(pod: Pod) -> str:
        try:
            return prove(pod)
        except StorageSwitchError as error:
            return error.problem

    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        return list(zip(pods, pool.map(problem, pods), strict=True))

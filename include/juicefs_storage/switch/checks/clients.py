"""What the volume must be like: every client can follow, and can be proven."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath

from include.juicefs_storage.ports import MetadataStore, PersistentVolume, Session, WriteFence
from include.juicefs_storage.switch.change import Change
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.volume.mount_pods import MountPod, storage_overrides
from include.juicefs_storage.volume.setting import Setting
from include.juicefs_storage.volume.storage_kinds import BY_HAND, S3_STORAGES, why_not
from include.juicefs_storage.volume.users import is_accepted, session_name, unknown_sessions

MINIMUM_VERSION = (1, 1)
#: A client gives up on a flush after so many seconds (pkg/vfs/writer.go of JuiceFS 1.4, by its default of retries).
FLUSH_LIMIT_S = 300


#: An expired session that is older, in seconds, is no news.
EXPIRED_LATELY_S = 86_400


def _follows(version: str) -> bool:
    return _version(version)[:2] >= MINIMUM_VERSION


def _version(text: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(number) for number in found.groups("0")) if found else ()


def check_volume(
    setting: Setting,
    mounts: Sequence[MountPod],
    volumes: Sequence[PersistentVolume],
    metadata: MetadataStore,
    client_timeout_s: float,
    *,
    leaving: Sequence[str] = (),
    accept: Sequence[str] = (),
) -> list[Finding]:
    """Check that the volume and its clients can follow a change of the setting, and every client can be proven.

    Args:
        setting: The setting as it is now.
        mounts: The volume's mount pods.
        volumes: The PVs of the CSI driver; those that the mount pods serve are looked at.
        metadata: Where the sessions are listed.
        client_timeout_s: How long a client may take to follow, in seconds.
        leaving: The mount paths of pods that are being deleted: their sessions are about to end.
        accept: Which clients need not be proven, see `is_accepted`.
    """
    check, sessions = "volume", metadata.sessions()
    findings = [finding for mount in mounts for finding in _mount_findings(mount, setting, client_timeout_s)]
    findings += [*_too_old(sessions, mounts), *_only_readers(mounts), *_immovable(setting)]
    served = {mount.volume_id for mount in mounts}
    findings += [
        refusal(
            check,
            f"PersistentVolume {volume.name} has mountOptions {', '.join(options)}: its next mounts would not follow "
            "the setting.",
            "remove bucket and storage from its mountOptions and its StorageClass, then restart its mount pods",
        )
        for volume in volumes
        if volume.volume_handle in served and (options := storage_overrides(",".join(volume.mount_options)))
    ]
    others = unknown_sessions(sessions, [*(mount.mount_path for mount in mounts), *leaving])
    findings += [_unproven(session, accepted=is_accepted(session, accept)) for session in others]
    if any(finding.level == "refusal" for finding in findings):
        return findings
    return [*findings, ok(check, f"{setting.name} ({setting.uuid}), {len(mounts)} mount pods, all can follow")]


def _immovable(setting: Setting) -> Iterator[Finding]:
    """Refuse what no run can move: several buckets, and stores that cannot be looked at."""
    if setting.shards > 1:
        yield refusal(
            "volume",
            f"The volume is sharded: JuiceFS spreads its blocks over {setting.shards} buckets by a hash of each "
            f"block's key, and the setting names them all by one pattern, {setting.bucket}. The clients would move "
            "to as many new buckets at once; a run compares, copies and proves one bucket.",
            "copy each bucket to its counterpart (juicefs_storage_sync), the same number for the same number and "
            f"{setting.shards} of them; unmount all clients; then `juicefs config --bucket` with the new pattern. "
            "Or copy the files to a volume without shards",
        )
    if reason := why_not(setting.storage):
        yield refusal(
            "volume",
            f"The volume's storage is of kind {setting.storage!r}, expected one of {', '.join(S3_STORAGES)}: "
            f"{reason}. The proofs look for blocks by S3, also where only the keys change.",
            BY_HAND,
        )


def _mount_findings(mount: MountPod, setting: Setting, client_timeout_s: float) -> Iterator[Finding]:
    check, name = "volume", f"Mount pod {mount.name}"
    if not _follows(mount.version):
        yield refusal(check, f"{name} runs JuiceFS {mount.version}, needs 1.1.", "upgrade the client")
    if mount.heartbeat_s > client_timeout_s:
        yield refusal(
            check,
            f"{name} has a heartbeat of {mount.heartbeat_s:g} s, longer than client_timeout_s.",
            f"set client_timeout_s to more than {2 * mount.heartbeat_s:g}",
        )
    if mount.overrides or mount.bucket != setting.bucket:
        yield refusal(
            check,
            f"{name} uses bucket {mount.bucket}, the setting {setting.bucket}: it runs with an override"
            f"{''.join(f' ({option})' for option in mount.overrides)}.",
            "remove bucket/storage from the PV's mountOptions and restart the mount pod",
        )
    if mount.staged_blocks or mount.upload_delayed:
        waiting = (
            f"{mount.staged_blocks} blocks wait in its cache" if mount.staged_blocks else "its options delay uploads"
        )
        yield refusal(
            check,
            f"{name} runs with writeback, and {waiting}: they are on no store and cannot be accounted for.",
            "wait until juicefs_staging_blocks is 0 in its .stats, without upload-delay and upload-hours",
        )
    elif mount.writeback:
        yield warning(
            check,
            f"{name} runs with writeback: a block that it uploads late looks lost to prove_blocks, which rolls back.",
            "switch while little is written, or mount it without writeback",
        )


def _unproven(session: Session, *, accepted: bool) -> Finding:
    """Refuse a client that is no mount pod, or warn of one that a person has accepted."""
    problem = (
        f"Session {session.sid} on {session.host} at {session.mount_point} is no mount pod of the run's clusters: "
        "it cannot be proven to have followed"
    )
    if accepted:
        remedy = "make sure that it runs JuiceFS with a heartbeat of 12 s, and look at it after the switch"
        return warning("volume", f"{problem}, which accept_clients accepts.", remedy)
    return refusal(
        "volume",
        f"{problem}.",
        "unmount it for the time of the switch, or wait until its session has expired if it is dead; or accept that "
        f"it is not proven: add `{session_name(session)}` to accept_clients",
    )


def _only_readers(mounts: Sequence[MountPod]) -> Iterator[Finding]:
    """Warn where every mount is read-only: nobody writes a block that proves the others when they read it."""
    if mounts and all(mount.read_only for mount in mounts):
        yield warning(
            "volume",
            f"Every mount is read-only ({len(mounts)} of them): no client can write a block for them to read, and they "
            "are proven by their logs alone.",
            "nothing, or mount the volume writable in one pod for the time of the switch",
        )


def _too_old(sessions: Sequence[Session], mounts: Sequence[MountPod]) -> Iterator[Finding]:
    """Refuse clients that never re-read the setting, by their sessions. Mount pods are refused by their `.config`."""
    refused = {PurePosixPath(mount.mount_path).name for mount in mounts if not _follows(mount.version)}
    for session in sessions:
        if not _follows(session.version) and PurePosixPath(session.mount_point).name not in refused:
            yield refusal(
                "volume",
                f"Session {session.sid} on {session.host} at {session.mount_point} runs JuiceFS {session.version}, "
                "needs 1.1.",
                "upgrade the client",
            )


def check_expired_sessions(metadata: MetadataStore, mounts: Sequence[MountPod]) -> list[Finding]:
    """Check for clients that were here until lately: one that is suspended, or whose clock is behind, may write again.

    Its session is gone by the server's clock. When it wakes it writes what it holds to the store that it knew.

    Args:
        metadata: Where the sessions are listed. Other clients remove expired ones within a heartbeat or two.
        mounts: The volume's mount pods: theirs are accounted for.
    """
    expired = unknown_sessions(metadata.expired_sessions(EXPIRED_LATELY_S), [mount.mount_path for mount in mounts])
    return [
        warning(
            "expired sessions",
            f"Session {session.sid} on {session.host} at {session.mount_point} was here until "
            f"{session.expires:%Y-%m-%d %H:%M:%S} UTC: a suspended client that wakes writes to the old store.",
            "make sure that it has ended, or withdraw the old key when the run is done",
        )
        for session in expired
    ]


def check_late_commits(late_commit_s: int, change: Change) -> list[Finding]:
    """Check how long slices may be committed after their blocks were uploaded: a flush gives up after 300 s.

    Args:
        late_commit_s: After so many seconds the blocks are copied and proven once more; 0: not at all.
        change: How the storage changes. Clients that keep their store leave no block behind.
    """
    if late_commit_s >= FLUSH_LIMIT_S or change.one_store:
        return []
    waited = f"only {late_commit_s} s" if late_commit_s else "not"
    return [
        warning(
            "late commits",
            f"Slices that clients commit late are {waited} waited for: a block may become part of a file up to "
            f"{FLUSH_LIMIT_S} s after it went to the old store, and would be missing on the new one.",
            "set late_commit_s=360, or clear prove_blocks without Downstream 6 minutes after the run",
        )
    ]


def check_fence(
    fence: WriteFence | None, *, catch_up: bool, keys_only: bool = False, same_access_key: bool = False
) -> list[Finding]:
    """Check that the write fence on the old store can be put up, and is not up yet.

    Args:
        fence: None: none is wanted.
        catch_up: Whether a task follows the clients' writes, which also takes the fence down in time.
        keys_only: Whether the clients keep their bucket: the fence refuses the old key for some seconds then, as a
            proof.
        same_access_key: Whether the access key stays, and only its secret key changes.
    """
    check = "write fence"
    if fence is None:
        return []
    if keys_only:
        return _check_denial(fence, same_access_key=same_access_key)
    if not catch_up:
        return [
            refusal(check, "A write fence needs catch_up: nothing else takes it down in time.", "set catch_up=true")
        ]
    if fence.is_up():
        return [
            refusal(
                check,
                "A write fence is up on the store that the volume is on: its clients cannot write.",
                "take the clients' user out of MinIO's group juicefs-storage-fence-<volume> (mc admin group rm)",
            )
        ]
    return [ok(check, "it can be put up on the old store")]


def _check_denial(fence: WriteFence, *, same_access_key: bool) -> list[Finding]:
    """Check that the store can refuse the old key alone."""
    check = "write fence"
    if same_access_key:
        return [
            refusal(
                check,
                "The access key stays the same: to refuse the old key would refuse the new one.",
                "leave `fence_conn_id` empty: the store knows one secret key of an access key, so that the old one is "
                "refused already",
            )
        ]
    if fence.is_up():
        remedy = "take its user out of MinIO's group juicefs-storage-fence-<volume> (mc admin group rm)"
        return [refusal(check, "The old key may not write: a write fence is up.", remedy)]
    return [ok(check, "the old key can be refused for a few seconds, to prove that no client uses it")]


def check_runner(version: str, mounts: Sequence[MountPod], sessions: Sequence[Session]) -> list[Finding]:
    """Check that the juicefs that writes the setting is at least as new as the newest client.

    An older one drops the fields of the setting that it does not know.

    Args:
        version: Of the executable that `juicefs_runner` names.
        mounts: The volume's mount pods.
        sessions: Every client of the volume.
    """
    check = "runner"
    newest = max(
        [*(mount.version for mount in mounts), *(session.version for session in sessions)], key=_version, default=""
    )
    if not _version(version):
        return [
            warning(check, f"juicefs calls its version {version!r}: it cannot be compared.", "use a released version")
        ]
    if _version(version) < _version(newest):
        return [
            refusal(
                check,
                f"juicefs is version {version} where it runs, a client of the volume {newest}: it would drop what it "
                "does not know from the setting.",
                "upgrade the CSI driver's image, or set juicefs_runner=worker with a newer juicefs there",
            )
        ]
    return [ok(check, f"juicefs {version}, no client is newer")]

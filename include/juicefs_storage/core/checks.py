"""The checks before a switch. All are read-only but for one probe object of our own, left out of a dry run."""

from __future__ import annotations

from collections.abc import Sequence

from include.juicefs_storage.core.clients import MountPod, unknown_sessions
from include.juicefs_storage.core.copying import Difference, compare_listings, volume_objects
from include.juicefs_storage.core.errors import StorageSwitchError
from include.juicefs_storage.core.plan import Finding
from include.juicefs_storage.core.ports import Cluster, MetadataStore, ObjectStore, Right
from include.juicefs_storage.core.setting import Setting, StorageConfig
from include.juicefs_storage.core.steps import CSI_CONTROLLER_SELECTOR, CSI_WORKLOADS

#: Written by `juicefs format`, holds the volume's UUID; may be absent.
UUID_OBJECT = "juicefs_uuid"
MINIMUM_VERSION = (1, 1)


def ok(check: str, message: str) -> Finding:
    """A check that passed."""
    return Finding(check=check, level="ok", message=message)


def warning(check: str, message: str, remedy: str) -> Finding:
    """Something the person should know, which does not forbid the switch."""
    return Finding(check=check, level="warning", message=message, remedy=remedy)


def refusal(check: str, message: str, remedy: str) -> Finding:
    """Something that forbids the switch."""
    return Finding(check=check, level="refusal", message=message, remedy=remedy)


def needed_rights(namespace: str) -> list[Right]:
    """Every right that the DAG uses; deploy/rbac.yaml grants exactly these."""
    rights = [Right(verb, "pods", namespace=namespace) for verb in ("get", "list")]
    rights += [
        # The handshake of an exec over WebSocket is a GET; newer API servers ask for `create` as well.
        Right("get", "pods", subresource="exec", namespace=namespace),
        Right("create", "pods", subresource="exec", namespace=namespace),
        Right("get", "pods", subresource="log", namespace=namespace),
    ]
    rights += [Right(verb, "secrets", namespace=namespace) for verb in ("get", "list", "patch")]
    rights += [
        Right(verb, resource, "apps", namespace=namespace)
        for resource in ("statefulsets", "daemonsets")
        for verb in ("get", "patch")
    ]
    rights += [Right("list", "pods"), Right("list", "persistentvolumes")]
    return rights


def check_rights(cluster: Cluster) -> list[Finding]:
    """Ask for every right before the first of them is needed."""
    rights = needed_rights(cluster.namespace)
    missing = [right for right in rights if not cluster.allows(right)]
    return [
        refusal("rights", f"The connection's user may not {right}.", "apply deploy/rbac.yaml") for right in missing
    ] or [ok("rights", f"all {len(rights)} rights are granted")]


def check_csi(cluster: Cluster) -> list[Finding]:
    """The CSI driver runs in mount-pod mode and is healthy."""
    findings = []
    for kind, name in CSI_WORKLOADS:
        workload = cluster.workload(kind, name)
        if any(arg.replace("=", " ").split()[:2] == ["--by-process", "true"] for arg in workload.args):
            findings.append(
                refusal(
                    "csi",
                    f"{kind}/{name} runs in process mode (--by-process=true): restarting it would break the mounts.",
                    "move the driver to mount-pod mode",
                )
            )
        if not workload.rolled_out:
            findings.append(
                refusal(
                    "csi",
                    f"{kind}/{name} is not healthy: {workload.progress}.",
                    f"kubectl -n {cluster.namespace} rollout status {kind.lower()}/{name}",
                )
            )
    if not any(pod.ready for pod in cluster.pods(CSI_CONTROLLER_SELECTOR)):
        findings.append(
            refusal("csi", f"No ready pod carries {CSI_CONTROLLER_SELECTOR}.", "see the pods of the CSI controller")
        )
    return findings or [ok("csi", "mount-pod mode, controller and node components are healthy")]


def _version(text: str) -> tuple[int, ...]:
    numbers = text.split("+", maxsplit=1)[0].split("-", maxsplit=1)[0].split(".")
    return tuple(int(number) for number in numbers[:2] if number.isdigit())


def check_volume(
    setting: Setting,
    secret_storage: tuple[str | None, str | None],
    mounts: Sequence[MountPod],
    metadata: MetadataStore,
    client_timeout_s: float,
) -> list[Finding]:
    """The volume and its clients can follow a change of the setting, and every client can be proven.

    Args:
        setting: The setting as it is now.
        secret_storage: `storage` and `bucket` of the Secret; None where the Secret lacks the key.
        mounts: The volume's mount pods.
        metadata: Where the sessions are listed.
        client_timeout_s: How long a client may take to follow, in seconds.
    """
    check, findings = "volume", []
    if setting.shards > 1:
        findings.append(
            refusal(check, f"The volume is sharded over {setting.shards} buckets.", "sharded volumes cannot be moved")
        )
    held = [value for value in secret_storage if value is not None]
    if held and held != [setting.storage, setting.bucket][-len(held) :]:
        findings.append(
            warning(
                check,
                f"The Secret says {' '.join(held)}, the setting {setting.storage} {setting.bucket}.",
                "a starting mount pod writes the Secret's values into the setting; the switch makes both agree",
            )
        )
    for mount in mounts:
        name = f"Mount pod {mount.name}"
        if _version(mount.version) < MINIMUM_VERSION:
            findings.append(refusal(check, f"{name} runs JuiceFS {mount.version}, needs 1.1.", "upgrade the client"))
        if mount.heartbeat_s > client_timeout_s:
            findings.append(
                refusal(
                    check,
                    f"{name} has a heartbeat of {mount.heartbeat_s:g} s, longer than client_timeout_s.",
                    f"set client_timeout_s to more than {2 * mount.heartbeat_s:g}",
                )
            )
        if mount.bucket != setting.bucket:
            findings.append(
                refusal(
                    check,
                    f"{name} uses bucket {mount.bucket}, the setting {setting.bucket}: it runs with an override.",
                    "remove bucket/storage from the PV's mountOptions and start the mount pod anew",
                )
            )
        if mount.read_only:
            findings.append(
                refusal(
                    check,
                    f"{name} is mounted read-only: no block can be written through it to prove it.",
                    "unmount it for the time of the switch",
                )
            )
        if mount.writeback:
            findings.append(
                refusal(
                    check,
                    f"{name} runs with writeback: blocks that wait in its cache cannot be seen from here.",
                    "mount it without writeback",
                )
            )
    findings += [
        refusal(
            check,
            f"Session {session.sid} on {session.host} at {session.mount_point} is no mount pod of this cluster: "
            "it cannot be proven to have followed.",
            "unmount it for the time of the switch, or wait until its session has expired if it is dead",
        )
        for session in unknown_sessions(metadata.sessions(), mounts)
    ]
    return findings or [ok(check, f"{setting.name} ({setting.uuid}), {len(mounts)} mount pods, all can follow")]


def check_target(
    store: ObjectStore, setting: Setting, target: StorageConfig, *, probe_key: str | None
) -> list[Finding]:
    """The new bucket exists, can be used with its keys, and belongs to this volume.

    Args:
        store: The new bucket.
        setting: The volume's setting.
        target: What the clients will be told to use.
        probe_key: Key of a small object that is written, read, listed and deleted; None leaves that out.
    """
    check, findings = "target", []
    try:
        store.check_bucket()
        if probe_key:
            store.probe(probe_key)
        content = store.read(f"{setting.name}/{UUID_OBJECT}")
    except StorageSwitchError as error:
        return [refusal(check, error.problem, error.next_step)]
    if content is None:
        findings.append(
            warning(
                check,
                f"{setting.name}/{UUID_OBJECT} is not in the new bucket, so that it cannot tell whose data it holds.",
                f"copy the whole prefix {setting.name}/, this object included",
            )
        )
    elif content.decode(errors="replace").strip() != setting.uuid:
        findings.append(
            refusal(
                check,
                f"The new bucket's {setting.name}/{UUID_OBJECT} names volume "
                f"{content[:36].decode(errors='replace')!r}, this volume is {setting.uuid}.",
                "choose the bucket that this volume was copied to",
            )
        )
    if setting.uses(target):
        findings.append(warning(check, "The setting names this bucket and these keys already.", "nothing to switch"))
    probed = "PUT, GET, LIST and DELETE work" if probe_key else "no write was tried (dry run)"
    return [*findings, ok(check, f"bucket `{target.bucket}` exists, {probed}")]


def check_consistency(
    source: ObjectStore, target: ObjectStore, setting: Setting, *, catch_up: bool
) -> tuple[list[Finding], Difference]:
    """Compare the new store's listing with the old one's: every block is there, with the same size.

    A volume in use is always ahead of its copy. With `catch_up` a copy that is behind is a warning, since the rest is
    copied before the setting is written; a copy that was not made at all is a refusal.
    """
    check, difference = (
        "consistency",
        compare_listings(volume_objects(source, setting), volume_objects(target, setting)),
    )
    examples = "; ".join(difference.examples)
    copy = "copy the volume (`juicefs sync`, see docs/switch.md), then start again"
    findings = []
    if difference.different:
        findings.append(
            refusal(
                check,
                f"{difference.different} of {difference.expected} blocks differ in size on the new store: {examples}.",
                "find out what wrote them; nothing here overwrites an object that differs",
            )
        )
    if difference.missing and (not difference.present or not catch_up):
        findings.append(
            refusal(
                check,
                f"{difference.missing} of {difference.expected} blocks are not on the new store: {examples}.",
                copy,
            )
        )
    elif difference.missing:
        findings.append(
            warning(
                check,
                f"{difference.missing} of {difference.expected} blocks are not on the new store yet.",
                "they are copied before the setting is written (catch_up=true)",
            )
        )
    return findings or [
        ok(check, f"all {difference.expected} blocks of the old store are on the new one, by key and size")
    ], difference

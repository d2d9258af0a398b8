"""What the new store must be like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from include.juicefs_storage.errors import StorageSwitchError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import Cluster
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.volume.csi import CSI_CONTAINER, CSI_CONTROLLER_SELECTOR
from include.juicefs_storage.volume.mount_pods import MOUNT_CONTAINER, MountPod
from include.juicefs_storage.volume.reach import cannot_reach
from include.juicefs_storage.volume.setting import Setting, StorageConfig

#: Written by `juicefs format`, holds the volume's UUID; may be absent.
UUID_OBJECT = "juicefs_uuid"
_PARALLEL_PODS = 8


def check_target(store: Bucket, setting: Setting, target: StorageConfig, *, probe_key: str | None) -> list[Finding]:
    """Check that the new bucket exists, can be used with its keys, and belongs to this volume.

    Args:
        store: The new bucket.
        setting: The volume's setting.
        target: The storage that the setting will name.
        probe_key: Key of a small object that is written, read, listed and deleted; None leaves that out.
    """
    check, findings = "target", []
    try:
        target.endpoint_and_bucket  # noqa: B018  raises where JuiceFS would read another bucket from the URL
        store.check(f"{setting.name}/")
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
        return [
            refusal(
                check,
                f"The new bucket's {setting.name}/{UUID_OBJECT} names volume "
                f"{content[:36].decode(errors='replace')!r}, this volume is {setting.uuid}.",
                "choose the bucket that this volume was copied to",
            )
        ]
    if setting.uses(target):
        findings.append(warning(check, "The setting names this bucket and these keys already.", "nothing to switch"))
    probed = "PUT, GET, LIST and DELETE work" if probe_key else "no write was tried (dry run)"
    return [*findings, ok(check, f"bucket `{target.bucket}` exists, {probed}")]


def check_reach(
    cluster: Cluster, target: StorageConfig, mounts: Sequence[MountPod], *, controller: bool
) -> list[Finding]:
    """Check that the endpoint can be reached where it will be used, and that its certificate is trusted there.

    A client that cannot build its new storage logs a warning once and stays on the old one.

    Args:
        cluster: Where the pods are.
        target: The storage that the setting will name.
        mounts: The volume's mount pods.
        controller: Ask the CSI controller too: juicefs runs there.
    """
    check, (endpoint, _) = "reach", target.endpoint_and_bucket
    places = [(mount.name, MOUNT_CONTAINER) for mount in mounts]
    if controller:
        places += [(pod.name, CSI_CONTAINER) for pod in cluster.pods(CSI_CONTROLLER_SELECTOR) if pod.ready][:1]
    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        answers = list(pool.map(lambda place: cannot_reach(cluster, place[0], place[1], endpoint), places))
    findings = [
        refusal(
            check,
            f"Pod {name} cannot use {endpoint}: {problem}.",
            f"kubectl -n {cluster.namespace} exec {name} -c {container} -- curl -v {endpoint}/ (route, firewall, DNS, "
            "CA); `target_endpoint` is the endpoint as the pods reach it",
        )
        for (name, container), problem in zip(places, answers, strict=True)
        if problem
    ]
    count = Counter("unasked" if answer is None else "reached" for answer in answers if not answer)
    if count["unasked"]:
        findings.append(
            warning(
                check,
                f"{count['unasked']} of {len(places)} pods could not be asked whether they reach {endpoint}: "
                "their image has neither curl nor bash, or the command could not be run there.",
                "try it from their nodes",
            )
        )
    return findings or [ok(check, f"{endpoint} answers to all {count['reached']} pods that will use it")]

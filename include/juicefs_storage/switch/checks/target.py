"""What the new store must be like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from include.juicefs_storage.errors import PermanentError, StorageSwitchError, UnreachableError
from include.juicefs_storage.objects.bucket import Bucket
from include.juicefs_storage.ports import JuiceFS, PodAccess
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.volume.bucket_url import SKIP_VERIFY
from include.juicefs_storage.volume.clusters import Clusters, kubectl
from include.juicefs_storage.volume.csi import CSI_CONTAINER, CSI_CONTROLLER_SELECTOR
from include.juicefs_storage.volume.layout import UUID_OBJECT
from include.juicefs_storage.volume.mount_pods import MOUNT_CONTAINER, MountPod
from include.juicefs_storage.volume.reach import cannot_reach, is_about_certificate
from include.juicefs_storage.volume.setting import Setting, StorageConfig

_PARALLEL_PODS = 8
#: How often an object is looked for that was just written: one site of a store may learn of it after another.
_LOOKS = 3

#: What to do where only Airflow has no way to the store.
_NO_WAY = (
    "open a way from the Airflow workers to it (route, firewall, DNS): they compare the stores, copy what clients "
    "still write to the old one, and prove the blocks; none of it is done through the cluster. Where Airflow needs "
    "another address than the clients: that in extra.endpoint_url of the connection, theirs in `target_endpoint`"
)
#: What to do where a pod does not trust a certificate.
_TRUST = (
    "let the pods trust its CA (in their image, or mounted over its list of authorities), or give the store a "
    "certificate of an authority that they trust; extra.verify with a CA's file is for Airflow alone. With "
    "extra.verify=false in {connection} the clients' bucket says ?tls-insecure-skip-verify=true: they take any "
    "certificate"
)


@contextmanager
def only_pods_reach(*, pods_reach: bool) -> Iterator[None]:
    """Say that Airflow alone has no way to the new store, where that is so.

    Args:
        pods_reach: Every pod that will use it reaches it.

    Raises:
        PermanentError: Instead of UnreachableError, where the pods reach it.
    """
    try:
        yield
    except UnreachableError as error:
        if not pods_reach:
            raise
        problem = f"The pods reach the new store, Airflow does not: {error.problem}"
        raise PermanentError(problem, next_step=_NO_WAY) from error


def check_target(store: Bucket, setting: Setting, target: StorageConfig, *, probe_key: str | None) -> list[Finding]:
    """Check that the new bucket exists, can be used with its keys, and belongs to this volume.

    Args:
        store: The new bucket.
        setting: The volume's setting.
        target: The storage that the setting will name.
        probe_key: Key of a small object that is written, read, listed and deleted; None leaves that out.

    Raises:
        UnreachableError: Nothing answers there.
    """
    check, findings = "target", []
    try:
        target.endpoint_and_bucket  # noqa: B018  raises where JuiceFS would read another bucket from the URL
        store.check(f"{setting.name}/")
        if probe_key:
            store.probe(probe_key)
        content = store.read(f"{setting.name}/{UUID_OBJECT}")
    except UnreachableError:
        raise
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


def check_absent(source: Callable[[], tuple[str, str]], bucket: str) -> list[Finding]:
    """Say that the new bucket will be made, and what it will not have.

    Args:
        source: Reads versioning and object lock of the old bucket.
        bucket: Where the new bucket will be.
    """
    try:
        versioning, lock = source()
        old = f"The old bucket has versioning: {versioning}, object lock: {lock}."
    except StorageSwitchError as error:
        old = f"What the old bucket has is not known: {error.problem}"
    return [
        warning(
            "target",
            f"Bucket `{bucket}` does not exist and would be created right after the approval, by the keys of its "
            f"connection, without versioning and object lock. {old} Neither is carried over, nor are policies, "
            "lifecycle rules, encryption, quotas and notifications. The blocks are copied, the other objects of the "
            "volume (`juicefs_uuid`, `meta/`) are not.",
            "where it must have an object lock, make it yourself: most stores set that at its creation alone",
        )
    ]


def check_use(juicefs: JuiceFS, target: StorageConfig, origin: str) -> list[Finding]:
    """The new store can be used by juicefs itself, where it runs: with the kind, URL and keys that the clients get.

    Nothing is written.

    Args:
        juicefs: Runs where `juicefs config` will.
        target: The storage that the setting will name.
        origin: Where it was configured, for messages.
    """
    check, side = "use", f"new store, by {origin}"
    findings = []
    if not target.url.verify:
        findings.append(
            warning(
                check,
                f"The {side}: its certificate is not checked. The clients' bucket says {SKIP_VERIFY}=true; a client "
                "that has read this takes any certificate until it restarts.",
                "give the store a certificate that the pods trust, and remove extra.verify=false",
            )
        )
    problem = juicefs.try_storage(target)
    if problem is None:
        return [
            *findings,
            warning(
                check,
                f"The {side}: juicefs could not try it where it runs: it has no temporary folder there, or no SQLite.",
                "nothing, where the other checks of the new store found nothing",
            ),
        ]
    if not problem:
        return [*findings, ok(check, f"juicefs lists in `{target.bucket}` with the keys of the {side}")]
    what = "juicefs does not trust its certificate" if is_about_certificate(problem) else "juicefs cannot use it"
    return [*findings, refusal(check, f"The {side}: {what} where it runs: {problem}", _remedy(problem, origin))]


def check_one_store(
    juicefs: JuiceFS, store: Bucket, target: StorageConfig, origin: str, *, probe_key: str | None
) -> list[Finding]:
    """Check that Airflow and the clients, who have an endpoint each, reach one store.

    If they did not, blocks would be copied to, and proven on, another store than the clients write to; a way back would
    leave there what they had written.

    Args:
        juicefs: Runs where `juicefs config` will.
        store: The new bucket, as Airflow reaches it.
        target: The storage that the setting will name.
        origin: Where the store was configured, for messages.
        probe_key: Key of a small object that Airflow writes, that juicefs looks for, and that is deleted; None: nothing
            is written, as in a dry run.
    """
    insecure = not target.url.verify  # `juicefs sync`, which looks for it, checks every certificate
    if insecure or not probe_key:
        why = "it cannot be tried where no certificate is checked" if insecure else "no write was tried (dry run)"
        return [
            warning(
                "use",
                f"The new store, by {origin}: Airflow reaches it as {store.name}, the clients as "
                f"{target.url.endpoint}. That both lead to one store is not proven: {why}.",
                "make sure that they do: this plan is made by what Airflow sees"
                + ("" if insecure else ". A real run writes an object by the first and refuses if the second lacks it"),
            )
        ]
    problems: list[str] = []

    def look() -> None:
        for _ in range(_LOOKS):
            problems.append(juicefs.probe_storage(target, [probe_key], None))
            if not problems[-1]:
                break

    store.probe(probe_key, look)
    if not problems[-1]:
        return [ok("use", f"what Airflow writes to {store.name} is seen at {target.url.endpoint}")]
    return [
        refusal(
            "use",
            f"The new store, by {origin}: Airflow wrote an object to {store.name}, and juicefs does not find it at "
            f"{target.url.endpoint}, where it runs: {problems[-1]}",
            f"correct extra.endpoint_url of {origin}, or `target_endpoint`: both must lead to the same store",
        )
    ]


def _remedy(problem: str, origin: str) -> str:
    if is_about_certificate(problem):
        return _TRUST.format(connection=origin)
    if "AuthorizationHeaderMalformed" in problem or "egion" in problem:
        return (
            f"correct extra.region_name of {origin}; with storage s3 JuiceFS takes the region from Amazon's host names "
            "alone"
        )
    return f"correct the keys, the session token or the endpoint of {origin}; `target_endpoint` is the pods'"


def check_served(cluster: PodAccess, left: StorageConfig, mounts: Sequence[MountPod]) -> list[Finding]:
    """Name the clients that do not reach the store that the volume is on, whoever else does.

    A warning: whether a client can write there is seen by a block that is written through its mount.

    Args:
        cluster: Where the pods are.
        left: The storage that the volume is on.
        mounts: The volume's mount pods.
    """
    url = left.url
    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        answers = pool.map(lambda mount: cannot_reach(cluster, mount.name, MOUNT_CONTAINER, url), mounts)
    return [
        warning(
            "served",
            f"The old store, by the volume's setting: pod {mount.name} cannot use {url.endpoint}: {problem}. What its "
            "client holds and could not write goes to the new store once it follows.",
            "give the pod a way to it (route, firewall, DNS) where Airflow has one: a real run refuses a client that "
            "cannot write. Where Airflow has none either, the run takes the store for moved",
        )
        for mount, problem in zip(mounts, answers, strict=True)
        if problem
    ]


def check_reach(
    clusters: Clusters, target: StorageConfig, mounts: Sequence[MountPod], origin: str, *, controller: bool
) -> list[Finding]:
    """Check that the endpoint can be reached where it will be used, and that its certificate is trusted there.

    A client that cannot build its new storage logs a warning once and stays on the old one.

    Args:
        clusters: Where the pods are.
        target: The storage that the setting will name.
        mounts: The volume's mount pods.
        origin: Where it was configured, for messages.
        controller: Ask the CSI controller of the first cluster too: juicefs runs there.
    """
    check, url = "reach", target.url
    endpoint = url.endpoint
    places = [(mount.name, MOUNT_CONTAINER) for mount in mounts]
    if controller:
        places += [(pod.name, CSI_CONTAINER) for pod in clusters.first.pods(CSI_CONTROLLER_SELECTOR) if pod.ready][:1]
    with ThreadPoolExecutor(_PARALLEL_PODS) as pool:
        answers = list(pool.map(lambda place: cannot_reach(clusters, place[0], place[1], url), places))
    findings = [
        refusal(
            check,
            f"The new store, by {origin}: pod {name} does not trust the certificate of {endpoint}: {problem}.",
            _TRUST.format(connection=origin),
        )
        if is_about_certificate(problem)
        else refusal(
            check,
            f"The new store, by {origin}: pod {name} cannot use {endpoint}: {problem}.",
            kubectl(clusters.namespace, "exec", name, f"-c {container} -- curl -v {endpoint}/")
            + " (route, firewall, DNS, proxy); `target_endpoint` is the endpoint as the pods reach it",
        )
        for (name, container), problem in zip(places, answers, strict=True)
        if problem
    ]
    count = Counter("unasked" if answer is None else "reached" for answer in answers if not answer)
    if count["unasked"]:
        findings.append(
            warning(
                check,
                f"{count['unasked']} of {len(places)} pods could not be asked whether they reach {endpoint} "
                "and trust its certificate: their image has no curl (without TLS bash will do), or the command could "
                "not be run there.",
                "try it from their nodes",
            )
        )
    return findings or [ok(check, f"{endpoint} answers to all {count['reached']} pods that will use it")]

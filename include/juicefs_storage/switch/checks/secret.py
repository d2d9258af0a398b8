"""The Secrets that hold the values: all of them are known, and nothing puts the old ones back or restarts pods."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from include.juicefs_storage.ports import Cluster, SecretObject, WorkloadTemplate
from include.juicefs_storage.switch.findings import Finding, ok, refusal, warning
from include.juicefs_storage.volume.csi import CSI_CONFIG_MAP, CSI_WORKLOADS
from include.juicefs_storage.volume.mount_pods import MountPod, storage_overrides
from include.juicefs_storage.volume.secret import holds_volume, metadata_id, storage_values
from include.juicefs_storage.volume.setting import Setting

CHECK = "secrets"
#: What a Secret's labels and annotations say about who renders it: key, and what is behind it (its value is the name).
_MANAGERS = (
    ("meta.helm.sh/release-name", "Helm release"),
    ("argocd.argoproj.io/instance", "Argo CD application"),
    ("argocd.argoproj.io/tracking-id", "Argo CD application"),
    ("kustomize.toolkit.fluxcd.io/name", "Flux Kustomization"),
    ("helm.toolkit.fluxcd.io/name", "Flux HelmRelease"),
    ("app.kubernetes.io/managed-by", "source"),
)
#: Annotations of Stakater's Reloader and of Wave: with `true` every Secret that the pods use counts.
_ANY_SECRET = (
    "reloader.stakater.com/auto",
    "secret.reloader.stakater.com/auto",
    "reloader.stakater.com/search",
    "wave.pusher.com/update-on-config-change",
)
#: With `false` the workload is left alone, whatever Reloader's own flag says (docs.stakater.com, annotations).
_LEFT_ALONE = "reloader.stakater.com/auto"
_RELOAD_ALL = re.compile(r"--auto-reload-all(=(true|t|1))?", re.IGNORECASE)
_TOKEN_OPTION = re.compile(r"(?:^|,)\s*session-token\s*=")
#: The value names the Secrets that count, separated by commas.
_NAMED_SECRETS = ("secret.reloader.stakater.com/reload", "wave.pusher.com/extra-secrets")


def check_secrets(
    cluster: Cluster, setting: Setting, secrets: Sequence[SecretObject], mounts: Sequence[MountPod]
) -> list[Finding]:
    """Check that every Secret with the volume's values is known, and find what else reacts to a change of one.

    Args:
        cluster: Where PVs, workloads and other namespaces' Secrets are looked up.
        setting: The setting as it is now.
        secrets: The Secrets that the run patches; the first is the one that the params name.
        mounts: The volume's mount pods.
    """
    templates = cluster.workload_templates()
    findings = [
        *_other_values(secrets[0], setting),
        *(finding for secret in secrets for finding in _managed(secret)),
        *(finding for secret in secrets for finding in _immutable(secret)),
        *_elsewhere(cluster, secrets, mounts),
        *_on_another_host(cluster, secrets),
        *_next_volumes(cluster, secrets),
        *(finding for template in templates for finding in _restarted(template, secrets)),
        *_restarted_by_default(cluster, templates, secrets),
    ]
    names = ", ".join(f"{secret.namespace}/{secret.name}" for secret in secrets)
    if any(finding.level == "refusal" for finding in findings):
        return findings
    return [*findings, ok(CHECK, f"{len(secrets)} hold the volume's values: {names}")]


def _other_values(secret: SecretObject, setting: Setting) -> Iterator[Finding]:
    name = f"Secret {secret.namespace}/{secret.name}"
    found = {key: secret.data[key] for key in ("storage", "bucket") if secret.data.get(key)}
    expected = {"storage": setting.storage, "bucket": setting.bucket}
    if any(expected[key] != (value.lower() if key == "storage" else value) for key, value in found.items()):
        yield warning(
            CHECK,
            f"{name} says {' '.join(found.values())}, the setting {setting.storage} {setting.bucket}.",
            "a starting mount pod writes the Secret's values into the setting; the switch makes both agree",
        )
    if options := storage_overrides(secret.data.get("format-options", "")):
        yield refusal(
            CHECK,
            f"{name} has format-options {', '.join(options)}: a starting mount pod writes them into the setting, "
            "whatever the other keys say.",
            "remove bucket and storage from its format-options",
        )
    if {"storage", "bucket"} <= found.keys() and _TOKEN_OPTION.search(secret.data.get("format-options", "")):
        yield refusal(
            CHECK,
            f"{name} has a session-token in its format-options: the driver passes it as a variable that no shell can "
            "read, and a starting mount pod writes the word `token` into the setting.",
            "remove session-token from its format-options: `format` then keeps the token in the setting",
        )


def _managed(secret: SecretObject) -> Iterator[Finding]:
    marks = {**secret.labels, **secret.annotations}
    sources: dict[str, str] = {}
    for key, kind in _MANAGERS:
        if (value := marks.get(key)) and (kind != "source" or not sources):
            sources[kind] = f"{kind} {value.split(':', 1)[0]}"
    # The driver's copies belong to their PV, for the garbage collector: it puts nothing back.
    sources |= {owner: owner for owner in secret.owners if not owner.startswith("PersistentVolume/")}
    if sources:
        yield warning(
            CHECK,
            f"Secret {secret.namespace}/{secret.name} is managed by {', '.join(sources.values())}, which puts the old "
            "values back when it syncs next.",
            "change the values there as well, or suspend it, before the switch; then a sync changes nothing",
        )


def _immutable(secret: SecretObject) -> Iterator[Finding]:
    if secret.immutable and storage_values(secret.data):
        yield refusal(
            CHECK,
            f"Secret {secret.namespace}/{secret.name} is immutable and holds values of the storage, which the switch "
            "must change.",
            "replace it by one that is not immutable, or leave storage and bucket with their keys out of it",
        )


def _elsewhere(cluster: Cluster, secrets: Sequence[SecretObject], mounts: Sequence[MountPod]) -> Iterator[Finding]:
    known = {(secret.namespace, secret.name) for secret in secrets}
    served = {mount.volume_id for mount in mounts}
    remedy = "patch it by hand right after write_setting, or remove its keys storage and bucket before the switch"
    for volume in cluster.persistent_volumes():
        reference = (volume.secret_namespace, volume.secret_name)
        if volume.volume_handle in served and all(reference) and reference not in known:
            known.add(reference)
            yield warning(
                CHECK,
                f"PersistentVolume {volume.name} mounts this volume with Secret {'/'.join(reference)}, which this run "
                "does not patch: the next mount pod writes its values into the setting.",
                remedy,
            )
    for secret in cluster.secrets_everywhere() or ():
        if (secret.namespace, secret.name) not in known and holds_volume(secret, secrets[0]):
            yield warning(
                CHECK,
                f"Secret {secret.namespace}/{secret.name} names the same metadata and volume, and is in another "
                "namespace: this run does not patch it.",
                remedy,
            )


def _on_another_host(cluster: Cluster, secrets: Sequence[SecretObject]) -> Iterator[Finding]:
    """Name Secrets that differ in the database's host name alone: both may be one server. They are left alone."""
    known, main = {secret.name for secret in secrets}, secrets[0]
    own = metadata_id(main, cluster.namespace)
    for secret in cluster.secrets():
        found = metadata_id(secret, cluster.namespace)
        if not own or not found or secret.name in known or secret.data.get("name") != main.data.get("name"):
            continue
        if (found.database, found.table_prefix) == (own.database, own.table_prefix):
            yield warning(
                CHECK,
                f"Secret {secret.namespace}/{secret.name} names volume {main.data.get('name')} in a database of the "
                f"same name at another address ({found.host}:{found.port}, not "
                f"{own.host}:{own.port}): this run does not patch it.",
                "if both are one server, write its metaurl as in the volume's Secret",
            )


def _next_volumes(cluster: Cluster, secrets: Sequence[SecretObject]) -> Iterator[Finding]:
    """Name classes and driver settings with a bucket of their own: a volume that is mounted later keeps it."""
    known = {(secret.namespace, secret.name) for secret in secrets}
    for storage_class in cluster.storage_classes():
        options = storage_overrides(",".join(storage_class.mount_options))
        if options and (storage_class.secret_namespace, storage_class.secret_name) in known:
            yield warning(
                CHECK,
                f"StorageClass {storage_class.name} has mountOptions {', '.join(options)}: volumes that it provisions "
                "from now on do not follow the setting.",
                "remove bucket and storage from its mountOptions",
            )
    if options := storage_overrides(",".join(cluster.driver_mount_options())):
        yield warning(
            CHECK,
            f"ConfigMap {cluster.namespace}/{CSI_CONFIG_MAP} has mountOptions {', '.join(options)}: where they are for "
            "this volume, mount pods that start from now on do not follow the setting.",
            "remove bucket and storage from the mountOptions there",
        )


def _restarted(template: WorkloadTemplate, secrets: Sequence[SecretObject]) -> Iterator[Finding]:
    names = {secret.name for secret in secrets}
    for key, value in template.annotations.items():
        if key in _NAMED_SECRETS:
            hit = names & {re.sub(r"^.*/", "", name.strip()) for name in value.split(",")}
        elif key in _ANY_SECRET and value.lower() == "true":
            hit = names & template.secrets
        else:
            continue
        if not hit:
            continue
        message = f"{template.kind}/{template.name} is annotated {key}={value}"
        yield _restart(template, hit, message, "remove the annotation for the time of the switch")


def _restarted_by_default(
    cluster: Cluster, templates: Sequence[WorkloadTemplate], secrets: Sequence[SecretObject]
) -> Iterator[Finding]:
    """Find a Reloader that needs no annotation; in another namespace where its Deployment may be listed."""
    reloader = next(
        (
            deployment
            for deployment in cluster.deployments_everywhere() or templates
            if any(_RELOAD_ALL.fullmatch(arg) for arg in deployment.args)
        ),
        None,
    )
    names = {secret.name for secret in secrets}
    for template in templates:
        hit = names & template.secrets
        if reloader and hit and template.annotations.get(_LEFT_ALONE, "").lower() not in {"true", "false"}:
            message = (
                f"{template.kind}/{template.name} is watched by {reloader.kind} {reloader.namespace}/{reloader.name} "
                "(--auto-reload-all)"
            )
            yield _restart(template, hit, message, f"annotate it {_LEFT_ALONE}=false for the time of the switch")


def _restart(template: WorkloadTemplate, names: set[str], why: str, remedy: str) -> Finding:
    message = f"{why}: it restarts when Secret {', '.join(sorted(names))} changes."
    if (template.kind, template.name) in CSI_WORKLOADS:
        return warning(CHECK, message, "it is restarted by the run anyway; mounts do not notice")
    return refusal(CHECK, message, f"{remedy}, or plan for the restart")

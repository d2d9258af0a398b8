"""What is refused, and warned of, about the Secrets that hold the volume's values."""
# ruff: noqa: TID253  a test may import its client at once

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client

from include.juicefs_storage.adapters.kubernetes import KubernetesCluster
from include.juicefs_storage.switch.findings import Finding
from lab.environment import Lab
from tests.support.refusals import APPS, NS, SECRET, Look, refusals, warnings


def found_all(findings: list[Finding]) -> str:
    """Which Secrets hold the volume's values, as the check says where all is well."""
    (found,) = (finding.message for finding in findings if (finding.check, finding.level) == ("secrets", "ok"))
    return found


@contextlib.contextmanager
def marked(core: client.CoreV1Api, **metadata: Any) -> Iterator[None]:
    core.patch_namespaced_secret(SECRET, NS, {"metadata": metadata})
    try:
        yield
    finally:
        gone = {kind: dict.fromkeys(marks) if isinstance(marks, dict) else None for kind, marks in metadata.items()}
        core.patch_namespaced_secret(SECRET, NS, {"metadata": gone})


@pytest.mark.parametrize(
    ("metadata", "source"),
    [
        (
            {
                "labels": {"app.kubernetes.io/managed-by": "Helm"},
                "annotations": {"meta.helm.sh/release-name": "juicefs-csi"},
            },
            "Helm release juicefs-csi",
        ),
        (
            {"annotations": {"argocd.argoproj.io/tracking-id": "storage:/Secret:juicefs/juicefs-sc-secret"}},
            "Argo CD application storage",
        ),
        ({"labels": {"kustomize.toolkit.fluxcd.io/name": "infra"}}, "Flux Kustomization infra"),
        ({"labels": {"app.kubernetes.io/managed-by": "our-tool"}}, "source our-tool"),
        (
            {
                "ownerReferences": [
                    {
                        "apiVersion": "external-secrets.io/v1",
                        "kind": "ExternalSecret",
                        "name": "storage",
                        "uid": "1",
                        "controller": True,
                    }
                ]
            },
            "ExternalSecret/storage",
        ),
    ],
)
def test_a_secret_that_something_renders_is_a_warning(
    core: client.CoreV1Api, look: Look, metadata: Any, source: str
) -> None:
    with marked(core, **metadata):
        findings = look("check_secrets")
    assert refusals(findings) == []
    (warned,) = warnings(findings)
    assert f"is managed by {source}, which puts the old values back" in warned


def test_an_immutable_secret(core: client.CoreV1Api, look: Look) -> None:
    with another_secret(core, NS, immutable=True):
        (refused,) = refusals(look("check_secrets"))
    assert f"Secret {NS}/another is immutable" in refused


def test_a_secret_that_its_pv_owns_is_managed_by_nobody(core: client.CoreV1Api, look: Look) -> None:
    """The driver makes its copies so; the owner reference shows a controller such as External Secrets."""
    owned = {"apiVersion": "v1", "kind": "PersistentVolume", "name": "pv", "uid": "1"}
    rendered: dict[str, object] = {
        "apiVersion": "external-secrets.io/v1",
        "kind": "ExternalSecret",
        "name": "jfs",
        "uid": "2",
    }
    rendered |= {"controller": True}
    with another_secret(core, NS, metadata={"ownerReferences": [owned]}):
        assert warnings(look("check_secrets")) == []
    with another_secret(core, NS, metadata={"ownerReferences": [owned, rendered]}):
        (warned,) = warnings(look("check_secrets"))
    assert "is managed by ExternalSecret/jfs, which" in warned


@contextlib.contextmanager
def deployment(
    apps: client.AppsV1Api,
    annotations: dict[str, str],
    *,
    uses: bool,
    name: str = "dashboard",
    namespace: str = NS,
    args: tuple[str, ...] = (),
) -> Iterator[None]:
    container: dict[str, Any] = {"name": "app", "image": "busybox", "args": list(args)}
    if uses:
        container["envFrom"] = [{"secretRef": {"name": SECRET}}]
    template = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container]}}
    spec = {"selector": {"matchLabels": {"app": name}}, "template": template}
    body = {"metadata": {"name": name, "annotations": annotations}, "spec": spec}
    apps.create_namespaced_deployment(namespace, body)
    try:
        yield
    finally:
        apps.delete_namespaced_deployment(name, namespace)


@pytest.mark.parametrize(
    ("annotations", "uses", "hit"),
    [
        ({"reloader.stakater.com/auto": "true"}, True, True),
        ({"reloader.stakater.com/auto": "true"}, False, False),
        ({"reloader.stakater.com/auto": "false"}, True, False),
        ({"secret.reloader.stakater.com/reload": f"other, {SECRET}"}, False, True),
        ({"secret.reloader.stakater.com/reload": "other"}, True, False),
        ({"wave.pusher.com/update-on-config-change": "true"}, True, True),
    ],
)
def test_a_workload_that_a_patch_would_restart(
    apps: client.AppsV1Api, look: Look, annotations: dict[str, str], uses: bool, hit: bool
) -> None:
    with deployment(apps, annotations, uses=uses):
        refused = refusals(look("check_secrets"))
    assert len(refused) == (1 if hit else 0)
    if hit:
        assert "Deployment/dashboard is annotated" in refused[0]
        assert SECRET in refused[0]


@pytest.mark.parametrize("namespace", [NS, "kube-system"])
@pytest.mark.parametrize(
    ("flag", "annotations", "uses", "hit"),
    [
        ("--auto-reload-all=true", {}, True, True),
        ("--auto-reload-all", {}, True, True),
        ("--auto-reload-all=true", {}, False, False),
        ("--auto-reload-all=true", {"reloader.stakater.com/auto": "false"}, True, False),
        ("--auto-reload-all=false", {}, True, False),
    ],
)
def test_a_reloader_that_asks_for_no_annotation(
    apps: client.AppsV1Api, look: Look, namespace: str, flag: str, annotations: dict[str, str], uses: bool, hit: bool
) -> None:
    with (
        deployment(apps, {}, uses=False, name="reloader", namespace=namespace, args=("--log-format=json", flag)),
        deployment(apps, annotations, uses=uses),
    ):
        refused = refusals(look("check_secrets"))
    assert len(refused) == (1 if hit else 0)
    if hit:
        assert f"Deployment/dashboard is watched by Deployment {namespace}/reloader (--auto-reload-all)" in refused[0]
        assert "reloader.stakater.com/auto=false" in refused[0]


@contextlib.contextmanager
def another_secret(
    core: client.CoreV1Api,
    namespace: str,
    *,
    immutable: bool = False,
    metadata: dict[str, Any] | None = None,
    **changes: str,
) -> Iterator[None]:
    data = dict(core.read_namespaced_secret(SECRET, NS).data)
    data |= {key: base64.b64encode(value.encode()).decode() for key, value in changes.items()}
    body = {"metadata": {"name": "another", **(metadata or {})}, "data": data, "immutable": immutable}
    core.create_namespaced_secret(namespace, body)
    try:
        yield
    finally:
        core.delete_namespaced_secret("another", namespace)


def test_another_secret_of_the_volume_in_the_namespace_is_patched(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    other_password = f"mysql://other:pw@tcp({lab.mariadb.host}:{lab.mariadb.port})/{lab.mariadb.database}?x=1"
    with another_secret(core, NS, metaurl=other_password):
        findings = look("check_secrets")
        assert (refusals(findings), warnings(findings)) == ([], [])
        assert f"{NS}/another" in found_all(findings)
    assert f"{NS}/another" not in found_all(look("check_secrets"))


@pytest.mark.parametrize("changes", [{"name": "another"}, {"metaurl": "{url}?table_prefix=stag"}])
def test_the_secret_of_another_volume_is_left_alone(
    lab: Lab, core: client.CoreV1Api, look: Look, changes: dict[str, str]
) -> None:
    values: dict[str, Any] = {
        key: value.format(url=lab.mariadb.meta_url_with_password) for key, value in changes.items()
    }
    with another_secret(core, NS, **values):
        findings = look("check_secrets")
        assert warnings(findings) == []
        assert "another" not in findings[-1].message


def test_a_secret_whose_host_may_be_another_name_of_the_same_database_is_a_warning(
    core: client.CoreV1Api, look: Look
) -> None:
    with another_secret(core, NS, metaurl="mysql://jfs:x@(database.example:1)/jfs"):
        findings = look("check_secrets")
        assert "another names volume myjfs in a database of the same name at another address" in warnings(findings)[0]
        assert "another" not in findings[-1].message


def test_a_secret_of_the_volume_in_another_namespace_is_a_warning(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    with another_secret(core, APPS):
        (warned,) = warnings(look("check_secrets"))
        assert f"Secret {APPS}/another names the same metadata" in warned


def test_other_namespaces_that_may_not_be_read_are_left_out(lab: Lab, core: client.CoreV1Api, look: Look) -> None:
    """Nothing but the list of all Secrets is refused by deploy/rbac.yaml; the lab knows no namespaces in its faults."""
    with another_secret(core, APPS):
        lab.kube.order_fault({"deny": {"verb": "list", "resource": "secrets"}})
        try:
            assert KubernetesCluster(core.api_client, NS).secrets_everywhere() is None
        finally:
            lab.kube.clear_faults()


def test_a_persistent_volume_with_a_secret_elsewhere_is_a_warning(core: client.CoreV1Api, look: Look) -> None:
    """Found without the right to list Secrets of other namespaces."""
    claim = core.read_namespaced_persistent_volume_claim("data", APPS)
    name, path = claim.spec.volume_name, "/spec/csi/nodePublishSecretRef/namespace"
    core.patch_persistent_volume(name, [{"op": "replace", "path": path, "value": APPS}])
    try:
        (warned,) = warnings(look("check_secrets"))
    finally:
        core.patch_persistent_volume(name, [{"op": "replace", "path": path, "value": NS}])
    assert f"PersistentVolume {name} mounts this volume with Secret {APPS}/{SECRET}" in warned


def test_format_options_with_a_bucket(core: client.CoreV1Api, look: Look) -> None:
    value = base64.b64encode(b"trash-days=1,bucket=http://elsewhere/b").decode()
    core.patch_namespaced_secret(SECRET, NS, {"data": {"format-options": value}})
    try:
        (refused,) = refusals(look("check_secrets"))
    finally:
        core.patch_namespaced_secret(SECRET, NS, {"data": {"format-options": None}})
    assert "format-options bucket=http://elsewhere/b" in refused


def test_format_options_with_a_session_token(core: client.CoreV1Api, look: Look) -> None:
    value = base64.b64encode(b"trash-days=1, session-token=abc").decode()
    core.patch_namespaced_secret(SECRET, NS, {"data": {"format-options": value}})
    try:
        (refused,) = refusals(look("check_secrets"))
    finally:
        core.patch_namespaced_secret(SECRET, NS, {"data": {"format-options": None}})
    assert "session-token in its format-options" in refused
    assert "abc" not in refused


def test_a_secret_that_says_something_else_than_the_setting_is_a_warning(core: client.CoreV1Api, look: Look) -> None:
    before = core.read_namespaced_secret(SECRET, NS).data["bucket"]
    value = base64.b64encode(b"http://elsewhere/b").decode()
    core.patch_namespaced_secret(SECRET, NS, {"data": {"bucket": value}})
    try:
        (warned,) = warnings(look("check_secrets"))
    finally:
        core.patch_namespaced_secret(SECRET, NS, {"data": {"bucket": before}})
    assert "http://elsewhere/b" in warned


def test_a_door_that_is_ajar_is_a_warning_and_refused_where_that_is_asked_for(look: Look) -> None:
    """Other keys on the new store: a restart writes nothing back, but the old store still takes the old key."""

    def door(**params: object) -> Finding:
        (found,) = (finding for finding in look("check_secrets", **params) if finding.check == "door")
        return found

    warned, refused = door(), door(require_closed_door=True)
    assert (warned.level, refused.level) == ("warning", "refusal")
    assert warned.message == refused.message
    assert "takes the old key" in warned.message
    assert "writes nothing back" in warned.message

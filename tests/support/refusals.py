"""What the tests of refusals share: names in the lab, a connection, and what the checks found."""

from __future__ import annotations

from collections.abc import Callable

from include.juicefs_storage.switch.findings import Finding
from lab.environment import Lab

NS, APPS, SECRET = "juicefs", "apps", "juicefs-sc-secret"
MOUNT_PODS = "app.kubernetes.io/name=juicefs-mount"
UUID_KEY = "myjfs/juicefs_uuid"
Look = Callable[..., list[Finding]]


def new_store(lab: Lab, *, secret_key: str = "", endpoint_url: str = "") -> dict[str, object]:
    return {
        "conn_type": "aws",
        "login": lab.new_store.access_key,
        "password": secret_key or lab.new_store.secret_key,
        "extra": {
            "endpoint_url": endpoint_url or lab.new_store.endpoint_url,
            "region_name": "us-east-1",
            "config_kwargs": {"s3": {"addressing_style": "path"}, "retries": {"total_max_attempts": 1}},
        },
    }


def of_level(level: str, findings: list[Finding]) -> list[str]:
    assert all(finding.remedy for finding in findings if finding.level != "ok")
    return [f"{finding.message} | {finding.remedy}" for finding in findings if finding.level == level]


def refusals(findings: list[Finding]) -> list[str]:
    return of_level("refusal", findings)


def warnings(findings: list[Finding]) -> list[str]:
    """Without the door: in a lab the old store takes the old key, of which every plan warns."""
    return of_level("warning", [finding for finding in findings if finding.check != "door"])

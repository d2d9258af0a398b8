"""The volumes of a fleet: found once each, and distinguished."""

from __future__ import annotations

import pytest

from include.juicefs_storage.fleet.members import Member, on_endpoint, unique_keys, volumes_by_secret
from include.juicefs_storage.names import volume_run_id
from include.juicefs_storage.ports import SecretObject


def secret(name: str, volume: str, database: str, *, namespace: str = "juicefs", **more: str) -> SecretObject:
    data = {"name": volume, "metaurl": f"mysql://u:p@(db:3306)/{database}"} | more
    return SecretObject(namespace, name, "1", data={key: value for key, value in data.items() if value})


def test_one_volume_for_all_secrets_that_name_it_and_the_drivers_namespace_first() -> None:
    copies = SecretObject(
        "juicefs", "juicefs-pvc-secret", "1", {"juicefs/secret": "true"},
        data={"name": "home", "metaurl": "mysql://u:p@(db:3306)/home"},
    )  # fmt: skip
    found = volumes_by_secret(
        [
            secret("a-copy", "home", "home", namespace="apps", bucket="http://old:9000/data"),
            copies,
            secret("no-bucket", "home", "home"),
            secret("main", "home", "home", bucket="http://old:9000/data"),
            secret("same-name", "home", "other"),
            secret("elsewhere", "work", "work", namespace="apps"),
            secret("no-metadata", "x", "x", metaurl=""),
        ],
        "juicefs",
    )
    assert [(found.namespace, found.name, here) for found, here in found] == [
        ("juicefs", "main", True), ("juicefs", "same-name", True), ("apps", "elsewhere", False),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("http://Old:80/", "http://old", True),
        ("https://old:443", "https://old", True),
        ("http://old:9000", "http://old:9001", False),
        ("http://old:9000", "https://old:9000", False),
    ],
)
def test_an_endpoint_is_known_however_it_is_written(one: str, other: str, same: bool) -> None:
    assert on_endpoint(one, other) is same


def test_volumes_of_one_name_are_distinguished() -> None:
    members = [
        Member(key="home", secret="s", uuid="11112222-3"),
        Member(key="work", secret="s", uuid="x"),
        Member(key="home", secret="s", uuid="33334444-5"),
    ]
    assert [each.key for each in unique_keys(members)] == ["home-11112222", "work", "home-33334444"]


def test_a_run_of_a_volume_asks_for_no_approval_and_has_an_id_of_its_own() -> None:
    conf = Member(key="home", secret="juicefs/home", params={"target_bucket": "data"}).conf(
        dry_run=False, restart_csi=False
    )
    assert conf == {"target_bucket": "data", "dry_run": False, "require_approval": False, "restart_csi": False}
    assert volume_run_id("manual__1", "home") == "manual__1.home"
    assert volume_run_id("manual__1", "home", dry_run=True) == "manual__1.home.plan"

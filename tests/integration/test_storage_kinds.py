"""Moves between kinds of storage, to and from a store with a certificate that nobody trusts and temporary keys."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from include.juicefs_storage.volume.setting import Setting
from lab.environment import Lab
from lab.kube.tls import server_context
from lab.process import wait_for
from tests.support.faults import StuckClient
from tests.support.harness import REVERT_ID, SHORT, Run
from tests.support.s3_proxy import S3Proxy
from tests.support.worker import Fault
from tests.support.world import assert_all_on, assert_nothing_left_over, assert_nothing_lost, row, writing

TOKEN = "FwoGZXIvYXdzEJr//////////wEaDtoken+of/the+lab=="


@pytest.fixture
def front(lab: Lab, tmp_path: Path) -> Iterator[S3Proxy]:
    """The new store, as one that speaks TLS and takes temporary keys alone."""
    keys = lab.new_store.access_key, lab.new_store.secret_key
    with S3Proxy(lab.new_store.endpoint_url, tls=server_context(tmp_path), keys=keys) as proxy:
        proxy.token = TOKEN
        yield proxy


def there(lab: Lab, front: S3Proxy, folder: Path, *faults: Fault, verify: bool | str = False, **params: Any) -> Run:
    """A run to the new store behind the proxy, as kind s3."""
    target = {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket, "target_storage": "s3"}
    made = Run(lab, folder, f"kinds-{folder.name}", SHORT | target | params, faults)
    extra = {"endpoint_url": front.url, "verify": verify, "aws_session_token": TOKEN}
    made.environment["AIRFLOW_CONN_MINIO_NEW"] = json.dumps(
        {"conn_type": "aws", "login": lab.new_store.access_key, "password": lab.new_store.secret_key, "extra": extra}
    )
    return made


def in_secrets(lab: Lab) -> list[dict[str, str]]:
    found = json.loads(lab.kubectl("get", "secret", "-n", "juicefs", "-o", "json"))["items"]
    return sorted((secret.get("data") or {} for secret in found), key=str)


@pytest.mark.timeout(600)
def test_an_authority_that_pods_do_not_trust_is_refused_in_the_dry_run(
    lab: Lab, front: S3Proxy, tmp_path: Path
) -> None:
    before = row(lab)
    made = there(lab, front, tmp_path / "own", verify=str(tmp_path / "ca.crt"), dry_run=True)
    made.go()
    assert made.states["check_target_bucket"] == "failed"
    error = made.errors["check_target_bucket"]
    assert "The new store, by connection 'minio_new': pod juicefs-" in error
    assert f"does not trust the certificate of {front.url}" in error
    assert "extra.verify=false in connection 'minio_new'" in error
    assert row(lab) == before
    assert not any("probe" in key for key in lab.new_store.objects())


def breaks(lab: Lab, front: S3Proxy, what: str) -> tuple[list[Fault], dict[str, Callable[[], object]]]:
    """What goes wrong after the cut-over: faults of tasks, and what is done before tasks."""
    if what == "a client is stuck":
        stuck = StuckClient.first(lab)
        return [], {"write_setting": stuck.stick, "collect_diagnostics": stuck.release}
    if what == "the new token is refused for some time":

        def take(token: str) -> Callable[[], None]:
            return lambda: setattr(front, "token", token)

        return [], {"prove_blocks": take("another"), "decide": take(TOKEN)}
    return [Fault("prove_blocks", "after", error="ordered", tries=9)], {}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "what",
    [
        "a proof fails",
        pytest.param("a client is stuck", marks=pytest.mark.slow),
        pytest.param("the new token is refused for some time", marks=pytest.mark.slow),
    ],
)
def test_a_failure_after_the_cut_over_brings_back_kind_bucket_and_no_token(
    lab: Lab, front: S3Proxy, tmp_path: Path, what: str
) -> None:
    lab.seed(5)
    lab.copy_to_new_store()
    before, secrets = row(lab), in_secrets(lab)
    faults, done = breaks(lab, front, what)
    with writing(lab, f"insecure {what}") as writer:
        made = there(lab, front, tmp_path / what.replace(" ", "-"), *faults)
        made.before = done
        assert made.go() == "rolled back", made.errors
        acknowledged = writer.summary().written
        wait_for("the writer continues", lambda: writer.summary().written > acknowledged + 3, deadline_s=60)
    assert row(lab) == before
    assert in_secrets(lab) == secrets
    assert writer.summary().write_errors == []
    assert_all_on(lab, lab.old_store)
    assert_nothing_left_over(lab)
    assert_nothing_lost(lab, writer)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_there_and_back_by_the_setting_alone(lab: Lab, front: S3Proxy, tmp_path: Path) -> None:
    """The way back is a switch whose old store is known by the setting: kind, TLS and token stand there."""
    lab.seed(5)
    lab.copy_to_new_store()
    with writing(lab, "there") as writer:
        made = there(lab, front, tmp_path / "there")
        assert made.go() == "switched", made.errors
        moved = Setting(row(lab))
        assert moved.storage == "s3"
        assert moved.bucket == f"{front.url}/{lab.new_store.bucket}?tls-insecure-skip-verify=true"
        assert moved.config.session_token.get_secret_value() == TOKEN
        assert TOKEN.encode() not in moved.raw
        plan = made.xcom("plan", "markdown")
        assert "| storage | `minio` | `s3` |" in plan
        assert "tls-insecure-skip-verify=true" in plan
        told = "".join(file.read_text() for file in made.folder.rglob("*.json"))
        assert TOKEN not in told

        back = {"target_conn_id": "minio_old", "target_bucket": lab.old_store.bucket, "target_storage": "minio"}
        broken = Run(
            lab,
            tmp_path / "stay",
            "kinds-stay",
            SHORT | back,
            [Fault("prove_blocks", "after", error="ordered", tries=9)],
        )
        assert broken.go() == "rolled back", broken.errors
        assert row(lab) == moved.raw

        made = Run(lab, tmp_path / "again", "kinds-again", SHORT | back)
        assert made.go() == "switched", made.errors
    returned = Setting(row(lab))
    assert (returned.storage, returned.bucket) == ("minio", lab.old_store.bucket_url)
    assert returned.config.session_token.get_secret_value() == ""
    assert writer.summary().write_errors == []
    assert_all_on(lab, lab.old_store)
    assert_nothing_lost(lab, writer)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_revert_goes_back_to_the_kind_and_the_keys_of_the_backup(lab: Lab, front: S3Proxy, tmp_path: Path) -> None:
    lab.seed(5)
    lab.copy_to_new_store()
    before = row(lab)
    with writing(lab, "reverted kind") as writer:
        made = there(lab, front, tmp_path / "moved")
        assert made.go() == "switched", made.errors
        params = {
            "backup_id": made.xcom("finalize", "report")["backup_id"], "dry_run": False, "require_approval": False,
        }  # fmt: skip
        back = Run(lab, tmp_path / "reverted", "kinds-reverted", params, dag_id=REVERT_ID)
        back.environment = made.environment
        back.states["choose_backup"] = "success"  # there is nothing to choose
        assert back.go() == "reverted", back.errors
    assert row(lab) == before
    assert writer.summary().write_errors == []
    assert_all_on(lab, lab.old_store)
    assert_nothing_lost(lab, writer)

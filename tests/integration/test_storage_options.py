"""Certificates, regions, tokens and IPv6 by the real juicefs: what it tries of a storage, and what a dry run says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import SecretStr

from include.juicefs_storage.adapters.juicefs_command import JuiceFSCommand, on_worker
from include.juicefs_storage.adapters.s3 import bucket
from include.juicefs_storage.adapters.s3.bucket import S3Bucket
from include.juicefs_storage.adapters.s3.store import LOOK
from include.juicefs_storage.errors import PermanentError, UnreachableError
from include.juicefs_storage.ports import NO_ANSWER
from include.juicefs_storage.switch.checks.target import check_use
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.reach import is_about_certificate
from include.juicefs_storage.volume.setting import StorageConfig
from lab.kube.tls import server_context
from lab.process import binary
from tests.support.s3_memory import MemoryStore
from tests.support.s3_proxy import Fault, S3Proxy

KEYS = SecretStr("AK"), SecretStr("secret-of-the-test")
SKIP = "?tls-insecure-skip-verify=true"


@pytest.fixture
def juicefs(monkeypatch: pytest.MonkeyPatch) -> JuiceFSCommand:
    monkeypatch.setenv("PATH", f"{Path(binary('juicefs')).parent}:/usr/bin:/bin")
    return on_worker(Metaurl.parse("mysql://u:p@(127.0.0.1:1)/none"))


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    with MemoryStore("data") as store:
        yield store


@pytest.fixture
def proxy(store: MemoryStore, tmp_path: Path) -> Iterator[S3Proxy]:
    with S3Proxy(store.url, tls=server_context(tmp_path)) as proxy:
        yield proxy


@pytest.mark.parametrize("storage", ["minio", "s3"])
def test_a_certificate_that_juicefs_does_not_trust(juicefs: JuiceFSCommand, proxy: S3Proxy, storage: str) -> None:
    target = StorageConfig(storage, f"{proxy.url}/data", *KEYS)
    problem = juicefs.try_storage(target)
    assert problem
    assert is_about_certificate(problem)
    (finding,) = check_use(juicefs, target, "connection 'minio_new'")
    assert finding.level == "refusal"
    assert "new store, by connection 'minio_new': juicefs does not trust its certificate" in finding.message
    with pytest.raises(
        PermanentError, match=r"The old store, by the volume's setting, .*certificate is not trusted"
    ) as error:
        S3Bucket.from_storage(target).on_side("old store").check()
    assert "set extra.verify of a connection that is given to the run in `source_conn_id`" in error.value.next_step


@pytest.mark.parametrize("storage", ["minio", "s3"])
def test_a_bucket_that_says_that_no_certificate_counts(
    juicefs: JuiceFSCommand, proxy: S3Proxy, store: MemoryStore, storage: str
) -> None:
    target = StorageConfig(storage, f"{proxy.url}/data{SKIP}", *KEYS)
    assert juicefs.try_storage(target) == ""
    assert store.bodies("data") == {}, "nothing is written in a dry run"
    writes = store.requests["PUT"]
    assert juicefs.try_storage(target, "myjfs") == ""
    assert store.requests["PUT"] > writes
    assert store.bodies("data") == {}, "what was written is removed"
    S3Bucket.from_storage(target).check()


def test_an_authority_that_the_place_of_juicefs_trusts(
    juicefs: JuiceFSCommand, proxy: S3Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    assert juicefs.try_storage(StorageConfig("minio", f"{proxy.url}/data", *KEYS)) == ""


@pytest.mark.parametrize("storage", ["minio", "s3"])
def test_a_store_that_wants_a_session_token(
    juicefs: JuiceFSCommand, proxy: S3Proxy, storage: str, store: MemoryStore
) -> None:
    proxy.token = "FwoGZXIvYXdzEJr//////////token+with/signs=="
    without = StorageConfig(storage, f"{proxy.url}/data{SKIP}", *KEYS)
    problem = juicefs.try_storage(without)
    assert problem
    assert "InvalidToken" in problem
    with_token = replace(without, session_token=SecretStr(proxy.token))
    assert juicefs.try_storage(with_token, "myjfs") == ""
    S3Bucket.from_storage(with_token).check()


def test_a_block_is_read_and_written_with_a_session_token(
    juicefs: JuiceFSCommand, proxy: S3Proxy, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    proxy.token = "FwoGZXIvYXdzEJr//////////token+with/signs=="
    store.put("data", "myjfs/chunks/0/0/1_0_5", b"block")
    keys = *KEYS, SecretStr(proxy.token)
    config = StorageConfig("minio", f"{proxy.url}/data", *keys)
    assert juicefs.probe_storage(config, ["myjfs/chunks/0/0/1_0_5"], "myjfs/probe") == ""
    assert "none of 1 blocks" in juicefs.probe_storage(config, ["myjfs/chunks/0/0/2_0_5"], None)
    assert set(store.bodies("data")) == {"myjfs/chunks/0/0/1_0_5"}


def test_a_store_at_an_ipv6_address(juicefs: JuiceFSCommand, store: MemoryStore) -> None:
    with S3Proxy(store.url, host="::1") as proxy:
        for storage in ("minio", "s3"):
            config = StorageConfig(storage, f"{proxy.url}/data", *KEYS)
            assert juicefs.try_storage(config, "myjfs") == ""
            S3Bucket.from_storage(config).check()


def test_a_bucket_that_is_not_there_is_never_made(juicefs: JuiceFSCommand, store: MemoryStore) -> None:
    problem = juicefs.try_storage(StorageConfig("minio", f"{store.url}/typo", *KEYS), "myjfs")
    assert problem
    assert "NoSuchBucket" in problem
    assert set(store.buckets) == {"data"}


def test_no_key_is_shown(juicefs: JuiceFSCommand, proxy: S3Proxy) -> None:
    proxy.refusal = (403, "InvalidAccessKeyId")
    keys = SecretStr("ACCESSKEYOFTHETEST"), KEYS[1], SecretStr("token-of-the-test")
    problem = juicefs.try_storage(StorageConfig("minio", f"{proxy.url}/data{SKIP}", *keys)) or ""
    assert "InvalidAccessKeyId" in problem
    assert not any(key.get_secret_value() in problem for key in keys)


def test_a_store_that_takes_connections_and_is_silent(
    juicefs: JuiceFSCommand, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket, "LOOK", replace(LOOK, idle_s=0.3))
    with S3Proxy(store.url) as proxy:
        config = StorageConfig("minio", f"{proxy.url}/data", *KEYS)
        proxy.refusal = (403, "AccessDenied")
        S3Bucket.from_storage(config).ping()  # an answer
        proxy.refusal, proxy.faults = None, [Fault.HANG]
        with pytest.raises(UnreachableError):
            S3Bucket.from_storage(config).ping()
        assert (juicefs.try_storage(config, timeout_s=2) or "").startswith(f"{NO_ANSWER} within 2 s")

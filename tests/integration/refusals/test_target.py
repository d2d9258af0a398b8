"""What is refused of the new store: bucket, keys, endpoint, and what it holds."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator

import pytest

from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.volume.layout import block_objects
from include.juicefs_storage.volume.metaurl import Metaurl
from lab.environment import Lab
from lab.process import free_ports
from tests.support.refusals import UUID_KEY, Look, new_store, refusals, warnings


@contextlib.contextmanager
def new_object(lab: Lab, key: str, body: bytes | None, metadata: dict[str, str] | None = None) -> Iterator[None]:
    """An object on the new store is another one, or gone, or has other metadata; put back afterwards."""
    s3, bucket = lab.new_store.client(), lab.new_store.bucket
    had = s3.get_object(Bucket=bucket, Key=key) if key in lab.new_store.objects() else None
    content, kept = (had["Body"].read(), had["Metadata"]) if had else (None, {})

    def put(content: bytes | None, metadata: dict[str, str]) -> None:
        if content is None:
            s3.delete_object(Bucket=bucket, Key=key)
        else:
            s3.put_object(Bucket=bucket, Key=key, Body=content, Metadata=metadata)

    put(body, kept if metadata is None else metadata)
    try:
        yield
    finally:
        put(content, kept)


def some_block(lab: Lab) -> str:
    """A block that both stores have and some file refers to: of the slices, the newest one copied."""
    metadata = MySqlMetadata.from_metaurl(Metaurl.parse(lab.mariadb.meta_url_with_password))
    row, copied = metadata.read_setting(), lab.new_store.objects("myjfs/chunks/")
    keys = [key for one in metadata.slices() for key, _ in block_objects(row, *one)]
    return next(key for key in reversed(keys) if key in copied)


def test_a_bucket_that_does_not_exist_is_not_created(lab: Lab, look: Look) -> None:
    (refused,) = refusals(look("check_target_bucket", target_bucket="no-such-bucket", dry_run=False))
    assert "no-such-bucket" in refused
    assert "never created" in refused
    assert [row["Name"] for row in lab.new_store.client().list_buckets()["Buckets"]] == [lab.new_store.bucket]


@pytest.mark.parametrize("dry_run", [True, False])
def test_wrong_keys(lab: Lab, connections: Callable[..., None], look: Look, dry_run: bool) -> None:
    connections("minio_new", **new_store(lab, secret_key="not the secret key"))
    (refused,) = refusals(look("check_target_bucket", dry_run=dry_run))
    assert "403" in refused
    assert "correct the secret key" in refused
    assert "not the secret key" not in refused


def test_keys_that_may_only_read(lab: Lab, look: Look) -> None:
    lab.new_store.refuse_writes()
    try:
        (refused,) = refusals(look("check_target_bucket", dry_run=False))
    finally:
        lab.new_store.allow_writes()
    assert f"the store answered PUT {lab.volume.name}/" in refused
    assert "AccessDenied" in refused


def test_an_endpoint_that_the_pods_reach_and_airflow_does_not(
    lab: Lab, connections: Callable[..., None], look: Look
) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    connections("minio_new", **new_store(lab, endpoint_url=nowhere))
    (refused,) = refusals(look("check_target_bucket", target_endpoint=lab.new_store.endpoint_url))
    assert "The pods reach the new store, Airflow does not: " in refused
    assert nowhere in refused
    assert "open a way from the Airflow workers" in refused


def test_an_old_store_that_the_pods_reach_and_airflow_does_not(
    lab: Lab, connections: Callable[..., None], look: Look
) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    connections("minio_away", **new_store(lab, endpoint_url=nowhere))
    given = {"source_conn_id": "minio_away", "consistency": "listing"}
    (refused,) = refusals(look("check_consistency", **given))
    assert "The old store serves the clients, and Airflow cannot use it: " in refused
    assert f"The old store, by connection 'minio_away', {lab.old_store.bucket}/ at {nowhere}" in refused
    assert "give Airflow a way to it, or name a connection" in refused
    assert "`source_conn_id`" in refused


def test_an_endpoint_that_nobody_reaches(lab: Lab, connections: Callable[..., None], look: Look) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    connections("minio_new", **new_store(lab, endpoint_url=nowhere))
    refused = refusals(look("check_target_bucket"))
    assert any("the Airflow workers reach it" in line for line in refused)
    assert len([line for line in refused if ": pod " in line and f"cannot use {nowhere}" in line]) == 3


def test_an_endpoint_that_the_pods_do_not_reach(lab: Lab, look: Look) -> None:
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    refused = refusals(look("check_target_bucket", target_endpoint=nowhere))
    assert len(refused) == 3
    assert all(line.startswith("The new store, by connection 'minio_new': pod juicefs-") for line in refused)
    assert all("target_endpoint" in line for line in refused)
    assert sum("csi-controller" in line for line in refused) == 1


def test_a_connection_that_leads_to_another_store_than_the_clients_endpoint(
    lab: Lab, connections: Callable[..., None], look: Look
) -> None:
    """Blocks would be copied to the one and looked for there, while the clients write to the other."""
    store, bucket = lab.old_store.client(), lab.new_store.bucket
    lab.old_store.take_only(lab.old_store, lab.new_store)
    store.create_bucket(Bucket=bucket)
    body = store.get_object(Bucket=lab.old_store.bucket, Key=UUID_KEY)["Body"].read()
    store.put_object(Bucket=bucket, Key=UUID_KEY, Body=body)
    connections("minio_new", **new_store(lab, endpoint_url=lab.old_store.endpoint_url))
    try:
        there = {"target_endpoint": lab.new_store.endpoint_url, "dry_run": False}
        (refused,) = refusals(look("check_target_bucket", **there))
        assert f"juicefs does not find it at {lab.new_store.endpoint_url}" in refused
        assert "both must lead to the same store" in refused
        connections(
            "minio_new", **new_store(lab, endpoint_url=lab.new_store.endpoint_url.replace("127.0.0.1", "localhost"))
        )
        assert refusals(look("check_target_bucket", **there)) == []
    finally:
        store.delete_object(Bucket=bucket, Key=UUID_KEY)
        store.delete_bucket(Bucket=bucket)
        lab.old_store.take_only(lab.old_store)


def test_a_certificate_that_the_pods_do_not_trust(lab: Lab, look: Look) -> None:
    """The cluster's own API stands in for a store: HTTPS, by an authority that no image knows."""
    refused = refusals(look("check_target_bucket", target_endpoint=lab.kube.url))
    assert len(refused) == 3
    assert all(f"does not trust the certificate of {lab.kube.url}" in line for line in refused)
    assert all("extra.verify=false in connection 'minio_new'" in line for line in refused)


@pytest.mark.parametrize("suffix", ["/prefix", "/bucket/"])
def test_an_endpoint_with_a_path(lab: Lab, connections: Callable[..., None], look: Look, suffix: str) -> None:
    connections("minio_new", **new_store(lab, endpoint_url=lab.new_store.endpoint_url + suffix))
    (refused,) = refusals(look("check_target_bucket"))
    assert "http(s)://host[:port]" in refused


def test_an_endpoint_without_scheme(lab: Lab, connections: Callable[..., None], look: Look) -> None:
    connections("minio_new", **new_store(lab, endpoint_url=f"127.0.0.1:{lab.new_store.ports[3]}"))
    (refused,) = refusals(look("check_target_bucket"))
    assert "http(s)://host[:port]" in refused


def test_the_copy_of_another_volume(lab: Lab, look: Look) -> None:
    with new_object(lab, UUID_KEY, b"99999999-0000-0000-0000-000000000000"):
        (refused,) = refusals(look("check_target_bucket"))
    assert "names volume '99999999-" in refused
    assert lab.volume.uuid in refused


def test_no_uuid_is_a_warning(lab: Lab, look: Look) -> None:
    with new_object(lab, UUID_KEY, None):
        findings = look("check_target_bucket")
    assert refusals(findings) == []
    assert UUID_KEY in warnings(findings)[0]


def test_blocks_that_this_volume_never_wrote(lab: Lab, look: Look) -> None:
    foreign = "myjfs/chunks/77/77000/77000123_0_4096"
    with new_object(lab, foreign, b"x" * 4096):
        (refused,) = refusals(look("check_consistency", consistency="listing"))
    assert foreign in refused
    assert "no slice 77000123" in refused


def test_blocks_of_deleted_files_are_harmless(lab: Lab, look: Look) -> None:
    with new_object(lab, "myjfs/chunks/0/0/1_9_4096", b"x" * 4096):
        findings = look("check_consistency", consistency="listing")
    assert (refusals(findings), warnings(findings)) == ([], [])


@pytest.mark.parametrize("mode", ["sample", "listing", "metadata", "content", "target_content"])
def test_a_missing_block(lab: Lab, look: Look, mode: str) -> None:
    key = some_block(lab)
    with new_object(lab, key, None):
        findings = look("check_consistency", consistency=mode, catch_up=True)
        (refused,) = refusals(look("check_consistency", consistency=mode, catch_up=False))
    assert refusals(findings) == []
    assert f"not on the new store yet, such as {key}." in warnings(findings)[0]
    assert re.match(rf"1 of \d+ blocks are not on the new store, such as {key}\.", refused)
    assert "copy the volume" in refused


@pytest.mark.parametrize("mode", ["sample", "listing", "metadata", "content"])
def test_a_block_with_another_length(lab: Lab, look: Look, mode: str) -> None:
    key = some_block(lab)
    with new_object(lab, key, b"cut"):
        (refused,) = refusals(look("check_consistency", consistency=mode))
    assert f"differ on the new store, such as {key}" in refused
    assert "overwrites" in refused


def test_contents_on_the_new_store_alone_are_told_by_the_checksum_of_juicefs(lab: Lab, look: Look) -> None:
    (whole,) = look("check_consistency", consistency="target_content")
    assert whole.level == "ok", whole
    assert "by the checksum that JuiceFS left with each" in whole.message
    assert "by their length" not in whole.message
    key = some_block(lab)
    body = lab.new_store.client().get_object(Bucket=lab.new_store.bucket, Key=key)["Body"].read()
    with new_object(lab, key, body[:-1] + bytes([body[-1] ^ 1])):
        (refused,) = refusals(look("check_consistency", consistency="target_content"))
    assert f"such as {key} (its content has the CRC32C " in refused
    assert "Files of these: /" in refused
    with new_object(lab, key, body, metadata={}):
        (untold,) = warnings(look("check_consistency", consistency="target_content"))
    assert untold.startswith("1 blocks were read in full")


@pytest.mark.parametrize(("mode", "seen"), [("sample", True), ("listing", False), ("content", True)])
def test_a_block_with_other_content_of_the_same_length(lab: Lab, look: Look, mode: str, seen: bool) -> None:
    key = some_block(lab)
    with new_object(lab, key, b"x" * lab.new_store.objects()[key][0]):
        refused = refusals(look("check_consistency", consistency=mode))
    assert [f"such as {key} (content)" in line for line in refused] == ([True] if seen else [])

"""A lab whose clients reach the old store through a proxy that has an administrator, as MinIO has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from include.juicefs_storage.adapters.mysql import MySqlMetadata
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.setting import Setting
from lab.environment import Lab
from lab.process import wait_for
from tests.support.harness import SHORT, Run
from tests.support.s3_proxy import S3Proxy
from tests.support.worker import Fault


@contextmanager
def old_store_behind_proxy(lab: Lab) -> Iterator[S3Proxy]:
    """Have the volume's clients reach the old store through a proxy that can refuse them; undone at the end."""
    before = MySqlMetadata.from_metaurl(Metaurl.parse(lab.mariadb.meta_url_with_password)).read_setting()
    with S3Proxy(lab.old_store.endpoint_url) as proxy:
        through = f"{proxy.url}/{lab.old_store.bucket}"
        _patch(lab, through)
        point(lab, Setting(before.raw.replace(before.bucket.encode(), through.encode())))
        try:
            yield proxy
        finally:
            proxy.read_only = False
            proxy.groups.clear()
            _patch(lab, before.bucket)
            point(lab, before)


def point(lab: Lab, setting: Setting) -> None:
    """Write the setting behind everybody's back, and wait until the mounts follow."""
    lab.mariadb.query("UPDATE jfs_setting SET value = %s WHERE name = 'format'", [setting.raw.decode()])
    wait_for("the mounts follow", lambda: _used(lab) == {setting.bucket}, deadline_s=30)


def _patch(lab: Lab, bucket: str) -> None:
    for item in json.loads(lab.kubectl("get", "secret", "-n", "juicefs", "-o", "json"))["items"]:
        if "bucket" in (item.get("data") or {}):
            patched = json.dumps({"stringData": {"bucket": bucket}})
            name = item["metadata"]["name"]
            lab.kubectl("patch", "secret", name, "-n", "juicefs", "--type=merge", "-p", patched)


def _used(lab: Lab) -> set[str]:
    return {json.loads((mount / ".config").read_text())["Format"]["Bucket"] for mount in lab.mounts()}


def fenced(made: Run, proxy: S3Proxy) -> Run:
    """The same run with an administrator of the store behind the proxy."""
    admin = {"conn_type": "aws", "login": "admin", "password": "admin-key", "extra": {"endpoint_url": proxy.url}}
    made.environment["AIRFLOW_CONN_MINIO_ADMIN"] = json.dumps(admin)
    made.params["fence_conn_id"] = "minio_admin"
    return made


def switch(lab: Lab, folder: Path, *faults: Fault, **params: str) -> Run:
    """Make a run to the new store."""
    target = {"target_conn_id": "minio_new", "target_bucket": lab.new_store.bucket}
    return Run(lab, folder, folder.name, SHORT | target | params, faults)

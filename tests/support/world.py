"""What a run leaves behind: all on one store, nothing lost, nothing half done."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from include.juicefs_storage.volume.setting import Setting
from lab.environment import Lab
from lab.process import wait_for
from lab.seaweed import Store
from lab.writer import Writer


@dataclass(frozen=True)
class Sides:
    """Where the volume is, and where the next run moves it: the two stores of the lab take turns."""

    source: Store
    target: Store
    target_conn_id: str

    @classmethod
    def of(cls, lab: Lab) -> Sides:
        """By the setting."""
        if lab.mariadb.setting()["Bucket"] == lab.old_store.bucket_url:
            return cls(lab.old_store, lab.new_store, "minio_new")
        return cls(lab.new_store, lab.old_store, "minio_old")

    @property
    def params(self) -> dict[str, Any]:
        """What a person would fill in."""
        return {"target_conn_id": self.target_conn_id, "target_bucket": self.target.bucket}


def row(lab: Lab) -> bytes:
    """Read the exact bytes of the setting."""
    value = lab.mariadb.query("SELECT CAST(value AS BINARY) FROM jfs_setting WHERE name = 'format'")[0][0]
    return bytes(value)


def believed(lab: Lab) -> dict[str, set[str]]:
    """Read who names which store: the setting, every Secret with values of the volume, every mount."""
    stores = {value: store.name for store in (lab.old_store, lab.new_store) for value in _values(store)}
    config = Setting(row(lab)).config
    shown = {"setting": {config.bucket, config.access_key.get_secret_value(), config.secret_key.get_secret_value()}}
    for secret in json.loads(lab.kubectl("get", "secret", "-n", "juicefs", "-o", "json"))["items"]:
        data = {key: base64.b64decode(value).decode() for key, value in (secret.get("data") or {}).items()}
        keys = {"bucket", "access-key", "secret-key", "accesskey", "secretkey"} & data.keys()
        if keys:
            shown[f"Secret {secret['metadata']['name']}"] = {data[key] for key in keys}
    for mount in lab.mounts():
        form = json.loads((mount / ".config").read_text())["Format"]
        shown[f"mount {mount.name}"] = {form["Bucket"], form["AccessKey"]}
    return {who: {stores.get(value, f"neither ({who})") for value in values} for who, values in shown.items()}


def _values(store: Store) -> tuple[str, ...]:
    return store.bucket_url, store.access_key, store.secret_key


def assert_all_on(lab: Lab, store: Store) -> None:
    """Assert that the setting, every Secret and every client name this store, and it alone."""
    shown = believed(lab)
    assert len(shown) >= 5, shown  # the setting, two Secrets, two mounts
    assert {who: names for who, names in shown.items() if names != {store.name}} == {}


def assert_nothing_left_over(lab: Lab) -> None:
    """Assert that no canary is in the volume, no fresh mount is left, and every workload is rolled out."""
    assert [path.name for mount in lab.mounts() for path in mount.glob(".storage-switch-*")] == []
    # Those of labs beside this one go away by themselves.
    wait_for("no fresh mount is left", lambda: "storage-switch." not in Path("/proc/mounts").read_text(), deadline_s=60)
    for workload in ("statefulset/juicefs-csi-controller", "daemonset/juicefs-csi-node"):
        lab.kubectl("-n", "juicefs", "rollout", "status", workload, "--timeout=60s")


@contextmanager
def writing(lab: Lab, name: str) -> Iterator[Writer]:
    """Run an application on a mount: it has acknowledged some files before the block, and keeps writing during it."""
    writer = Writer.start(lab.state, lab.mounts()[0] / name, name=name)
    try:
        wait_for("the writer writes", lambda: writer.summary().written > 5, deadline_s=60)
        yield writer
    finally:
        writer.stop()


def assert_nothing_lost(lab: Lab, *writers: Writer) -> None:
    """Assert that every acknowledged or seeded file reads back through an empty cache."""
    manifests = {"seed": lab.state / "seed.manifest.jsonl"} | {writer.name: writer.manifest for writer in writers}
    with lab.fresh_mount() as mount:
        checks = {name: lab.check(manifest, mount, name) for name, manifest in manifests.items()}
    assert [name for name, check in checks.items() if check.files < 5] == []
    assert [path for check in checks.values() for path in check.missing + check.corrupt] == []

"""Diagnostics: nothing secret in them, and nothing in the world can make them stop or grow without end."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pytest

from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.ports import DumpKind, Pod
from include.juicefs_storage.switch.collect_diagnostics import Diagnostics, Masker, collect, secret_values
from include.juicefs_storage.tasks.show_diagnostics import main
from include.juicefs_storage.volume.clusters import Clusters
from tests.support.bare import BareCluster, BareJuiceFS

SECRET = 'p+/ss"wörd=='


@dataclass
class World(BareCluster, BareJuiceFS):
    """A cluster and a juicefs in one; `broken` parts raise."""

    objects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)

    def status(self) -> Mapping[str, Any]:
        self._look("status")
        return {"Setting": {"Name": "myjfs", "Bucket": "http://new:9000/data"}}

    def dump(self, kind: DumpKind) -> Sequence[Mapping[str, Any]]:
        self._look(kind)
        return self.objects.get(kind, [])

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        self._look("selector" if label_selector else "")
        return []

    def _look(self, what: str) -> None:
        if what in self.broken:
            raise TransientError(f"Kubernetes answered 500 to: {what} with {SECRET}.")


def gather(world: World, *, clock: Callable[[], float] = lambda: 0.0, timeout_s: float = 10) -> Diagnostics:
    return collect(Clusters(world), world, Masker([SECRET]), clock=clock, timeout_s=timeout_s)


@pytest.mark.parametrize(
    "form",
    [SECRET, base64.b64encode(SECRET.encode()).decode(), quote(SECRET, safe=""), json.dumps(SECRET), f"x{SECRET}y"],
)
def test_a_known_value_is_masked_in_every_form(form: str) -> None:
    masked = Masker([SECRET])(f"before {form} after")
    assert SECRET not in masked
    assert base64.b64encode(SECRET.encode()).decode().rstrip("=") not in masked
    assert "***" in masked
    assert masked.startswith("before ")
    assert masked.endswith(" after")


@pytest.mark.parametrize(
    "line",
    [
        "mysql://jfs:UNKNOWN@(db:3306)/jfs",
        "juicefs format --access-key=UNKNOWN --secret-key UNKNOWN x",
        "juicefs config --session-token UNKNOWN x",
        '{"SecretKey": "UNKNOWN", "AccessKey":"UNKNOWN"}',
        "found new configuration: storage=minio bucket=b ak=UNKNOWN",
        "password: UNKNOWN",
    ],
)
def test_what_looks_like_a_secret_is_masked_though_it_is_not_known(line: str) -> None:
    assert "UNKNOWN" not in Masker([])(line)


def test_what_is_no_secret_stays_readable() -> None:
    text = "pod juicefs-mount in Running\nvolumeName: data\nsecretKeyRef:\n  key: secretkey\n  name: juicefs-sc-secret"
    assert Masker(secret_values({"name": "data", "bucket": "http://old:9000/b", "token": "true"}))(text) == text


def test_the_values_of_a_secret_are_found_inside_json_and_line_by_line() -> None:
    inner = json.dumps({"secretkey": "inner-secret", "storage": "minio"})
    found = set(secret_values({"jfsSettings": inner, "ca.key": "line-one-x\nline-two-x", "storage": "minio"}))
    assert {"inner-secret", "line-one-x", "line-two-x"} <= found
    assert "minio" not in found


def test_a_variable_that_is_named_as_a_secret_is_masked_in_a_pod() -> None:
    env = [{"name": "DB_PASSWORD", "value": "UNKNOWN"}, {"name": "NODE_NAME", "value": "node-1"}]
    text = gather(World({"pods": [{"metadata": {"name": "p", "managedFields": ["noise"]}, "env": env}]})).text
    assert "UNKNOWN" not in text
    assert "node-1" in text
    assert "noise" not in text


def test_a_part_that_cannot_be_had_is_named_and_the_rest_is_kept() -> None:
    found = gather(World({"csinodes": [{"kind": "CSINode"}]}, broken={"status", "events", "selector"}))
    assert "kind: CSINode" in found.text
    assert len(found.problems) == 5  # the three selectors are asked one by one
    assert "events" in found.text.partition("===== Not collected")[2]
    assert SECRET not in found.text


def test_it_ends_in_time_and_size() -> None:
    ticks = iter(range(100))
    late = gather(World(), clock=lambda: float(next(ticks)), timeout_s=3)
    assert late.problems[-1].endswith("no time was left")
    noise = [{"metadata": {"name": f"n{number}"}, "text": "x" * 1000} for number in range(2000)]
    large = gather(World(dict.fromkeys(("pods", "csinodes"), noise)))
    assert len(large.text) < 500_000
    assert "characters before this were left out" in large.text


@pytest.mark.parametrize("arguments", [[], ["myjfs.run"], ["myjfs.run.switched"]])
def test_a_backup_itself_is_never_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().out == ""

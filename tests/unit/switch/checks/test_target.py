"""What the pods answer about the new endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from include.juicefs_storage.errors import PermanentError, TransientError, UnreachableError
from include.juicefs_storage.ports import ExecResult
from include.juicefs_storage.switch.checks.target import (
    check_one_store,
    check_reach,
    check_served,
    check_target,
    check_use,
    only_pods_reach,
)
from include.juicefs_storage.volume.clusters import Clusters
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.bare import BareCluster
from tests.support.fakes import MOUNT, NEW, OLD, FakeJuiceFS, FakeMetadata, FakeStore, setting

INSECURE = replace(NEW, bucket=f"{NEW.bucket}?tls-insecure-skip-verify=true")


class Pods(BareCluster):
    """A cluster whose pods answer every exec alike."""

    def __init__(self, answer: ExecResult | TransientError) -> None:
        self.answer = answer
        self.commands: list[Sequence[str]] = []

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        self.commands.append(command)
        if isinstance(self.answer, TransientError):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        (ExecResult(0, "", ""), "ok"),
        (ExecResult(7, "", "curl: (7) Failed to connect"), "refusal"),
        (ExecResult(69, "", ""), "warning"),
        (ExecResult(127, "", "sh: not found"), "warning"),
        (TransientError("the connection was lost"), "warning"),
    ],
)
def test_what_the_pods_say_about_the_endpoint(answer: ExecResult | TransientError, level: str) -> None:
    (finding,) = check_reach(Clusters(Pods(answer)), NEW, [MOUNT], "connection 'new'", controller=False)
    assert finding.level == level


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ExecResult(0, "", ""), []),
        (ExecResult(69, "", ""), []),
        (TransientError("the connection was lost"), []),
        (ExecResult(7, "", "curl: (7) Failed to connect"), [f"pod {MOUNT.name} cannot use http://old:9000: curl: (7)"]),
    ],
)
def test_a_client_that_does_not_reach_the_store_that_it_is_on(
    answer: ExecResult | TransientError, words: list[str]
) -> None:
    found = check_served(Pods(answer), OLD, [MOUNT])
    assert [finding.level for finding in found] == ["warning"] * len(words)
    assert all(word in finding.message for finding, word in zip(found, words, strict=True))
    assert all(finding.message.startswith("The old store, by the volume's setting: ") for finding in found)


def test_a_client_of_another_cluster_is_asked_there_for_the_store_that_it_is_on() -> None:
    there = MOUNT.model_copy(update={"name": f"other/{MOUNT.name}"})
    clusters = Clusters(Pods(ExecResult(0, "", "")), {"other": Pods(ExecResult(7, "", "curl: (7) Failed to connect"))})
    (finding,) = check_served(clusters, OLD, [MOUNT, there])
    assert f"pod {there.name} cannot use" in finding.message


def test_a_certificate_that_a_pod_does_not_trust_is_called_one() -> None:
    pods = Pods(ExecResult(60, "", "curl: (60) SSL certificate problem: self-signed certificate"))
    (finding,) = check_reach(Clusters(pods), NEW, [MOUNT], "connection 'new'", controller=False)
    assert "new store, by connection 'new'" in finding.message
    assert f"pod {MOUNT.name} does not trust the certificate of https://new:9000" in finding.message
    assert "extra.verify=false in connection 'new'" in finding.remedy


def test_pods_check_no_certificate_that_clients_do_not_check() -> None:
    pods = Pods(ExecResult(0, "", ""))
    check_reach(Clusters(pods), NEW, [MOUNT], "connection 'new'", controller=False)
    check_reach(Clusters(pods), INSECURE, [MOUNT], "connection 'new'", controller=False)
    assert [command[-1] for command in pods.commands] == ["", "--insecure"]


@pytest.mark.parametrize(
    ("problem", "level", "words"),
    [
        ("", "ok", "lists in"),
        (None, "warning", "could not try it"),
        ("tls: failed to verify certificate: x509: unknown authority", "refusal", "does not trust its certificate"),
        ("api error SignatureDoesNotMatch", "refusal", "cannot use it"),
    ],
)
def test_what_juicefs_says_about_the_new_store(problem: str | None, level: str, words: str) -> None:
    juicefs = FakeJuiceFS(FakeMetadata(setting()), problem=problem)
    (finding,) = check_use(juicefs, NEW, "connection 'new'")
    assert (finding.level, juicefs.tried) == (level, [(NEW, "")])
    assert words in finding.message
    assert "new store, by connection 'new'" in finding.message


@pytest.mark.parametrize(("problem", "level"), [("", "ok"), ("none of 1 blocks is there", "refusal")])
def test_whether_the_clients_see_what_airflow_writes(problem: str, level: str) -> None:
    juicefs, store = FakeJuiceFS(FakeMetadata(setting()), problem=problem), FakeStore()
    (finding,) = check_one_store(juicefs, store, NEW, "connection 'new'", probe_key="myjfs/probe")
    assert finding.level == level
    assert set(map(repr, juicefs.probed)) == {repr((NEW, ["myjfs/probe"], None))}
    assert "myjfs/probe" not in store.objects
    assert "both must lead to the same store" in finding.remedy or not problem


@pytest.mark.parametrize(
    ("target", "probe", "why"), [(NEW, None, "dry run"), (INSECURE, "myjfs/probe", "no certificate is checked")]
)
def test_that_airflow_and_the_clients_reach_one_store_is_not_proven_without_a_write(
    target: StorageConfig, probe: str | None, why: str
) -> None:
    store = FakeStore()
    (finding,) = check_one_store(
        FakeJuiceFS(FakeMetadata(setting())), store, target, "connection 'new'", probe_key=probe
    )
    assert finding.level == "warning"
    assert why in finding.message
    assert "The new store, by connection 'new'" in finding.message
    assert not store.objects


def test_clients_that_take_any_certificate_are_named() -> None:
    findings = check_use(FakeJuiceFS(FakeMetadata(setting())), INSECURE, "connection 'new'")
    assert [finding.level for finding in findings] == ["warning", "ok"]
    assert "tls-insecure-skip-verify=true" in findings[0].message


def test_a_store_that_only_the_pods_reach_is_called_that() -> None:
    class Away(FakeStore):
        def check(self, below: str = "") -> None:
            raise UnreachableError("No answer.")

    with (
        pytest.raises(PermanentError, match="The pods reach the new store, Airflow does not: No answer") as refused,
        only_pods_reach(pods_reach=True),
    ):
        check_target(Away(), setting(), NEW, probe_key=None)
    assert "open a way from the Airflow workers" in refused.value.next_step
    with pytest.raises(UnreachableError, match=r"^No answer\."), only_pods_reach(pods_reach=False):
        check_target(Away(), setting(), NEW, probe_key=None)

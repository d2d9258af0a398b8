"""Where juicefs runs, and where a `juicefs config` of a killed task is looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr

from include.juicefs_storage.adapters import juicefs_command
from include.juicefs_storage.adapters.juicefs_command import JuiceFSCommand, in_controller_pod
from include.juicefs_storage.errors import TransientError
from include.juicefs_storage.ports import ExecResult, Pod
from include.juicefs_storage.volume.csi import CSI_CONTROLLER_SELECTOR, CSI_NODE_SELECTOR
from include.juicefs_storage.volume.metaurl import Metaurl
from include.juicefs_storage.volume.setting import StorageConfig
from tests.support.bare import BareCluster
from tests.support.fakes import NEW

LONG_AGO = datetime.now(UTC) - timedelta(hours=1)


def pod(name: str, **more: Any) -> Pod:
    values: dict[str, Any] = {
        "ready": True, "restarts": 0, "problem": "", "labels": {}, "commands": (), "claims": (), **more,
    }  # fmt: skip
    return Pod(namespace="juicefs", name=name, uid=name, node="node", **values)


@dataclass
class Driver(BareCluster):
    """The driver's pods, two controllers as by default; `running` names those with a `juicefs config` in them."""

    nodes: list[Pod] = field(default_factory=lambda: [pod("node-1"), pod("node-2")])
    controllers: list[Pod] = field(default_factory=lambda: [pod("controller-0"), pod("controller-1")])
    running: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    asked: list[str] = field(default_factory=list)

    def pods(self, label_selector: str = "", namespace: str | None = None) -> list[Pod]:
        return {CSI_CONTROLLER_SELECTOR: self.controllers, CSI_NODE_SELECTOR: self.nodes}[label_selector]

    def exec(
        self, pod: str, container: str, command: Sequence[str], *, stdin: str = "", timeout_s: float = 60
    ) -> ExecResult:
        self.asked.append(pod)
        if pod in self.broken:
            raise TransientError(f"Could not start sh in pod juicefs/{pod}.")
        return ExecResult(75 if pod in self.running else 0, "", "")


def await_config(driver: Driver) -> None:
    in_controller_pod(driver, Metaurl.parse("mysql://u:p@(db)/jfs")).await_config(timeout_s=5)


@pytest.mark.parametrize("running", ["controller-0", "controller-1", "node-1", "node-2"])
def test_a_config_is_looked_for_wherever_it_may_have_been_started(running: str) -> None:
    with pytest.raises(TransientError, match=f"still runs in pod juicefs/{running} after 5 s"):
        await_config(Driver(running=(running,)))


def test_where_none_runs_the_setting_may_be_written_at_once() -> None:
    driver = Driver()
    await_config(driver)
    assert sorted(driver.asked) == ["controller-0", "controller-1", "node-1", "node-2"]


def test_pods_in_which_none_can_run_any_more_are_not_asked() -> None:
    driver = Driver(nodes=[pod("ended", phase="Failed"), pod("broken", ready=False, unready_since=LONG_AGO)])
    await_config(driver)
    assert sorted(driver.asked) == ["controller-0", "controller-1"]


def test_a_pod_that_cannot_be_asked_is_waited_for_as_long_as_a_config_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(juicefs_command, "sleep", waited.append)
    await_config(Driver(broken=("node-2",)))
    assert [round(seconds) for seconds in waited] == [round(juicefs_command.CONFIG_RUNS_FOR_S)]


def test_the_output_of_juicefs_is_quoted_without_its_progress() -> None:
    info = "2026/11/28 21:54:58.689055 juicefs[116] <INFO>: \x1b[92mOK\x1b[0m, myjfs is ready [mount@mount.go:620]\n"
    ping = "[xorm] [info]  2026/11/28 21:54:58.181948 PING DATABASE mysql\n"
    config = replace(NEW, secret_key=SecretStr("s3cr3t" * 500))

    def quoted(text: str) -> str:
        return juicefs_command._last_lines(ExecResult(1, "", text), config)

    assert quoted(ping + info + "\x1b[31mcannot read /mnt/a\x1b[0m\n" + 20 * info) == "cannot read /mnt/a"
    assert quoted(info).endswith("OK, myjfs is ready [mount@mount.go:620]"), "it is all there is"
    assert quoted(config.secret_key.get_secret_value()) == "***", "a key is not cut in two and shown"


def test_juicefs_addresses_a_store_as_the_clients_do() -> None:
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], stdin: str, timeout_s: float) -> ExecResult:
        commands.append(command)
        return ExecResult(0, "juicefs version 1.4.2", "")

    metaurl = Metaurl.parse("mysql://u:p@(db)/jfs")
    JuiceFSCommand(run, "juicefs", metaurl, dict, {"AWS_REGION": "eu-1"}).version()
    JuiceFSCommand(run, "juicefs", metaurl, dict).version()
    assert [command[:2] for command in commands] == [["env", "AWS_REGION=eu-1"], ["sh", "-c"]]


@pytest.mark.parametrize(
    ("url", "token", "expected"),
    [
        ("http://h:9000/data", "", "minio://h:9000/data/myjfs/x"),
        ("http://h:9000/data", "token", "s3://data.h:9000/myjfs/x"),
        ("https://10.0.0.1:9000/data", "", "s3://10.0.0.1:9000/data/myjfs/x"),
        ("https://s3.eu-west-1.amazonaws.com/data", "", "s3://s3.eu-west-1.amazonaws.com/data/myjfs/x"),
    ],
)
def test_a_storage_is_probed_by_a_scheme_that_knows_its_token_and_region(url: str, token: str, expected: str) -> None:
    seen: list[tuple[Sequence[str], str]] = []

    def run(command: Sequence[str], stdin: str, timeout_s: float) -> ExecResult:
        seen.append((command, stdin))
        return ExecResult(0, "", "")

    juicefs = JuiceFSCommand(run, "juicefs", Metaurl.parse("mysql://u:p@(db)/jfs"), dict)
    config = StorageConfig("s3", url, SecretStr("ak"), SecretStr("sk"), SecretStr(token))
    assert juicefs.probe_storage(config, ["myjfs/x"], None) == ""
    ((command, stdin),) = seen
    assert command[-1] == expected
    assert ("AWS_SESSION_TOKEN=token" in stdin) is bool(token)
    assert ("AWS_REGION=eu-west-1" in stdin) is ("eu-west-1" in url)
    assert "sk" not in " ".join(command[4:])

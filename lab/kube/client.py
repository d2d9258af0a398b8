"""How the lab and the tests start, steer and stop the Kubernetes stand-in."""

import contextlib
import dataclasses
import json
import os
import ssl
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from lab.kube.processes import kill_recorded

_START_S = 90.0
_STOP_S = 40.0
_PROJECT = Path(__file__).resolve().parents[2]


class KubeError(RuntimeError):
    """The stand-in could not be started; the message ends with its log's last lines."""


@dataclass(frozen=True)
class VolumeConfig:
    """The JuiceFS volume that the CSI installation serves: the values of the Secret `juicefs-sc-secret`."""

    name: str
    metaurl: str = field(repr=False)
    storage: str
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)


@dataclass(frozen=True)
class AuditEntry:
    """One API request; `command` is the argv of an exec, `time` is ISO 8601 UTC, `code` 0 a cut connection."""

    time: str
    user_agent: str
    verb: str
    group: str
    resource: str
    subresource: str
    namespace: str
    name: str
    code: int
    command: list[str]
    dry_run: bool

    @property
    def mutating(self) -> bool:
        """Whether the request asked for a change of an object (access reviews and server-side dry runs do not)."""
        changes = self.verb in ("create", "update", "patch", "delete") and not self.dry_run
        return changes and self.resource != "selfsubjectaccessreviews"


@dataclass(frozen=True)
class KubeServer:
    """A running stand-in. JSON-serialisable with `to_json`, without secrets; `kubeconfig` holds the token."""

    pid: int
    create_time: float
    url: str
    state: Path

    @classmethod
    def start(
        cls,
        state: Path,
        volume: VolumeConfig | None,
        *,
        juicefs: Path,
        heartbeat_s: int = 12,
        rollout_delay_s: float = 0.5,
        keeps_fuse: bool = False,
        nodes: int = 2,
    ) -> "KubeServer":
        """Start a server, detached from this process; return when its initial pods are Ready.

        Args:
            state: An empty or new folder for this server alone.
            volume: What the CSI installation serves; None for no volume.
            juicefs: The client's binary.
            heartbeat_s: Of the mounts.
            rollout_delay_s: How long a controller takes to see a new template.
            keeps_fuse: Whether csi-node keeps the FUSE descriptors of mount pods, which a smooth upgrade takes.
            nodes: How many nodes there are.

        Raises:
            KubeError: The pods were not Ready in time; nothing is left running.
        """
        state.mkdir(parents=True, exist_ok=True)
        state = state.resolve()
        values = dataclasses.asdict(volume) if volume else None
        config = {
            "volume": {k.replace("_", "-"): v for k, v in values.items()} if values else None,
            "juicefs": str(juicefs.resolve()),
            "heartbeat_s": heartbeat_s,
            "rollout_delay_s": rollout_delay_s,
            "keeps_fuse": keeps_fuse,
            "nodes": nodes,
        }
        log = state / "server.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "lab.kube", "--state", str(state)],
                cwd=_PROJECT,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        # Written before anything else runs, so that a start that is broken off can be cleaned up by folder alone.
        early = cls(process.pid, psutil.Process(process.pid).create_time(), "", state)
        (state / "starting.json").write_text(json.dumps(early.to_json()))
        try:
            if process.stdin is None:
                raise KubeError("no pipe to the server")
            process.stdin.write(json.dumps(config).encode())
            process.stdin.close()
            ready, deadline = state / "server.json", time.monotonic() + _START_S
            while not ready.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    what = f"ended with {process.returncode}" if process.returncode is not None else "is not ready"
                    tail = "\n".join(log.read_text().splitlines()[-40:])
                    raise KubeError(f"expected a Kubernetes stand-in with its pods Ready, but it {what}:\n{tail}")
                time.sleep(0.05)
        except BaseException:
            early.stop()
            raise
        process.returncode = 0  # stop() waits for it by pid, perhaps from another process
        return cls.from_json(json.loads(ready.read_text()) | {"state": str(state)})

    @classmethod
    def load(cls, state: Path) -> "KubeServer | None":
        """Return the server of a state folder, also of a start that was interrupted; None where none was started."""
        for name in ("server.json", "starting.json"):
            path = state.resolve() / name
            if path.exists():
                return cls.from_json(json.loads(path.read_text()) | {"state": str(state.resolve())})
        return None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "KubeServer":
        """Reverse `to_json`."""
        return cls(int(data["pid"]), float(data["create_time"]), str(data["url"]), Path(data["state"]))

    def to_json(self) -> dict[str, Any]:
        """Plain values, no secrets."""
        return {"pid": self.pid, "create_time": self.create_time, "url": self.url, "state": str(self.state)}

    @property
    def kubeconfig(self) -> Path:
        """For `kubectl --kubeconfig` and `kubernetes.config.load_kube_config`; readable by its owner only."""
        return self.state / "kubeconfig"

    @property
    def alive(self) -> bool:
        """Whether the very process that was started still runs."""
        return self._process() is not None

    def stop(self) -> None:
        """End the server, its pods and their mounts. Idempotent, also after the server crashed."""
        process = self._process()
        if process:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
                try:
                    process.wait(_STOP_S)
                except psutil.TimeoutExpired:
                    process.kill()
                    process.wait(5)
        kill_recorded(self.state)
        unmount_below(self.state)

    def order_fault(self, fault: dict[str, Any]) -> None:
        """Order a fault as `lab.kube.faults` describes; urllib.error.HTTPError 400 for an unknown one."""
        self._lab("POST", json.dumps(fault).encode())

    def clear_faults(self) -> None:
        """Forget all ordered faults."""
        self._lab("DELETE", None)

    def audit(self) -> list[AuditEntry]:
        """Return all API requests so far, in the order of their completion (watch and exec: of their start)."""
        path = self.state / "audit.jsonl"
        return [AuditEntry(**json.loads(line)) for line in path.read_text().splitlines()]

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            same = process.create_time() == self.create_time and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return None
        return process if same else None

    def _lab(self, method: str, body: bytes | None) -> None:
        config = json.loads(self.kubeconfig.read_text())
        headers = {"Authorization": f"Bearer {config['users'][0]['user']['token']}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/lab/faults", data=body, method=method, headers=headers)  # noqa: S310
        context = ssl.create_default_context(cafile=str(self.state / "ca.crt"))
        with urllib.request.urlopen(request, timeout=10, context=context):  # noqa: S310
            pass


def unmount_below(state: Path) -> None:
    """Unmount everything below a folder, the newest first, without waiting for users of a dead mount."""
    prefix = f"{state.resolve()}{os.sep}"
    for line in reversed(Path("/proc/self/mountinfo").read_text().splitlines()):
        target = line.split()[4]
        if target.startswith(prefix):
            subprocess.run(["umount", "-l", target], check=False, stderr=subprocess.DEVNULL)

"""Real clients hand a mount over by way of the lab's csi-node, as in a smooth upgrade: no server, no cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from lab.environment import require_machine
from lab.kube.fuse import ADDRESS_IN_POD, FuseDescriptors
from lab.process import binary, run, wait_for
from tests.support.labs import lab_required

KEY = "k" * 32
_FILES = 60
#: An application that holds a file open and makes others.
_APPLICATION = f"""
exec 3>"$1/open"; i=0
while [ $i -lt {_FILES} ]; do
  echo $i >&3 || echo ERROR
  echo x >"$1/file-$i" || echo ERROR
  i=$((i+1)); sleep 0.05
done
echo done
"""


@dataclass
class Node:
    """A mount namespace in which clients share a folder as their /tmp, as mount pods do."""

    base: Path
    holder: subprocess.Popen[bytes]
    fuse: FuseDescriptors
    clients: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def mount(self) -> Path:
        return self.base / "mnt"

    def start(self, *command: str, **env: str) -> subprocess.Popen[str]:
        enter = ["nsenter", "-t", str(self.holder.pid), "-m", "--", *command]
        with (self.base / "log").open("a") as log:
            return subprocess.Popen(enter, env=os.environ | env, stdout=subprocess.PIPE, stderr=log, text=True)

    def client(self, **env: str) -> subprocess.Popen[str]:
        options = ["--no-usage-report", "--no-syslog", "--backup-meta=0", "--metrics=127.0.0.1:0"]
        where = [f"--cache-dir={self.base}/cache", f"sqlite3://{self.base}/meta.db", str(self.mount)]
        command = [str(self.base / "juicefs"), "mount", *options, *where]
        self.clients.append(self.start(*command, JFS_SUPER_COMM=ADDRESS_IN_POD, JFS_FOREGROUND="1", **env))
        return self.clients[-1]

    def read(self, name: str) -> str:
        try:
            return self.start("cat", str(self.mount / name)).communicate(timeout=2)[0]
        except subprocess.TimeoutExpired:
            return ""


@pytest.fixture
def node() -> Iterator[Node]:
    """Not below /tmp, which the clients do not see."""
    with lab_required():
        require_machine()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="handover-") as folder:
        base = Path(folder)
        (base / "mnt").mkdir()
        run(
            [
                binary("juicefs"),
                "format",
                "--storage=file",
                f"--bucket={base}/data/",
                f"sqlite3://{base}/meta.db",
                "vol",
            ]
        )
        fuse = FuseDescriptors(base / "fuse")
        (base / "juicefs").touch()
        # The program may lie below /tmp.
        bind = 'mount --bind "$1" "$2" && mount --bind "$3" /tmp && exec sleep 300'
        paths = [str(binary("juicefs")), str(base / "juicefs"), str(fuse.folder(KEY))]
        holder = subprocess.Popen(["unshare", "-m", "--propagation", "private", "sh", "-c", bind, "sh", *paths])
        made = Node(base, holder, fuse)
        try:
            wait_for("it has a /tmp of its own", lambda: psutil.Process(holder.pid).name() == "sleep", deadline_s=10)
            yield made
        finally:
            fuse.stop(KEY)
            print((base / "log").read_text())  # pytest shows it where the test fails
            for client in made.clients:
                for process in psutil.Process(client.pid).children() if client.poll() is None else []:
                    process.kill()
                client.kill()
                client.wait()
            holder.kill()
            holder.wait()


def test_an_application_sees_no_error_while_its_client_is_replaced(node: Node) -> None:
    old = node.client()
    wait_for("it is mounted and kept", lambda: bool(node.read(".config")) and node.fuse.keeps(KEY), deadline_s=30)
    application = node.start("sh", "-c", _APPLICATION, "sh", str(node.mount))
    wait_for("it writes", lambda: node.read("file-5") == "x\n", deadline_s=20)

    config = json.loads(node.read(".config"))
    node.fuse.remember(KEY, int(config["Meta"]["Sid"]), config["StatePath"])
    assert node.fuse.close_in_client(KEY, int(config["PPid"]))
    os.kill(int(config["Pid"]), signal.SIGHUP)
    assert old.wait(20) == 0, "completed, as its pod does"
    assert node.fuse.keeps(KEY)
    new = node.client(**node.fuse.environment(KEY))

    assert application.communicate(timeout=60)[0] == "done\n"
    now = json.loads(node.read(".config"))
    assert (now["PPid"], now["Meta"]["Sid"]) == (new.pid, config["Meta"]["Sid"])
    assert node.read("open").split() == [str(number) for number in range(_FILES)]

    # One that is killed leaves the mount to the next one as well.
    for pid in (now["PPid"], now["Pid"]):
        os.kill(pid, signal.SIGKILL)
    new.wait()
    assert node.fuse.keeps(KEY)
    node.fuse.forget_state(KEY)
    node.client()
    wait_for("the next one serves it", lambda: node.read("file-5") == "x\n", deadline_s=30)

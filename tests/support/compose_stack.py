"""docker-compose.yaml, up on empty volumes, as its head says: .env filled in, images built."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ctypes
import json
import os
import re
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lab.process import LabError, binary, run

PROJECT = Path(__file__).resolve().parents[2]
#: A build installs all of Airflow; several share the machine's cores.
BUILD_S = 1800
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Stack:
    """The services of docker-compose.yaml, as a project of Compose with a name of its own."""

    folder: Path
    engine: Mapping[str, str] = field(repr=False)
    user: str
    password: str = field(repr=False)

    @property
    def name(self) -> str:
        """The project's name."""
        return "juicefs-storage-switch-test"

    def compose(self, *arguments: str, deadline_s: float = 300) -> str:
        """Run Compose on the project's file, with the filled-in .env; return what it prints."""
        files = ("docker-compose.yaml", str(self.folder / "override.yaml"))
        options = [word for file in files for word in ("--file", file)]
        return run(
            [
                PROJECT / "setup.sh", "compose", "--project-name", self.name, "--env-file", self.folder / "env",
                *options, *arguments,
            ],
            env=self.engine, cwd=PROJECT, deadline_s=deadline_s,
        )  # fmt: skip

    def docker(self, *arguments: str, deadline_s: float = 120) -> str:
        """Run `docker`; return what it prints."""
        return run([binary("docker"), *arguments], env=self.engine, deadline_s=deadline_s)

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's containers that run."""
        labels = {"project": self.name, "service": service}
        filters = [f"--filter=label=com.docker.compose.{key}={value}" for key, value in labels.items()]
        return self.docker("ps", "--quiet", "--no-trunc", *filters).split()

    def health(self) -> dict[str, list[str]]:
        """Return how each container of a service is: `healthy`, else what the engine says of it."""
        ids = self.docker("ps", "--all", "--quiet", f"--filter=label=com.docker.compose.project={self.name}").split()
        found: dict[str, list[str]] = {}
        for container in json.loads(self.docker("inspect", *ids)) if ids else []:
            state = container["State"]
            how = state.get("Health", {}).get("Status") or f"{state['Status']} {state['ExitCode']}"
            found.setdefault(container["Config"]["Labels"]["com.docker.compose.service"], []).append(how)
        return found

    def in_service(self, service: str, *command: str, deadline_s: float = 180) -> str:
        """Run a command in the first container of a service; return what it prints."""
        return self.docker("exec", self.containers(service)[0], *command, deadline_s=deadline_s)


def fill_in(example: str, user: str, password: str, settings: Mapping[str, str]) -> str:
    """Return .env.example with every key and the given settings filled in, as its comments say.

    Args:
        example: The text of .env.example.
        user: The administrator's name.
        password: The administrator's password.
        settings: Of the part below `# Settings`.
    """
    values = {
        "FERNET_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "JUICEFS_BACKUP_KEY": base64.b64encode(secrets.token_bytes(32)).decode(),
        "AIRFLOW_ADMIN_USER": f"'{user}'",
        "AIRFLOW_ADMIN_PASSWORD": f"'{password}'",
        **settings,
    }
    keys, mark, rest = example.partition("# Settings")
    keys = re.sub(r"(?m)^(\w+)=.*$", lambda found: f"{found[1]}={values.get(found[1]) or secrets.token_hex(24)}", keys)
    rest = re.sub(r"(?m)^(\w+)=.*$", lambda found: f"{found[1]}={values.get(found[1], '')}", rest)
    return keys + mark + rest


@contextlib.contextmanager
def up(engine: Mapping[str, str], folder: Path, registry: Mapping[str, object], *, workers: int) -> Iterator[Stack]:
    """Bring the stack up on empty volumes; take it down with them, images kept where the engine is kept.

    Args:
        engine: The environment for `docker`.
        folder: For .env and the registry, readable by the tests alone but for the registry.
        registry: What volumes.yaml says.
        workers: How many.

    Raises:
        LabError: the build or the start failed; the message carries its last lines.
    """
    volumes = folder / "registry"
    volumes.mkdir()
    (volumes / "volumes.yaml").write_text(yaml.safe_dump(dict(registry)))
    volumes.chmod(0o755)
    # A dollar in the password: Compose would cut it without the quotes.
    stack = Stack(folder, engine, "admin", f"{secrets.token_hex(12)}$x")
    settings = {
        "REGISTRY_FOLDER": str(volumes),
        "JUICEFS_STORAGE_REHEARSAL_SCHEDULE": "none",
        "WORKER_CONCURRENCY": "3",
    }
    env = folder / "env"
    env.touch(mode=0o600)
    env.write_text(fill_in((PROJECT / ".env.example").read_text(), stack.user, stack.password, settings))
    # An engine of the tests has no bridge of its own that a build could use.
    override = {"services": {"airflow-init": {"build": {"network": "host"}}}}
    (folder / "override.yaml").write_text(yaml.safe_dump(override))
    try:
        stack.compose("build", "airflow-init", deadline_s=BUILD_S)
        stack.compose("up", "--detach", "--scale", f"airflow-worker={workers}", deadline_s=900)
        yield stack
    finally:
        with contextlib.suppress(LabError):
            (folder / "logs").write_text(stack.compose("logs", "--no-color", "--tail", "300"))
        stack.compose("down", "--volumes", "--timeout", "20")


@contextlib.contextmanager
def loopback(stack: Stack, containers: Sequence[str], ports: Sequence[int]) -> Iterator[None]:
    """Let containers reach servers on this machine's loopback address at the very same address: 127.0.0.1 and port.

    The lab's servers, and the addresses that its volume's setting names, stay as they are in every other test.

    Args:
        stack: Whose containers.
        containers: Ids.
        ports: Of the servers.
    """
    pids = [int(stack.docker("inspect", "--format", "{{.State.Pid}}", container)) for container in containers]
    listening = [(listen_in(pid, port), port) for pid in pids for port in ports]
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loopback")
    thread.start()
    try:
        for listener, port in listening:
            asyncio.run_coroutine_threadsafe(_serve(listener, port), loop).result(30)
        yield
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for listener, _ in listening:
            listener.close()


def listen_in(pid: int, port: int) -> socket.socket:
    """Return a socket that listens on 127.0.0.1 in the network namespace of a process.

    A thread alone changes its namespace; what it opened there stays there.
    """

    def make() -> socket.socket:
        with Path(f"/proc/{pid}/ns/net").open("rb") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        listener = socket.socket()
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
        return listener

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


async def _serve(listener: socket.socket, port: int) -> None:
    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(_pump(reader, far_writer), _pump(far_reader, writer))
        for end in (writer, far_writer):
            end.close()

    await asyncio.start_server(relay, sock=listener)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(2**16):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.write_eof()

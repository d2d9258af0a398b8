"""The whole lab: two stores, MariaDB, the volume, the cluster and, where wanted, Airflow."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from getpass import getuser
from pathlib import Path
from typing import Any

import psutil

from lab.airflow import Airflow
from lab.kube.client import KubeError, KubeServer, unmount_below
from lab.mariadb import MariaDB
from lab.process import LabError, LabUnavailableError, Server, binary, run
from lab.seaweed import Store, remove_sockets
from lab.volume import Copied, Volume, config_for_csi, copy_volume, fresh_mount
from lab.writer import Check, check_manifest, seed_files

VOLUME_NAME = "myjfs"
# Only a folder that has this is ever removed.
_MARK = ".juicefs-lab"


def default_state() -> Path:
    """Return where a lab lives when nobody says otherwise: one a user."""
    return Path(tempfile.gettempdir()) / f"juicefs-lab-{getuser()}"


@dataclass(frozen=True)
class Lab:
    """A running lab; `<state>/lab.json` (mode 0600) is its record."""

    state: Path
    mariadb: MariaDB
    old_store: Store
    new_store: Store
    volume: Volume
    kube: KubeServer
    airflow: Airflow | None = None

    @classmethod
    def up(cls, state: Path, *, airflow: bool = False, heartbeat_s: int = 12, keeps_fuse: bool = False) -> "Lab":
        """Start everything; returns when all of it serves. Where that fails nothing is left running.

        Args:
            state: a folder that is empty or does not exist yet.
            airflow: with Airflow as well.
            heartbeat_s: of the volume's mounts, in seconds.
            keeps_fuse: whether the driver can replace a mount pod without a pause, as it does since 0.25.

        Raises:
            LabUnavailableError: this machine cannot run it.
            LabError: a server did not come up, or a lab is there already.
        """
        require_machine()
        state = state.resolve()
        if state.exists() and any(state.iterdir()):
            raise LabError(f"expected an empty folder for the lab, found {state} in use: `python -m lab down` first")
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        (state / _MARK).touch()
        try:
            with ThreadPoolExecutor() as pool:
                database = pool.submit(MariaDB.start, state)
                old = pool.submit(Store.create, state, "old-store", "jfs-old")
                new = pool.submit(Store.create, state, "new-store", "jfs-new")
                starting = pool.submit(Airflow.start, state) if airflow else None
                mariadb, old_store, new_store = database.result(), old.result(), new.result()
                volume = Volume.format(VOLUME_NAME, mariadb, old_store)
                kube = KubeServer.start(
                    state / "kube",
                    config_for_csi(volume, mariadb, old_store),
                    juicefs=binary("juicefs"),
                    heartbeat_s=heartbeat_s,
                    keeps_fuse=keeps_fuse,
                )
                running = starting.result() if starting else None
                if running:
                    running.connect(mariadb, old_store, new_store, kube.kubeconfig)
            lab = cls(state, mariadb, old_store, new_store, volume, kube, running)
            lab.save()
        except BaseException as error:
            tear_down(state, remove=False)
            if isinstance(error, KubeError):
                raise LabError(str(error)) from error
            raise
        return lab

    @classmethod
    def load(cls, state: Path) -> "Lab":
        """Load the lab that was brought up in this folder.

        Raises:
            LabError: there is none.
        """
        state = state.resolve()
        try:
            data = json.loads((state / "lab.json").read_text())
        except OSError as error:
            raise LabError(f"expected a lab in {state}, found none: `python -m lab up`") from error
        kube = KubeServer.load(state / "kube")
        if kube is None:
            raise LabError(f"expected the cluster's record in {state / 'kube'}, found none: `python -m lab down`")
        return cls(
            state,
            MariaDB(**{**data["mariadb"], "state": state}),
            Store(**{**data["old_store"], "state": state}),
            Store(**{**data["new_store"], "state": state}),
            Volume(**data["volume"]),
            kube,
            Airflow(**{**data["airflow"], "state": state}) if data["airflow"] else None,
        )

    def save(self) -> None:
        """Write the record."""
        record: dict[str, Any] = {
            name: dataclasses.asdict(part) if (part := getattr(self, name)) else None
            for name in ("mariadb", "old_store", "new_store", "volume", "airflow")
        }
        path = self.state / "lab.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(record, default=str, indent=1))

    def down(self, *, remove: bool = False) -> None:
        """Stop everything and unmount; `remove` deletes the folder too. Idempotent, also after a crash."""
        tear_down(self.state, remove=remove)

    def status(self) -> list[tuple[str, str, str]]:
        """(component, `running` or `stopped`, detail), a line each."""
        lines = [
            ("mariadb", self.mariadb.server(), f"127.0.0.1:{self.mariadb.port}"),
            ("old store", self.old_store.server(), self.old_store.bucket_url),
            ("new store", self.new_store.server(), self.new_store.bucket_url),
        ]
        status = [(name, "running" if server and server.alive() else "stopped", where) for name, server, where in lines]
        status.append(("cluster", "running" if self.kube.alive else "stopped", f"{self.kube.kubeconfig}"))
        mounts = self.mounts()
        status += [(f"mount {number}", "running", str(path)) for number, path in enumerate(mounts, 1)]
        if self.airflow:
            status.append(("airflow", "running" if self.airflow.healthy() else "stopped", self.airflow.url))
        return status

    def mounts(self) -> list[Path]:
        """Return the host's paths of the volume's mounts that belong to mount pods, sorted."""
        below = f"{self.kube.state / 'jfs'}{os.sep}"
        lines = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        points = {Path(fields[4]) for fields in lines if fields[4].startswith(below) and "fuse.juicefs" in fields}
        return sorted(points)

    def mount_processes(self) -> dict[str, set[tuple[int, float]]]:
        """Return the juicefs processes that serve each mount: its folder's name to (pid, creation time)."""
        processes: dict[str, set[tuple[int, float]]] = {mount.name: set() for mount in self.mounts()}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                # juicefs shows its arguments as one, and in a mount pod the mount point is /jfs/<name>.
                words = " ".join(process.cmdline()).split() if process.name() == "juicefs" else []
                for name, serving in processes.items():
                    if f"/jfs/{name}" in words:
                        serving.add((process.pid, process.create_time()))
        return processes

    def kubectl(self, *arguments: str) -> str:
        """Run kubectl against the lab's cluster; return what it prints."""
        return run([binary("kubectl"), f"--kubeconfig={self.kube.kubeconfig}", *arguments])

    def seed(self, files: int = 300) -> Path:
        """Write files through the first mount, into `seed/`; returns their manifest."""
        manifest = self.state / "seed.manifest.jsonl"
        seed_files(self.mounts()[0] / "seed", manifest, files)
        return manifest

    def copy_to_new_store(self) -> Copied:
        """Copy the volume's objects from the old store to the new one: what is missing there, nothing deleted."""
        return copy_volume(self.volume.name, self.old_store, self.new_store)

    @contextlib.contextmanager
    def fresh_mount(self, *, read_only: bool = True, io_retries: int = 10) -> Iterator[Path]:
        """Provide a mount of its own with an empty cache."""
        with fresh_mount(self.state, self.mariadb, read_only=read_only, io_retries=io_retries) as mount_point:
            yield mount_point

    def check(self, manifest: Path, mount: Path, folder: str) -> Check:
        """Compare the folder of a mount with a manifest."""
        return check_manifest(manifest, mount / folder)


def require_machine() -> None:
    """Say what this machine lacks.

    Raises:
        LabUnavailableError: the first thing missing, and how to get it.
    """
    if os.geteuid() != 0:
        raise LabUnavailableError("expected root, which mounting a volume takes, found another user: run it with sudo")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise LabUnavailableError(
            "expected /dev/fuse, found none to open: modprobe fuse, or --device /dev/fuse --cap-add SYS_ADMIN"
        )
    for program in ("mariadbd", "mariadb-install-db", "fusermount3", "juicefs", "weed"):
        binary(program)


def tear_down(state: Path, *, remove: bool) -> None:
    """Stop whatever is recorded below a lab's folder and unmount what is mounted there; works on half a lab too.

    Args:
        state: the lab's folder; one that never was a lab is left alone.
        remove: delete the folder as well.
    """
    state = state.resolve()
    servers = Server.load_all(state)
    # Those that use the mounts first, the mounts next, at last what the mounts need to end in order.
    needed = {"mariadb", "old-store", "new-store", "postgresql", "redis"}
    _stop([server for server in servers if server.name not in needed])
    with contextlib.suppress(OSError, ValueError, KeyError):
        if kube := KubeServer.load(state / "kube"):
            kube.stop()
    unmount_below(state)
    _stop([server for server in servers if server.name in needed])
    with contextlib.suppress(OSError, ValueError):
        record = json.loads((state / "lab.json").read_text())
        remove_sockets([*record["old_store"]["ports"], *record["new_store"]["ports"]])
    if remove and (state / _MARK).exists():
        shutil.rmtree(state, ignore_errors=True)


def _stop(servers: list[Server]) -> None:
    # Only these need time to end in order: a store never ends by itself, and a writer may hang on a mount that is dead.
    orderly = ("airflow-", "mariadb", "postgresql")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda server: server.stop(deadline_s=15 if server.name.startswith(orderly) else 2), servers))

"""A Docker engine for the test of the Compose stack: the one that runs, or one of its own that leaves nothing behind.

Where no registry of images can be reached, the images that the project's files name are made from Debian's packages,
in an engine of its own alone: nobody else's engine gets an image under a name that belongs to another.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from lab.process import LabError, Server, binary, run, wait_for

IMAGES = Path(__file__).resolve().parents[1] / "compose/images"
#: What docker-compose.yaml and deploy/Dockerfile start from, and the folder of IMAGES that stands in for it.
STANDS_IN = {
    "apache/airflow:slim-3.3.2-python3.11": "airflow",
    "postgres:17.6-bookworm": "postgres",
    "redis:7.2-bookworm": "redis",
}
BASE = "debian:bookworm-slim"


@contextlib.contextmanager
def engine(log_state: Path) -> Iterator[dict[str, str]]:
    """Provide an engine that has, or can pull, the images of the project; yields the environment for `docker`.

    Args:
        log_state: Where an engine of its own keeps its log and its record; its data has a short path of its own.

    Raises:
        LabUnavailableError: there is no engine, and no program for one: `./setup.sh engine`.
        LabError: it did not come up.
    """
    if subprocess.run([binary("docker"), "info"], capture_output=True, check=False, timeout=60).returncode == 0:
        yield {}
        return
    # Its sockets' paths have to be short.
    folder = Path(tempfile.mkdtemp(prefix="jfs-docker-"))
    environment = {"DOCKER_HOST": f"unix://{folder}/docker.sock", "DOCKER_CONFIG": str(folder / "client")}
    server = start(folder, log_state, environment)
    try:
        if not can_pull(environment):
            make_images(folder, environment)
        yield environment
    finally:
        server.stop(deadline_s=60)
        remove(folder)


def start(folder: Path, log_state: Path, environment: Mapping[str, str]) -> Server:
    """Start a daemon that leaves the machine's firewall and its default bridge alone.

    Containers of one network reach each other and this machine; published ports go through Docker's own proxy.

    Args:
        folder: For its images, containers and sockets.
        log_state: For its log and its record.
        environment: For `docker`, to ask whether it serves.

    Raises:
        LabError: it did not come up; the message carries its log's end.
    """
    argv: list[str | Path] = [
        binary("dockerd"), f"--host={environment['DOCKER_HOST']}", f"--pidfile={folder}/docker.pid",
        f"--data-root={folder}/data", f"--exec-root={folder}/exec", "--bridge=none", "--iptables=false",
        "--ip6tables=false", "--ip-forward=false",
    ]  # fmt: skip
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    server = Server.start(log_state, "dockerd", argv, env={"PATH": path})

    def serves() -> bool:
        asked = subprocess.run(
            [binary("docker"), "info"], capture_output=True, check=False, timeout=60, env={**os.environ, **environment}
        )
        return asked.returncode == 0

    wait_for("the Docker engine serves", serves, deadline_s=90, poll_s=0.5, server=server)
    return server


def remove(folder: Path) -> None:
    """Unmount what a stopped daemon left mounted below its folder, and remove it."""
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    for point in sorted((point for point in mounted if point.startswith(f"{folder}/")), reverse=True):
        run(["umount", "--lazy", point])
    shutil.rmtree(folder)


def can_pull(environment: Mapping[str, str]) -> bool:
    """Whether this machine reaches the registry of the images; pulls the smallest of them."""
    with contextlib.suppress(LabError):
        run([binary("docker"), "pull", "redis:7.2-bookworm"], env=environment, deadline_s=180)
        return True
    return False


def make_images(folder: Path, environment: Mapping[str, str]) -> None:
    """Make the images from Debian's packages, with the sources of packages that this machine is configured with.

    Raises:
        LabError: a step failed; the message carries what it wrote last.
    """
    root = folder / "debian"
    mirror, *_ = sources()[0].split()[1:]
    run([binary("debootstrap"), "--variant=minbase", "bookworm", root, mirror], deadline_s=900)
    for path in (root / "var/cache/apt/archives").glob("*.deb"):
        path.unlink()
    configure(root)
    archive = folder / "debian.tar"
    run(["tar", "--create", f"--file={archive}", f"--directory={root}", "."], deadline_s=300)
    shutil.rmtree(root)
    docker = binary("docker")
    run([docker, "import", archive, BASE], env=environment, deadline_s=300)
    archive.unlink()
    for image, name in STANDS_IN.items():
        run(
            [docker, "build", "--network=host", f"--tag={image}", IMAGES / name],
            env={**environment, "DOCKER_BUILDKIT": "0"}, deadline_s=900,
        )  # fmt: skip


def sources() -> list[str]:
    """Return this machine's sources of Debian 12's own packages, as lines of sources.list."""
    listed = run(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"])
    lines = sorted({f"deb {line}" for line in listed.splitlines() if "bookworm" in line and line.endswith(" main")})
    if not lines:
        raise LabError("expected apt sources of Debian 12 (bookworm main), found none: the images are made of those")
    # The main suite first: `bookworm` sorts before `bookworm-security` by its own name, not by its address.
    return sorted(lines, key=lambda line: line.split()[2])


def configure(root: Path) -> None:
    """Let apt and pip in an image use what this machine's do: sources, proxies, authorities; no file of it is ours."""
    (root / "etc/apt/sources.list").write_text("\n".join([*sources(), ""]))
    settings = [line for line in run(["apt-config", "dump"]).splitlines() if line.startswith("Acquire::http")]
    (root / "etc/apt/apt.conf.d/90machine").write_text("\n".join([*settings, ""]))
    pip = {}
    for line in run([binary("python"), "-m", "pip", "config", "list"]).splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in {"index-url", "extra-index-url", "proxy", "trusted-host", "timeout"} and "file:" not in value:
            pip[key] = value.strip("'")
    authorities = Path("/etc/ssl/certs/ca-certificates.crt")
    if authorities.exists():
        kept = root / "usr/local/share/machine-authorities.pem"
        shutil.copy(authorities, kept)
        pip["cert"] = "/usr/local/share/machine-authorities.pem"
    (root / "etc/pip.conf").write_text("\n".join(["[global]", *(f"{key} = {value}" for key, value in pip.items()), ""]))

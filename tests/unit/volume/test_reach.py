"""The script that connects from a pod, in images with few tools."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from include.juicefs_storage.volume.reach import _REACH


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("tools", "port_open", "scheme", "insecure", "code"),
    [
        (["bash", "timeout"], True, "http", "", 0),
        (["bash", "timeout"], False, "http", "", 1),
        (["bash"], True, "http", "", 69),
        ([], True, "http", "", 69),
        (["bash", "timeout"], True, "https", "", 69),
        (["bash", "timeout"], False, "https", "", 1),
        (["bash", "timeout"], True, "https", "--insecure", 0),
    ],
)
def test_an_image_without_curl_asks_bash_and_says_what_it_cannot_tell(
    tools: list[str], port_open: bool, scheme: str, insecure: str, code: int, listening: int, tmp_path: Path
) -> None:
    for tool in tools:
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, and nobody listens
        port = listening if port_open else closed.getsockname()[1]
        command = ["/bin/sh", "-c", _REACH, "sh", f"{scheme}://127.0.0.1:{port}", "127.0.0.1", str(port), insecure]
        done = subprocess.run(command, env={**os.environ, "PATH": str(tmp_path)}, check=False, capture_output=True)
    assert done.returncode == code, done.stderr

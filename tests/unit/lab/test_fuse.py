"""A descriptor that is handed over by one client and fetched by the next, as `cmd/passfd.go` of JuiceFS does it."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from lab.kube.fuse import SOCKET, FuseDescriptors
from lab.process import wait_for

KEY = "k" * 63


@pytest.fixture
def kept(tmp_path: Path) -> FuseDescriptors:
    """Below a folder whose name is longer than the path of a socket may be."""
    return FuseDescriptors(tmp_path / ("long" * 20))


def connected(folder: Path, name: str = SOCKET) -> socket.socket:
    connection, descriptor = socket.socket(socket.AF_UNIX), os.open(folder, os.O_RDONLY)
    connection.connect(f"/proc/self/fd/{descriptor}/{name}")
    os.close(descriptor)
    return connection


def hand_over(folder: Path, descriptor: int) -> None:
    """As `sendFuseFd`."""
    with connected(folder) as connection:
        _, received, *_ = socket.recv_fds(connection, 100, 2)
        assert len(received) == 1, "none is kept yet"
        socket.send_fds(connection, [b"FUSE settings"], [descriptor])
        os.close(received[0])


def fetch(folder: Path) -> tuple[bytes, list[int]]:
    """As `getFuseFd`."""
    with connected(folder) as connection:
        message, received, *_ = socket.recv_fds(connection, 100, 2)
        socket.send_fds(connection, [b"CLOSE"], [0])
        os.close(received.pop(0))
        return message, received


def test_the_next_client_gets_what_the_one_before_handed_over(kept: FuseDescriptors) -> None:
    folder, (reading, writing) = kept.folder(KEY), os.pipe()
    hand_over(folder, reading)
    os.close(reading)
    wait_for("it is kept", lambda: kept.keeps(KEY), deadline_s=10)
    os.write(writing, b"alive")
    message, (received,) = fetch(folder)
    assert message == b"FUSE settings"
    assert os.read(received, 5) == b"alive"
    wait_for("it is handed over for good", lambda: not kept.keeps(KEY), deadline_s=10)
    assert fetch(folder)[1] == []
    for descriptor in (received, writing):
        os.close(descriptor)
    kept.stop(KEY)
    assert not kept.keeps(KEY)


def test_a_client_gives_its_own_up(kept: FuseDescriptors) -> None:
    folder, (reading, writing) = kept.folder(KEY), os.pipe()
    listener, at = socket.socket(socket.AF_UNIX), os.open(folder, os.O_RDONLY)
    listener.bind(f"/proc/self/fd/{at}/fuse_fd_comm.1")
    os.close(at)
    listener.listen()
    said: list[bytes] = []

    def client() -> None:
        connection, _ = listener.accept()
        with connection:
            socket.send_fds(connection, [b"FUSE"], [writing, reading])
            said.append(socket.recv_fds(connection, 100, 1)[0])

    serving = threading.Thread(target=client)
    serving.start()
    assert kept.close_in_client(KEY, 1)
    serving.join()
    assert said == [b"CLOSE"]
    for descriptor in (reading, writing):
        os.close(descriptor)
    listener.close()
    kept.stop(KEY)


def test_the_next_client_is_told_where_to_go_on(kept: FuseDescriptors) -> None:
    folder = kept.folder(KEY)
    kept.remember(KEY, 7, "/tmp/state1.json")  # noqa: S108  a pod's own
    assert kept.environment(KEY) == {"_JFS_META_SID": "7", "_FUSE_STATE_PATH": "/tmp/state1.json"}  # noqa: S108
    (folder / "state1.json").touch()
    kept.forget_state(KEY)
    assert list(folder.glob("state*")) == []
    kept.stop(KEY)

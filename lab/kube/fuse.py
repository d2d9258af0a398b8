"""The FUSE descriptors that csi-node keeps, so that a mount outlives its client: `pkg/fuse/passfd` of the driver.

A client hands its descriptor over a socket, and the next client of the mount fetches it there. Meanwhile whoever uses
the mount waits, and gets no error.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Where a mount pod finds the folder, and the socket in it (common.JfsFuseFsPathInPod, fuse_fd_csi_comm.sock).
FOLDER_IN_POD, SOCKET = "/tmp", "fuse_fd_csi_comm.sock"  # noqa: S108 (a pod's own)
ADDRESS_IN_POD = f"{FOLDER_IN_POD}/{SOCKET}"
_MESSAGE_BYTES, _TIMEOUT_S = 1024, 10.0


@dataclass
class _Kept:
    listener: socket.socket
    message: bytes = b"FUSE"
    descriptor: int = -1
    sid: int = 0
    state_path: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class FuseDescriptors:
    """What csi-node keeps of each mount, by the pod's label `juicefs-upgrade-uuid`."""

    def __init__(self, base: Path) -> None:
        self._base, self._kept = base, dict[str, _Kept]()

    def folder(self, key: str) -> Path:
        """Return the folder that the mount pods of a mount share; from now on its descriptor is kept."""
        folder = self._base / key
        if key not in self._kept:
            folder.mkdir(parents=True, exist_ok=True)
            kept = self._kept[key] = _Kept(_listening(folder))
            threading.Thread(target=self._serve, args=(kept,), daemon=True).start()
        return folder

    def keeps(self, key: str) -> bool:
        """Return whether the next client can go on with this mount."""
        return key in self._kept and self._kept[key].descriptor > 0

    def remember(self, key: str, sid: int, state_path: str) -> None:
        """Note what the next client is told.

        Args:
            key: Of the mount.
            sid: The session that it goes on with.
            state_path: Where it finds the open files, in the pod.
        """
        self._kept[key].sid, self._kept[key].state_path = sid, state_path

    def environment(self, key: str) -> dict[str, str]:
        """Return the variables of a client that goes on with this mount."""
        kept = self._kept[key]
        found = {"_JFS_META_SID": str(kept.sid) if kept.sid else "", "_FUSE_STATE_PATH": kept.state_path}
        return {name: value for name, value in found.items() if value}

    def forget_state(self, key: str) -> None:
        """Remove the open files that a client left: one that was deleted has not written all of them."""
        for file in (self._base / key).glob("state*.json"):
            file.unlink()

    def close_in_client(self, key: str, parent_pid: int) -> bool:
        """Make a client give up its descriptor, as the driver does before it sends SIGHUP; False where it has none."""
        with _connected(self._base / key, f"fuse_fd_comm.{parent_pid}") as connection:
            _, descriptors, *_ = socket.recv_fds(connection, _MESSAGE_BYTES, 2)
            _send(connection, b"CLOSE")
        for descriptor in descriptors:
            os.close(descriptor)
        return len(descriptors) > 1

    def stop(self, key: str) -> None:
        """Let go of a mount that nobody uses any more."""
        if kept := self._kept.pop(key, None):
            kept.listener.close()
            with kept.lock:
                if kept.descriptor > 0:
                    os.close(kept.descriptor)
                    kept.descriptor = -1

    def _serve(self, kept: _Kept) -> None:
        while True:
            try:
                connection, _ = kept.listener.accept()
            except OSError:
                return  # stopped
            threading.Thread(target=self._answer, args=(kept, connection), daemon=True).start()

    def _answer(self, kept: _Kept, connection: socket.socket) -> None:
        """Hand over what is kept, then take what comes back."""
        with connection, contextlib.suppress(OSError):
            connection.settimeout(_TIMEOUT_S)
            with kept.lock:
                given = [kept.descriptor] if kept.descriptor > 0 else []
                _send(connection, kept.message, *given)
                for descriptor in given:
                    os.close(descriptor)
                kept.descriptor = -1
            message, descriptors, *_ = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
            with kept.lock:
                if message not in {b"", b"CLOSE"} and kept.descriptor <= 0 and descriptors:
                    kept.descriptor, kept.message = descriptors.pop(0), message
            for descriptor in descriptors:
                os.close(descriptor)


def _send(connection: socket.socket, message: bytes, *descriptors: int) -> None:
    """Send a message with descriptors; the first one stands for nothing, as in the driver."""
    with Path(os.devnull).open("rb") as nothing:
        socket.send_fds(connection, [message], [nothing.fileno(), *descriptors])


@contextlib.contextmanager
def _short(folder: Path, name: str) -> Iterator[str]:
    """Provide a path of a socket that fits its 108 characters."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{name}"
    finally:
        os.close(descriptor)


def _listening(folder: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with _short(folder, SOCKET) as path:
        listener.bind(path)
    listener.listen()
    return listener


@contextlib.contextmanager
def _connected(folder: Path, name: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection, _short(folder, name) as path:
        connection.settimeout(_TIMEOUT_S)
        connection.connect(path)
        yield connection

"""Backups: AES-GCM files below an ObjectStoragePath that outlives the worker. The format: docs/backups.md."""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from include.juicefs_storage.adapters.connections import missing_connections_explained
from include.juicefs_storage.errors import PermanentError, StorageSwitchError, TransientError

if TYPE_CHECKING:
    from airflow.sdk import ObjectStoragePath

_KEY_BYTES, _KEY_ID_BYTES, _NONCE_BYTES = 32, 8, 12
#: Version 1 names no key; version 2 names the key it was sealed with.
_MAGIC_1, _MAGIC = b"JFSW1", b"JFSW2"
_SUFFIX = ".backup"
#: Begins the name of the file that proves the folder; no volume's name begins so.
_PROBE_PREFIX = "_probe."
#: Errors of a folder that do not pass by themselves.
_PERMANENT_ERRNO = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR})


def read_key(text: str) -> bytes | None:
    """Return the key that a text holds as base64 of 32 bytes; None where it holds none."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        return None
    return key if len(key) == _KEY_BYTES else None


@dataclass(frozen=True)
class Keyring:
    """Seal with the current key, open with the key that a file was sealed with.

    Attributes:
        current: Seals.
        old: Keys that were current before: they only open.
    """

    current: bytes = field(repr=False)
    old: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """Every key that opens, the current one first."""
        return (self.current, *self.old)

    def seal(self, name: str, content: bytes) -> bytes:
        """Encrypt a content. Its name is authenticated with it: a renamed file does not open."""
        head, nonce = _MAGIC + key_id(self.current), os.urandom(_NONCE_BYTES)
        return head + nonce + AESGCM(self.current).encrypt(nonce, content, head + name.encode())

    def open(self, name: str, sealed: bytes) -> bytes:
        """Decrypt what `seal` made, of this version or the first.

        Raises:
            PermanentError: It is damaged, has another name, or was sealed with a key that is not here.
        """
        if sealed.startswith(_MAGIC):
            head = sealed[: len(_MAGIC) + _KEY_ID_BYTES]
            named = head[len(_MAGIC) :]
            keys = [key for key in self.keys if key_id(key) == named]
            if not keys:
                known = ", ".join(key_id(key).hex() for key in self.keys)
                raise PermanentError(
                    f"{name} was sealed with key {named.hex()}; the connection holds key {known}.",
                    next_step="add that key to `old_keys` of connection juicefs_backup, see docs/backups.md",
                )
            context = head + name.encode()
        else:
            head, keys, context = _MAGIC_1, list(self.keys), name.encode()
        nonce, rest = sealed[len(head) : len(head) + _NONCE_BYTES], sealed[len(head) + _NONCE_BYTES :]
        for key in keys if sealed.startswith((_MAGIC, _MAGIC_1)) else ():
            with suppress(InvalidTag, ValueError):
                return AESGCM(key).decrypt(nonce, rest, context)
        raise PermanentError(
            f"{name} cannot be decrypted: damaged, renamed, or sealed with another key.",
            next_step="add the key that was current then to `old_keys` of connection juicefs_backup, "
            "see docs/backups.md",
        )


def key_id(key: bytes) -> bytes:
    """Return an id that names a key and reveals nothing of it."""
    return hmac.new(key, b"juicefs-storage-switch key id", hashlib.sha256).digest()[:_KEY_ID_BYTES]


@dataclass(frozen=True)
class FileVault:
    """`ports.Vault`: one file per backup, `<id>.backup`; its name is authenticated together with its content."""

    keyring: Keyring
    folder: ObjectStoragePath

    @classmethod
    def from_connection(cls, conn_id: str, mask: Callable[[str], None]) -> FileVault:
        """Use an Airflow connection: password = key (base64 of 32 bytes), extra.path = folder, extra.old_keys.

        Args:
            conn_id: The connection.
            mask: Keeps a text out of the logs; called with every key.

        Raises:
            PermanentError: The connection has no usable key or path, or an old key is no key.
        """
        from airflow.sdk import BaseHook, ObjectStoragePath

        with missing_connections_explained():
            connection = BaseHook.get_connection(conn_id)
        path, old = connection.extra_dejson.get("path"), connection.extra_dejson.get("old_keys") or []
        # Where the environment of a deployment fills the password in, old keys follow the current one after commas.
        texts = [*(connection.password or "").split(","), *(old if isinstance(old, list) else [old])]
        for text in texts:
            mask(str(text))
        current, *earlier = [read_key(str(text)) for text in texts]
        if current is None or not path:
            raise PermanentError(
                f"Connection {conn_id!r} for backups: expected base64 of {_KEY_BYTES} bytes as password, a folder as "
                f'extra {{"path": "s3://…"}}; found {"a" if current else "no"} key and path {path!r}.',
                next_step="make a key with `openssl rand -base64 32`, keep a copy of it elsewhere, save the connection",
            )
        if None in earlier:
            raise PermanentError(
                f"Connection {conn_id!r} for backups: expected each of extra.old_keys to be base64 of {_KEY_BYTES} "
                f"bytes; number {earlier.index(None) + 1} of {len(earlier)} is not.",
                next_step='correct it: {"path": "s3://…", "old_keys": ["…"]}',
            )
        return cls(Keyring(current, tuple(key for key in earlier if key)), ObjectStoragePath(path))

    @property
    def key(self) -> bytes:
        """The current key."""
        return self.keyring.current

    @property
    def keys(self) -> Sequence[bytes]:
        """The current key, then the old ones."""
        return self.keyring.keys

    def _file(self, backup_id: str) -> ObjectStoragePath:
        return self.folder / f"{backup_id}{_SUFFIX}"

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Turn the errors of the folder's storage into ours. Each kind of storage raises errors of its own."""
        try:
            yield
        except StorageSwitchError:
            raise
        except Exception as error:  # noqa: BLE001  a filesystem of any kind, with errors of any kind
            number = error.errno if isinstance(error, OSError) else None
            permanent = isinstance(error, PermissionError) or number in _PERMANENT_ERRNO
            reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
            raise (PermanentError if permanent else TransientError)(
                f"The folder of backups {self.folder}: {action} failed: {reason}.",
                next_step="make room in it, or correct its rights or connection juicefs_backup; then clear this task",
            ) from None

    def _refresh(self) -> None:
        """Forget cached listings: another worker may have written since."""
        self.folder.fs.invalidate_cache()

    def ids(self) -> list[str]:
        """List the folder; nothing is read.

        Raises:
            StorageSwitchError: The folder cannot be listed.
        """
        self._refresh()
        with self._explained("listing it"):
            if not self.folder.exists():
                return []
            names = [file.name for file in self.folder.iterdir()]
        return sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX))

    def save(self, backup_id: str, content: bytes) -> None:
        """Encrypt and write; then read back, decrypt and compare.

        Raises:
            StorageSwitchError: It cannot be written, or does not read back.
        """
        part = self.folder / f"{backup_id}.part"
        with self._explained(f"writing {backup_id}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            # Under another name first: a process that is killed here leaves no half of a backup under its id.
            try:
                part.write_bytes(self.keyring.seal(backup_id, content))
                part.replace(self._file(backup_id))
            except Exception:
                with suppress(Exception):
                    part.unlink(missing_ok=True)
                raise
        if self.load(backup_id) != content:
            raise TransientError(
                f"Backup {backup_id} does not read back as it was written to {self.folder}.",
                state="nothing else was changed",
                next_step="check the storage behind connection juicefs_backup",
            )

    def load(self, backup_id: str) -> bytes | None:
        """Read and decrypt; None where there is no such file.

        Raises:
            PermanentError: The file is damaged, or was sealed with a key that the connection does not hold.
            TransientError: The folder cannot be read.
        """
        self._refresh()
        file = self._file(backup_id)
        with self._explained(f"reading {backup_id}"):
            if not file.exists():
                return None
            sealed: bytes = file.read_bytes()
        return self.keyring.open(backup_id, sealed)

    def check_room(self, size_bytes: int) -> None:
        """Prove that a file can be written, read back and removed.

        Args:
            size_bytes: How large a file.

        Raises:
            StorageSwitchError: It cannot.
        """
        name = f"{_PROBE_PREFIX}{uuid.uuid4().hex}"
        try:
            self.save(name, os.urandom(size_bytes))
        finally:
            with self._explained(f"removing {name}"):
                self._file(name).unlink(missing_ok=True)

"""Backups: AES-GCM files below an ObjectStoragePath that outlives the worker."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from include.juicefs_storage.errors import PermanentError, TransientError

if TYPE_CHECKING:
    from airflow.sdk import ObjectStoragePath

_KEY_BYTES, _NONCE_BYTES = 32, 12
_MAGIC = b"JFSW1"
_SUFFIX = ".backup"


@dataclass(frozen=True)
class FileVault:
    """`ports.Vault`: one file per backup, `<id>.backup`; its name is authenticated together with its content."""

    key: bytes = field(repr=False)
    folder: ObjectStoragePath

    @classmethod
    def from_connection(cls, conn_id: str) -> FileVault:
        """Use a connection whose password is the key (base64 of 32 bytes) and whose extra.path is the folder.

        Raises:
            PermanentError: The connection has no usable key or path.
        """
        from airflow.sdk import BaseHook, ObjectStoragePath

        connection = BaseHook.get_connection(conn_id)
        try:
            key = base64.b64decode(connection.password or "", validate=True)
        except ValueError:
            key = b""
        path = connection.extra_dejson.get("path")
        if len(key) != _KEY_BYTES or not path:
            raise PermanentError(
                f"Connection {conn_id!r} for backups: expected base64 of {_KEY_BYTES} bytes as password, a folder as "
                f'extra {{"path": "s3://…"}}; found {len(key)} bytes and path {path!r}.',
                next_step="make a key with `openssl rand -base64 32`, keep a copy of it elsewhere, save the connection",
            )
        return cls(key, ObjectStoragePath(path))

    def _file(self, backup_id: str) -> ObjectStoragePath:
        return self.folder / f"{backup_id}{_SUFFIX}"

    def _look_anew(self) -> None:
        """Forget what listings showed: another worker may have written since, and its marks fence this one."""
        self.folder.fs.invalidate_cache()

    def ids(self) -> list[str]:
        """List the folder; nothing is read."""
        self._look_anew()
        if not self.folder.exists():
            return []
        return sorted(file.name.removesuffix(_SUFFIX) for file in self.folder.iterdir() if file.name.endswith(_SUFFIX))

    def save(self, backup_id: str, content: bytes) -> None:
        """Encrypt and write; then read back, decrypt and compare."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = _MAGIC + nonce + AESGCM(self.key).encrypt(nonce, content, backup_id.encode())
        self.folder.mkdir(parents=True, exist_ok=True)
        # Under another name first: a process that is killed here leaves no half of a backup under its id.
        part = self.folder / f"{backup_id}.part"
        part.write_bytes(sealed)
        part.replace(self._file(backup_id))
        if self.load(backup_id) != content:
            raise TransientError(
                f"Backup {backup_id} does not read back as it was written to {self.folder}.",
                state="nothing else was changed",
                next_step="look at the storage behind the backup connection",
            )

    def load(self, backup_id: str) -> bytes | None:
        """Read and decrypt.

        Raises:
            PermanentError: The file is damaged, or was written with another key.
        """
        self._look_anew()
        file = self._file(backup_id)
        if not file.exists():
            return None
        sealed: bytes = file.read_bytes()
        start = len(_MAGIC) + _NONCE_BYTES
        try:
            if not sealed.startswith(_MAGIC):
                raise InvalidTag
            return AESGCM(self.key).decrypt(sealed[len(_MAGIC) : start], sealed[start:], backup_id.encode())
        except InvalidTag:
            raise PermanentError(
                f"Backup {backup_id} in {self.folder} cannot be decrypted: damaged, or written with another key.",
                next_step="put the key back that was in the backup connection when it was written",
            ) from None

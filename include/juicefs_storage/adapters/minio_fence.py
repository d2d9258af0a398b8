"""A write fence on MinIO: a group whose policy denies its members whatever would change the volume's objects.

To rehearse that the store is switched off, another group denies its members the reads as well, until a moment.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from include.juicefs_storage.adapters.s3.client import S3Client, encoded
from include.juicefs_storage.adapters.s3.signing import PAYLOAD_HEADER
from include.juicefs_storage.errors import PermanentError, TransientError

if TYPE_CHECKING:
    from datetime import datetime

    from pydantic import SecretStr

    from include.juicefs_storage.adapters.s3.store import S3Store

_WRITES = ("s3:PutObject", "s3:DeleteObject", "s3:DeleteObjectVersion")
_READS = ("s3:GetObject", "s3:GetObjectVersion")


class MinioFence:
    """`ports.WriteFence`, through MinIO's admin API. What denies wins over what allows: the user's own policies stay.

    The user joins a group of the volume's, and leaves it again. Of users and of groups MinIO only sets all policies at
    once, and other volumes with the same key may be moved at the same time; a member is added and removed by itself.

    The API is spoken as it is: `mc admin` takes the user's key in its command line.

    Args:
        admin: The store and its bucket, with the keys of a user who may administer policies.
        user: The access key that is fenced off: an ordinary user's. MinIO has no policies for its root user.
        volume: The objects below this name are fenced.
        off_until: Deny the reads as well, until this moment (UTC), by the store's own clock; None: a fence, which stays
            up until it is taken down.
    """

    def __init__(self, admin: S3Store, user: SecretStr, volume: str, off_until: datetime | None = None) -> None:
        self._admin, self._user, self._volume, self._off_until = admin, user, volume, off_until
        self._name = f"juicefs-storage-{'off' if off_until else 'fence'}-{volume}"

    def is_up(self) -> bool:
        """Ask for the user's groups."""
        answer = self._call("GET", "user-info", accessKey=self._user.get_secret_value())
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise TransientError(
                f"user-info of MinIO's admin API at {self._admin.endpoint}: expected JSON of a user, found none.",
                next_step="the endpoint of `fence_conn_id` must be MinIO's S3 port, not a console or a proxy's page",
            )
        return self._name in (found.get("memberOf") or ())

    def up(self) -> None:
        """Write the policy, give it to the group, add the user to its members, and see that it is there.

        Raises:
            TransientError: Each call was answered well, and the user is no member.
        """
        resource = f"arn:aws:s3:::{self._admin.bucket}/{self._volume}/*"
        statement: dict[str, Any] = {"Effect": "Deny", "Action": _WRITES, "Resource": [resource]}
        if self._off_until:
            # A worker that is killed allows nothing again: the denial ends by itself.
            ends_at = self._off_until.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            statement["Action"] = [*_WRITES, *_READS]
            statement["Condition"] = {"DateLessThan": {"aws:CurrentTime": ends_at}}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self._call("PUT", "add-canned-policy", policy.encode(), name=self._name)
        self._group([])  # a policy is given to a group that is there
        self._call("PUT", "set-user-or-group-policy", policyName=self._name, userOrGroup=self._name, isGroup="true")
        self._group([self._user.get_secret_value()])
        if not self.is_up():
            raise TransientError(
                f"MinIO's admin API at {self._admin.endpoint}: expected the user in group {self._name}, found it "
                "outside.",
                state="the write fence is not up",
                next_step="the task tries again; then look at the server behind `fence_conn_id`",
            )

    def down(self) -> None:
        """Take the user from the members of the group; without members it denies nobody anything."""
        if self.is_up():
            self._group([self._user.get_secret_value()], remove=True)

    def _group(self, members: list[str], *, remove: bool = False) -> None:
        change = {"group": self._name, "members": members, "isRemove": remove}
        self._call("PUT", "update-group-members", json.dumps(change).encode())

    def _call(self, method: str, what: str, body: bytes = b"", **query: str) -> bytes:
        admin = self._admin
        where = f"{what} of MinIO's admin API at {admin.endpoint}"
        # The API knows no bucket: it is asked at the endpoint itself.
        client = S3Client(replace(admin, virtual_host=False))
        try:
            answer = client.call(
                method,
                f"/minio/admin/v3/{what}",
                "&".join(f"{name}={encoded(value)}" for name, value in sorted(query.items())),
                ((PAYLOAD_HEADER, sha256(body).hexdigest()),),  # MinIO takes no unsigned payload here
                parts=[body] if body else None,
                length=len(body) if method == "PUT" else None,
            )
        finally:
            client.close()
        if answer.status == 200:
            return answer.body
        if b"NoSuchUser" in answer.body:
            raise PermanentError(
                f"{where}: the setting's access key is no user there. Root users and service accounts have no fence.",
                next_step="leave `fence_conn_id` empty, or give the volume a user of its own",
            )
        kind = TransientError if answer.status >= 500 else PermanentError
        raise kind(
            f"{where} answered {answer.status}.",
            next_step="the keys of `fence_conn_id` must be allowed admin:* on a MinIO server",
        )

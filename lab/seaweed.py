"""S3 stores of the lab: a SeaweedFS server each, with keys of its own."""

import contextlib
import json
import os
import re
import secrets
import signal
import urllib.request
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lab.keys import new_secret
from lab.process import Server, binary, free_ports, wait_for

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_READ = ["Read", "List"]
_READ_AND_WRITE = ["Admin", "Read", "Write", "List", "Tagging"]
_REFUSALS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}
_SERVICES = ("master", "volume", "filer", "s3")
_REQUEST = re.compile(r"^SeaweedFS_s3_request_total\{(?P<labels>[^}]*)\} (?P<count>\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Store:
    """An S3 server with one bucket. Its state lies in `<state>/<name>`."""

    state: Path
    name: str
    ports: list[int]
    bucket: str
    access_key: str
    secret_key: str = field(repr=False)

    @classmethod
    def create(cls, state: Path, name: str, bucket: str) -> "Store":
        """Start a server with generated keys and an empty bucket (about 3 s)."""
        store = cls(state, name, free_ports(9), bucket, secrets.token_hex(10).upper(), new_secret())
        store._folder.mkdir(parents=True, mode=0o700)
        (store._folder / "data").mkdir()
        store.start()
        return store

    @property
    def _folder(self) -> Path:
        return self.state / self.name

    @property
    def endpoint_url(self) -> str:
        """Where S3 clients reach it."""
        return f"http://127.0.0.1:{self.ports[3]}"

    @property
    def bucket_url(self) -> str:
        """The bucket as JuiceFS names it (`--bucket`)."""
        return f"{self.endpoint_url}/{self.bucket}"

    def server(self) -> Server | None:
        """Return the recorded process."""
        return Server.load(self.state, self.name)

    def start(self) -> None:
        """Start the server, again on the same data and ports, writes allowed; returns when it serves objects."""
        if (server := self.server()) and server.alive():
            return
        self._write_identity(_READ_AND_WRITE)
        http, grpc, metrics = self.ports[:4], self.ports[4:8], self.ports[8]
        server = Server.start(
            self.state,
            self.name,
            [
                binary("weed"),
                f"-logdir={self._folder}",
                "server",
                f"-dir={self._folder / 'data'}",
                "-ip=127.0.0.1",
                "-ip.bind=127.0.0.1",
                "-filer",
                "-s3",
                *(f"-{service}.port={port}" for service, port in zip(_SERVICES, http, strict=True)),
                *(f"-{service}.port.grpc={port}" for service, port in zip(_SERVICES, grpc, strict=True)),
                f"-metricsPort={metrics}",
                "-s3.port.iceberg=0",
                "-s3.port.lance=0",
                f"-s3.config={self._identity}",
                # A missing bucket stays missing, as on MinIO: only an explicit call creates one.
                "-s3.autoCreateBucket=false",
                "-master.volumeSizeLimitMB=1024",
                "-master.telemetry=false",
                # A restarted single master waits for these before it leads again; the defaults cost 20 s.
                "-master.electionTimeout=1s",
                "-master.heartbeatInterval=100ms",
                "-volume.max=50",
                "-volume.preStopSeconds=0",
            ],
            cwd=self._folder,
        )
        wait_for(f"{self.name} stores and serves objects", self._serves, deadline_s=60, server=server)

    def stop(self) -> None:
        """Stop the server; its data stays. Idempotent."""
        if server := self.server():
            # SIGTERM waits 15 s for a subscription that never ends. What was acknowledged is in the files by then.
            server.stop(deadline_s=1)
        remove_sockets(self.ports)

    def client(self) -> "S3Client":
        """Make a boto3 client with the store's keys: path style, no retries."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(
                s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=30
            ),
        )

    def objects(self, prefix: str = "") -> dict[str, tuple[int, str]]:
        """Return every object below the prefix: key to (bytes, ETag)."""
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix)
        return {item["Key"]: (item["Size"], item["ETag"]) for page in pages for item in page.get("Contents", [])}

    def refuse_writes(self) -> None:
        """Answer every PUT, POST and DELETE with 403 AccessDenied from now on; reads still work."""
        self._set_actions(_READ)

    def allow_writes(self) -> None:
        """End refuse_writes()."""
        self._set_actions(_READ_AND_WRITE)

    def requests(self) -> Counter[tuple[str, str]]:
        """S3 requests to the bucket since the server's start, counted by (type, HTTP status); without refused ones.

        Types are SeaweedFS's: GET (HEAD too), LIST, PUT, POST, DELETE, COPY, …
        """
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[8]}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        counts: Counter[tuple[str, str]] = Counter()
        for match in _REQUEST.finditer(text):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', match["labels"]))
            if labels["bucket"] == self.bucket:
                counts[labels["type"], labels["code"]] += int(float(match["count"]))
        return counts

    def mutating_requests(self) -> int:
        """Count the requests that changed something in the bucket since the start; refused ones do not count."""
        return sum(count for (kind, _), count in self.requests().items() if kind not in {"GET", "LIST"})

    @property
    def _identity(self) -> Path:
        return self._folder / "identity.json"

    def with_keys(self, access_key: str, secret_key: str) -> "Store":
        """The same server, as it is reached with other keys."""
        return replace(self, access_key=access_key, secret_key=secret_key)

    def take_only(self, *others: "Store") -> None:
        """From now on the server takes the keys of these alone, each `with_keys`; `take_only(store)` ends it.

        A server knows one secret key of an access key.
        """
        before = self._identities()
        self._write_identity(_READ_AND_WRITE, *others)
        self._read_identity_again()
        taken = {(other.access_key, other.secret_key) for other in others}
        for store in (self, *others, *(self.with_keys(*keys) for keys in before)):
            wait_for(
                f"{self.name} knows its keys",
                lambda store=store: store._writable() == ((store.access_key, store.secret_key) in taken),  # type: ignore[misc]
                deadline_s=10,
            )

    def _identities(self) -> list[tuple[str, str]]:
        """Read the keys that the server takes."""
        found = json.loads(self._identity.read_text())["identities"] if self._identity.exists() else []
        return [(keys["accessKey"], keys["secretKey"]) for identity in found for keys in identity["credentials"]]

    def _write_identity(self, actions: list[str], *others: "Store") -> None:
        had = len(self._identities())
        self._identity.touch(mode=0o600)
        identities: list[dict[str, object]] = [
            {
                "name": f"lab-{number}",
                "credentials": [{"accessKey": store.access_key, "secretKey": store.secret_key}],
                "actions": actions,
            }
            for number, store in enumerate(others or (self,))
        ]
        # A server that reads this again keeps an identity whose name is gone: it is left without keys.
        identities += [
            {"name": f"lab-{number}", "credentials": [], "actions": []} for number in range(len(identities), had)
        ]
        self._identity.write_text(json.dumps({"identities": identities}))

    def _read_identity_again(self) -> None:
        if (server := self.server()) and server.alive():
            os.kill(server.pid, signal.SIGHUP)

    def _set_actions(self, actions: list[str]) -> None:
        self._write_identity(actions)
        server = self.server()
        if server and server.alive():
            self._read_identity_again()
            wait_for(
                f"{self.name} {'allows' if 'Write' in actions else 'refuses'} writes",
                lambda: self._writable() == ("Write" in actions),
                deadline_s=10,
                server=server,
            )

    def _writable(self) -> bool:
        from botocore.exceptions import ClientError

        try:
            # Deleting what does not exist needs the right and leaves no trace.
            self.client().delete_object(Bucket=self.bucket, Key="lab-probe")
        except ClientError as error:
            return error.response["Error"]["Code"] not in _REFUSALS
        return True

    def _serves(self) -> bool:
        from botocore.exceptions import BotoCoreError, ClientError

        client = self.client()
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=self.bucket)
            client.put_object(Bucket=self.bucket, Key="lab-probe", Body=b"probe")
            client.delete_object(Bucket=self.bucket, Key="lab-probe")
        except (BotoCoreError, ClientError):
            return False
        return True


def remove_sockets(ports: list[int]) -> None:
    """Remove the sockets that SeaweedFS leaves in /tmp when it ends."""
    for port in ports:
        for socket in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108
            socket.unlink(missing_ok=True)

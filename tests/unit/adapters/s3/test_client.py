"""What a client shows of its store."""

from __future__ import annotations

from include.juicefs_storage.adapters.s3.client import S3Client
from include.juicefs_storage.adapters.s3.store import S3Store


def test_secrets_are_not_shown() -> None:
    store = S3Store("http://h:1", "b", access_key="AKID-x", secret_key="SECRET-x", session_token="TOKEN-x")
    client = S3Client(store)
    for shown in (repr(store), str(store), repr(client), repr(client.signer), store.name):
        assert "-x" not in shown
